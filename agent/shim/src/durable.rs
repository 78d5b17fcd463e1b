//! Small files that survive a crash whole or not at all: one line of JSON, then a line with its CRC-32.
//!
//! Written to a temporary file, synced, renamed, and the directory synced, so that after any crash a reader finds the
//! old content or the new one. What matters only as long as the host runs is not synced ([`place`]). Each file has one
//! writer at a time; who that is stands with the file's type.

use serde::{Serialize, de::DeserializeOwned};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

/// Largest file that is read, in bytes.
const BYTES_MAX: u64 = 4 << 20;

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not exist.
    #[error("{0} does not exist")]
    Missing(PathBuf),
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its content is not what was once written.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// A later version has written it, and what that means by it is not known here.
    #[error("{path} has format {format}, and this program reads up to {known}: use the version that has written it")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u32,
        /// The highest that is known.
        known: u32,
    },
}

impl Error {
    /// True when the content, not the access, is at fault: such a file is set aside.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }
}

/// Reads a file that [`write`] wrote.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    parse(path, &content(path)?)
}

/// What stands in a file, if its checksum is right.
pub(crate) fn content(path: &Path) -> Result<String, Error> {
    let damaged = |what: String| Error::Damaged { path: path.to_owned(), what };
    let io = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => Error::Missing(path.to_owned()),
        _ => Error::Io { path: path.to_owned(), source },
    };
    let length = fs::metadata(path).map_err(io)?.len();
    if length > BYTES_MAX {
        return Err(damaged(format!("{length} bytes are more than the {BYTES_MAX} that are ever written")));
    }
    let bytes = fs::read(path).map_err(io)?;
    let text = std::str::from_utf8(&bytes).map_err(|e| damaged(e.to_string()))?;
    let (body, sum) = text
        .strip_suffix('\n')
        .and_then(|t| t.rsplit_once('\n'))
        .ok_or_else(|| damaged("the line with the checksum is missing".to_owned()))?;
    let expected = checksum(body.as_bytes());
    if sum != expected {
        return Err(damaged(format!(
            "its checksum line is \"{}\", its content has \"{expected}\"",
            sum.escape_debug()
        )));
    }
    Ok(body.to_owned())
}

/// The value that stands in a file's content.
pub(crate) fn parse<T: DeserializeOwned>(path: &Path, content: &str) -> Result<T, Error> {
    serde_json::from_str(content).map_err(|e| Error::Damaged { path: path.to_owned(), what: e.to_string() })
}

/// Writes a file so that a crash leaves the old content or the new one. Returns after the disk has it.
pub fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    put(path, value, true)
}

/// Writes a file so that the crash of any process leaves the old content or the new one. After a crash of the host, when
/// nothing runs any more that it tells of, it may be cut off, which is noticed when it is read. A start waits for no disk
/// that way where it need not: many at once would queue for it.
pub fn place<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    put(path, value, false)
}

fn put<T: Serialize>(path: &Path, value: &T, sync: bool) -> Result<(), Error> {
    let io = |source: io::Error| Error::Io { path: path.to_owned(), source };
    let body = serde_json::to_string(value).map_err(|e| io(io::Error::other(e)))?;
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io(io::Error::other("names no file")));
    };
    let temporary = directory.join(temporary(&name.to_string_lossy(), std::process::id()));
    let content = format!("{body}\n{}\n", checksum(body.as_bytes()));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(content.as_bytes())?;
        if sync {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)?;
        if sync { File::open(directory)?.sync_all() } else { Ok(()) }
    })();
    if written.is_err() {
        // Best effort: what stays is overwritten by the next attempt.
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(io)
}

/// A file that a write has left behind which did not come to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// The file.
    pub path: PathBuf,
    /// Process that wrote it.
    pub writer: i32,
}

/// What writes have left behind in a directory. A write that is under way shows here too.
pub fn leftovers(directory: &Path) -> io::Result<Vec<Leftover>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if let Some(writer) = entry.file_name().to_str().and_then(writer) {
            found.push(Leftover { path: entry.path(), writer });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn temporary(name: &str, writer: u32) -> String {
    format!(".{name}.{writer}.tmp")
}

/// Who wrote the temporary file of this name.
fn writer(name: &str) -> Option<i32> {
    let (file, pid) = name.strip_prefix('.')?.strip_suffix(".tmp")?.rsplit_once('.')?;
    pid.parse().ok().filter(|pid| *pid > 0 && !file.is_empty())
}

fn checksum(bytes: &[u8]) -> String {
    format!("crc32:{:08x}", crc32fast::hash(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("value");
        assert!(matches!(read::<Vec<u32>>(&path), Err(Error::Missing(_))));
        write(&path, &vec![1_u32, 2, 300]).unwrap();
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), [1, 2, 300]);
        let good = fs::read(&path).unwrap();
        let put = |bytes: &[u8]| File::create(&path).unwrap().write_all(bytes).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            put(&bad);
            let error = read::<Vec<u32>>(&path).unwrap_err();
            assert!(error.is_damage() && error.to_string().contains("value"), "bit {bit}: {error}");
        }
        for length in 0..good.len() {
            put(&good[..length]);
            assert!(read::<Vec<u32>>(&path).unwrap_err().is_damage(), "cut to {length}");
        }
    }

    #[test]
    fn what_a_killed_writer_left_is_known_by_its_name() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["value", ".value.tmp", ".value.x.tmp", "value.7.tmp", "..8.tmp", ".value.0.tmp"] {
            File::create(directory.path().join(name)).unwrap();
        }
        let left = directory.path().join(temporary("value", 4711));
        File::create(&left).unwrap();
        assert_eq!(leftovers(directory.path()).unwrap(), [Leftover { path: left, writer: 4711 }]);
    }

    #[test]
    fn nothing_but_the_file_stays_behind() {
        let directory = tempfile::tempdir().unwrap();
        for n in 0..3 {
            write(&directory.path().join("value"), &n).unwrap();
        }
        let names: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["value"]);
    }
}
