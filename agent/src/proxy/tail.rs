//! Reads the log files of one llama-server: the last lines, and then what is added, across rotation.
//!
//! The newest file is `server.log`, rotated ones are `server.log.1`, `.2`, … (higher is older). A file is known by its
//! inode, so a rename while it is read loses nothing; what was rotated away unread is said in the text.

use std::{
    fs::File,
    io::{self, ErrorKind},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

/// Most bytes read back for the last lines.
const TAIL_BYTES_MAX: u64 = 4 << 20;
/// Longest line, in bytes of the file; a longer one is cut into several.
pub(super) const LINE_BYTES_MAX: usize = 16 << 10;
/// Most bytes read in one step.
const STEP_BYTES: u64 = 64 << 10;
/// Rotated files looked at.
const ROTATED_MAX: usize = 16;

const LOST: &str = "[drover: lines are missing here: the log was rotated faster than it was read]";

/// Cuts bytes into lines and makes them safe to show.
#[derive(Debug, Default)]
pub(super) struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// Takes bytes; returns the lines that they complete.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|&b| b == b'\n') {
            let (text, complete) = piece.strip_suffix(b"\n").map_or((piece, false), |text| (text, true));
            let mut rest = text;
            while self.partial.len() + rest.len() > LINE_BYTES_MAX {
                let (head, more) = rest.split_at(LINE_BYTES_MAX - self.partial.len());
                self.partial.extend_from_slice(head);
                lines.push(self.take());
                rest = more;
            }
            self.partial.extend_from_slice(rest);
            if complete {
                lines.push(self.take());
            }
        }
        lines
    }

    /// The line that was begun and not ended, if any.
    pub(super) fn finish(&mut self) -> Option<String> {
        (!self.partial.is_empty()).then(|| self.take())
    }

    fn take(&mut self) -> String {
        let line = escape(self.partial.strip_suffix(b"\r").unwrap_or(&self.partial));
        self.partial.clear();
        line
    }
}

