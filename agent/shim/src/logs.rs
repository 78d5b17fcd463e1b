//! The log files of a server: `server.log` is the current one, `server.log.1` the one before, and so on.
//!
//! Bounded in size and number. A full disk drops lines and counts them; it never blocks the server that writes them.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// Name of the current file.
pub const FILE_NAME: &str = "server.log";

/// Begins the line that stands before what each run prints; the rest of the line names the run.
pub const RUN_BEGINS: &str = "drover-shim: a run begins: ";

/// Path of file number `n`; 0 is the current one.
#[must_use]
pub fn file(directory: &Path, n: u32) -> PathBuf {
    match n {
        0 => directory.join(FILE_NAME),
        n => directory.join(format!("{FILE_NAME}.{n}")),
    }
}

/// All files that exist, oldest first.
#[must_use]
pub fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut n = 0;
    while file(directory, n).exists() {
        found.push(file(directory, n));
        n += 1;
    }
    found.reverse();
    found
}

/// Writes log files and rotates them.
#[derive(Debug)]
pub struct Logs {
    directory: PathBuf,
    bytes_max: u64,
    files_max: u32,
    current: Option<(File, u64)>,
    dropped_lines: u64,
    dropped_unreported: u64,
}

impl Logs {
    /// Goes on with the files of a directory, which must exist. `bytes_max` is the size of one file.
    #[must_use]
    pub fn new(directory: &Path, bytes_max: u64, files_max: u32) -> Self {
        Self {
            directory: directory.to_owned(),
            bytes_max: bytes_max.max(1),
            files_max: files_max.max(1),
            current: None,
            dropped_lines: 0,
            dropped_unreported: 0,
        }
    }

    /// Lines dropped so far because they could not be written.
    #[must_use]
    pub fn dropped_lines(&self) -> u64 {
        self.dropped_lines
    }

    /// Writes what a server has printed. Never fails: what can't be written is counted.
    pub fn write(&mut self, bytes: &[u8]) {
        if self.dropped_unreported > 0 {
            let notice = format!("drover-shim: {} log lines were dropped here\n", self.dropped_unreported);
            if self.try_write(notice.as_bytes()).is_ok() {
                self.dropped_unreported = 0;
            }
        }
        if self.try_write(bytes).is_err() {
            // The file is opened anew next time: the disk may have been exchanged or freed.
            self.current = None;
            let lines = bytes.iter().filter(|&&b| b == b'\n').count().max(1) as u64;
            self.dropped_lines += lines;
            self.dropped_unreported += lines;
        }
    }

    fn try_write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = self.bytes_max.saturating_sub(self.open()?.1);
            if room == 0 {
                self.rotate()?;
                continue;
            }
            let fitting = usize::try_from(room).unwrap_or(usize::MAX);
            let (now, later) = if bytes.len() <= fitting {
                (bytes, &[][..])
            } else {
                // Files are cut at the end of a line where there is one.
                match bytes[..fitting].iter().rposition(|&b| b == b'\n') {
                    Some(end) => bytes.split_at(end + 1),
                    None if self.open()?.1 > 0 => {
                        self.rotate()?;
                        continue;
                    }
                    None => bytes.split_at(fitting),
                }
            };
            let current = self.open()?;
            current.0.write_all(now)?;
            current.1 += now.len() as u64;
            if !later.is_empty() {
                self.rotate()?;
            }
            bytes = later;
        }
        Ok(())
    }

    fn open(&mut self) -> io::Result<&mut (File, u64)> {
        let opened = match self.current.take() {
            Some(current) => current,
            None => {
                let path = file(&self.directory, 0);
                let opened = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
                let size = opened.metadata()?.len();
                (opened, size)
            }
        };
        Ok(self.current.insert(opened))
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.current = None;
        if self.files_max == 1 {
            return fs::remove_file(file(&self.directory, 0));
        }
        for n in (0..self.files_max - 1).rev() {
            match fs::rename(file(&self.directory, n), file(&self.directory, n + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(directory: &Path) -> Vec<String> {
        files(directory).iter().map(|path| fs::read_to_string(path).unwrap()).collect()
    }

    #[test]
    fn files_are_bounded_in_size_and_number_and_cut_between_lines() {
        let directory = tempfile::tempdir().unwrap();
        let mut logs = Logs::new(directory.path(), 20, 3);
        for n in 0..10 {
            logs.write(format!("line {n}\nanother {n}\n").as_bytes());
        }
        let content = content(directory.path());
        assert_eq!(content.len(), 3);
        assert!(content.iter().all(|c| c.len() <= 20 && c.ends_with('\n')), "{content:?}");
        assert!(content[2].ends_with("another 9\n"));
        assert_eq!(logs.dropped_lines(), 0);
    }

    #[test]
    fn a_line_longer_than_a_file_is_cut() {
        let directory = tempfile::tempdir().unwrap();
        let mut logs = Logs::new(directory.path(), 8, 2);
        logs.write(b"abcdefghijklmnopqrst\n");
        assert_eq!(content(directory.path()), ["ijklmnop", "qrst\n"]);
    }

    #[test]
    fn what_can_not_be_written_is_counted_and_told_later() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("log");
        let mut logs = Logs::new(&directory, 1000, 3);
        logs.write(b"one\ntwo\n");
        logs.write(b"three\n");
        assert_eq!(logs.dropped_lines(), 3);
        fs::create_dir(&directory).unwrap();
        logs.write(b"four\n");
        assert_eq!(content(&directory), ["drover-shim: 3 log lines were dropped here\nfour\n"]);
        assert_eq!(logs.dropped_lines(), 3);
    }
}