/// Text without control characters (but tab), so that a log can't steer the terminal that shows it.
fn escape(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() && c != '\t' {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe
}

fn rotated(path: &Path, number: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    if number > 0 {
        name.push(format!(".{number}"));
    }
    name.into()
}

fn open(path: &Path) -> io::Result<Option<(File, u64)>> {
    match File::open(path) {
        Ok(file) => {
            let inode = file.metadata()?.ino();
            Ok(Some((file, inode)))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Goes through one llama-server's log.
#[derive(Debug)]
pub(super) struct Reader {
    path: PathBuf,
    /// The file that is read, with its inode; none while there is no log yet.
    file: Option<(File, u64)>,
    position: u64,
    lines: Lines,
}

impl Reader {
    /// Opens the log in a folder and reads its last lines, at most `want`.
    pub(super) fn open(folder: &Path, want: usize) -> io::Result<(Self, Vec<String>)> {
        let path = folder.join("server.log");
        let file = open(&path)?;
        let mut reader = Self { path, file, position: 0, lines: Lines::default() };
        let Some((newest, inode)) = &reader.file else { return Ok((reader, Vec::new())) };
        let size = newest.metadata()?.len();
        reader.position = size;
        let (mut bytes, mut seen) = (read_back(newest, size, want, TAIL_BYTES_MAX)?, vec![*inode]);
        for number in 1..=ROTATED_MAX {
            let budget = TAIL_BYTES_MAX - bytes.len() as u64;
            if line_ends(&bytes) > want || budget == 0 {
                break;
            }
            let Some((older, inode)) = open(&rotated(&reader.path, number))? else { break };
            if seen.contains(&inode) {
                continue; // it was rotated while we looked
            }
            seen.push(inode);
            let mut before = read_back(&older, older.metadata()?.len(), want, budget)?;
            before.append(&mut bytes);
            bytes = before;
        }
        let mut last = reader.lines.push(&bytes);
        let begun = usize::from(!reader.lines.partial.is_empty());
        last.drain(..last.len().saturating_sub(want.saturating_sub(begun)));
        Ok((reader, last))
    }

    /// The line that was begun and not ended, if any.
    pub(super) fn finish(&mut self) -> Option<String> {
        self.lines.finish()
    }

    /// Lines added since; a bounded step, empty when all is read.
    pub(super) fn step(&mut self) -> io::Result<Vec<String>> {
        let bytes = self.read()?;
        if !bytes.is_empty() {
            return Ok(self.lines.push(&bytes));
        }
        let current = open(&self.path)?;
        let (Some(inode), Some((_, newest))) = (self.file.as_ref().map(|f| f.1), current.as_ref()) else {
            if self.file.is_none() {
                self.file = current;
            }
            return Ok(Vec::new());
        };
        if inode == *newest {
            return Ok(Vec::new());
        }
        // Rotated. What was written between our last read and the renaming comes first.
        let bytes = self.read()?;
        if !bytes.is_empty() {
            return Ok(self.lines.push(&bytes));
        }
        let mut lines = self.lines.finish().into_iter().collect::<Vec<_>>();
        let mut next = current;
        let mut found = false;
        for number in 1..=ROTATED_MAX {
            let Some(older) = open(&rotated(&self.path, number))? else { break };
            if older.1 == inode {
                found = true;
                break;
            }
            next = Some(older);
        }
        if !found {
            lines.push(LOST.to_owned());
        }
        (self.file, self.position) = (next, 0);
        Ok(lines)
    }

    fn read(&mut self) -> io::Result<Vec<u8>> {
        let Some((file, _)) = &self.file else { return Ok(Vec::new()) };
        let size = file.metadata()?.len();
        if size < self.position {
            self.position = 0; // emptied in place
        }
        let length = (size - self.position).min(STEP_BYTES);
        let bytes = read_range(file, self.position, length)?;
        self.position += bytes.len() as u64;
        Ok(bytes)
    }
}

fn line_ends(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&b| b == b'\n').count()
}

fn read_range(file: &File, from: u64, length: u64) -> io::Result<Vec<u8>> {
    // At most TAIL_BYTES_MAX, so it fits.
    let mut bytes = vec![0; length as usize];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], from + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// The end of a file, going back until it holds more than `want` line ends, its beginning or `budget` bytes are reached.
fn read_back(file: &File, size: u64, want: usize, budget: u64) -> io::Result<Vec<u8>> {
    let (mut bytes, mut from) = (Vec::new(), size);
    while from > 0 && line_ends(&bytes) <= want {
        let length = STEP_BYTES.min(from).min(budget - bytes.len() as u64);
        if length == 0 {
            break;
        }
        from -= length;
        let mut block = read_range(file, from, length)?;
        block.append(&mut bytes);
        bytes = block;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, io::Write as _};

    fn append(folder: &Path, text: &str) {
        let mut file = File::options().create(true).append(true).open(folder.join("server.log")).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    fn rotate(folder: &Path) {
        let name = |n| rotated(&folder.join("server.log"), n);
        let _ = fs::rename(name(1), name(2));
        fs::rename(name(0), name(1)).unwrap();
    }

    /// All that steps give until nothing comes twice in a row (a step at a rotation may be empty).
    fn drain(reader: &mut Reader) -> Vec<String> {
        let (mut all, mut empty) = (Vec::new(), 0);
        while empty < 3 {
            let lines = reader.step().unwrap();
            empty = if lines.is_empty() { empty + 1 } else { 0 };
            all.extend(lines);
        }
        all
    }

    #[test]
    fn the_last_lines_reach_back_into_rotated_files() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert!(Reader::open(folder, 3).unwrap().1.is_empty(), "no log yet");
        append(folder, "1\n2\n");
        rotate(folder);
        append(folder, "3\n4\n");
        rotate(folder);
        append(folder, "5\n6");
        let (mut reader, lines) = Reader::open(folder, 4).unwrap();
        assert_eq!(lines, ["3", "4", "5"], "the line just begun counts and is given by finish");
        assert_eq!(reader.finish().unwrap(), "6");
        assert_eq!(Reader::open(folder, 100).unwrap().1, ["1", "2", "3", "4", "5"]);
        let many = (0..50_000).map(|n| format!("line {n}\n")).collect::<String>();
        append(folder, &many);
        let lines = Reader::open(folder, 10_000).unwrap().1;
        assert_eq!((lines.len(), lines[0].as_str(), lines[9_999].as_str()), (10_000, "line 40000", "line 49999"));
    }

    #[test]
    fn following_loses_nothing_at_rotations_and_says_when_it_did() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let (mut reader, _) = Reader::open(folder, 10).unwrap();
        append(folder, "1\n2");
        assert_eq!(drain(&mut reader), ["1"]);
        append(folder, "b\n3\n");
        rotate(folder);
        append(folder, "4\n");
        rotate(folder);
        append(folder, "5\n");
        assert_eq!(drain(&mut reader), ["2b", "3", "4", "5"], "two rotations between two looks");
        for n in 6..10 {
            rotate(folder);
            append(folder, &format!("{n}\n"));
        }
        assert_eq!(drain(&mut reader), [LOST, "7", "8", "9"]);
        File::options().write(true).truncate(true).open(folder.join("server.log")).unwrap();
        drain(&mut reader);
        append(folder, "after\n");
        assert_eq!(drain(&mut reader), ["after"], "emptied in place");
    }

    #[test]
    fn control_characters_are_escaped_and_long_lines_cut() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"\x1b[31mred\x07\ttab \xff\r\n"), ["\\u{1b}[31mred\\u{7}\ttab \u{fffd}"]);
        let long = "x".repeat(LINE_BYTES_MAX + 5);
        let cut = lines.push(format!("{long}\nshort\n").as_bytes());
        assert_eq!(cut.iter().map(String::len).collect::<Vec<_>>(), [LINE_BYTES_MAX, 5, 5]);
        assert_eq!(lines.finish(), None);
    }
}
