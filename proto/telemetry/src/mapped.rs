//! Counters of one life of a span source, in shared mapped memory.
//!
//! A store into the mapping is in the page cache at once, so the counters survive `kill -9` (not a loss of power; blocks
//! reserved with fsync bound that later). Owns: the file `life` of a life's directory, and the lock on it that tells others
//! that this life still goes on. Must never: be read or written but through this module.
#![allow(
    unsafe_code,
    reason = "a mapping is raw memory; every access is an aligned atomic or happens before it is shared"
)]

use memmap2::MmapMut;
use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

const MAGIC: u64 = u64::from_le_bytes(*b"DRVSPAN1");
/// The resource begins here: length (4 bytes), CRC-32 (4 bytes), protobuf.
const RESOURCE_AT: usize = 256;
const BYTES_MIN: usize = 4096;
/// Largest resource that is kept, in bytes.
pub(crate) const RESOURCE_BYTES_MAX: usize = 64 << 10;
/// Name of the file within a life's directory.
pub(crate) const FILE: &str = "life";

// Places of the words, in units of 8 bytes.
const WORD_MAGIC: usize = 0;
const WORD_ISSUED: usize = 1;
const WORD_SAMPLED_OUT: usize = 2;
const WORD_ACTIVE: usize = 3;
const WORD_ENDED: usize = 4;
const WORD_SLOTS: [usize; 2] = [8, 16];

/// How far a life's spans have come. Replaced as a whole: a crash sees the old one or the new one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Everything up to this sequence is acknowledged, rejected or given up.
    pub settled_through: u64,
    /// Spans acknowledged.
    pub acknowledged: u64,
    /// Spans given up, whatever the reason.
    pub given_up: u64,
    /// Spans that the receiver said it would not take, out of batches that it took.
    pub rejected: u64,
}

impl Progress {
    fn on_disk(self, issued: u64, ended: bool) -> CountersOnDisk {
        let Self { settled_through, acknowledged, given_up, rejected } = self;
        CountersOnDisk { issued, acknowledged, rejected, given_up, settled_through, ended }
    }
}

/// Counters of a life, as its file tells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CountersOnDisk {
    /// Spans that it numbered.
    pub issued: u64,
    /// Spans acknowledged.
    pub acknowledged: u64,
    /// Spans rejected out of accepted batches.
    pub rejected: u64,
    /// Spans given up.
    pub given_up: u64,
    /// Every span up to this one is settled.
    pub settled_through: u64,
    /// Whether it ended in order.
    pub ended: bool,
}

/// The counters.
#[derive(Debug)]
pub(crate) struct Counters {
    map: MmapMut,
    /// Held for its lock; none for counters that live in memory only.
    lock: Option<File>,
}

impl Counters {
    /// Makes the file of a new life. `AlreadyExists` when another process took the directory for an abandoned one in the
    /// moment before it was locked: try again with another name.
    pub fn create(directory: &Path, resource: &[u8]) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(directory.join(FILE))?;
        let taken = || io::Error::new(io::ErrorKind::AlreadyExists, "taken by another process");
        file.try_lock().map_err(|_| taken())?;
        if file.metadata()?.nlink() == 0 {
            return Err(taken());
        }
        let mut bytes = vec![0; RESOURCE_AT];
        bytes[..8].copy_from_slice(&MAGIC.to_ne_bytes());
        bytes.extend_from_slice(&u32::try_from(resource.len()).map_err(io::Error::other)?.to_le_bytes());
        bytes.extend_from_slice(&crc32fast::hash(resource).to_le_bytes());
        bytes.extend_from_slice(resource);
        bytes.resize(bytes.len().max(BYTES_MIN), 0);
        // Written, not only extended: a page without a block behind it would kill the process when the disk is full.
        file.write_all(&bytes)?;
        Self::map(file)
    }

    /// Opens the file of an earlier life, with its resource if that is still readable. `WouldBlock` when that life still
    /// goes on, `InvalidData` when the file was never completed.
    pub fn open(directory: &Path) -> io::Result<(Self, Option<Vec<u8>>)> {
        let mut file = OpenOptions::new().read(true).write(true).open(directory.join(FILE))?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => io::Error::from(io::ErrorKind::WouldBlock),
            TryLockError::Error(error) => error,
        })?;
        let mut bytes = Vec::new();
        io::Read::by_ref(&mut file).take((RESOURCE_AT + 8 + RESOURCE_BYTES_MAX) as u64).read_to_end(&mut bytes)?;
        if bytes.len() < BYTES_MIN || bytes[..8] != MAGIC.to_ne_bytes() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the life was never begun"));
        }
        file.rewind()?;
        Ok((Self::map(file)?, resource_in(&bytes[RESOURCE_AT..])))
    }

    /// Counters that a crash forgets, for when there is no disk to keep them on.
    pub fn in_memory() -> io::Result<Self> {
        let counters = Self { map: MmapMut::map_anon(BYTES_MIN)?, lock: None };
        counters.word(WORD_MAGIC).store(MAGIC, Ordering::Relaxed);
        Ok(counters)
    }

    fn map(file: File) -> io::Result<Self> {
        // SAFETY: the file is ours alone (locked, in a directory of our own) and is never shortened, so every page of the
        // mapping stays backed; other processes that keep to the lock don't write to it.
        let map = unsafe { MmapMut::map_mut(&file)? };
        Ok(Self { map, lock: Some(file) })
    }

    /// Whether they are kept in a file.
    pub fn on_disk(&self) -> bool {
        self.lock.is_some()
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < BYTES_MIN / 8);
        // SAFETY: the mapping is page-aligned and at least BYTES_MIN long (checked above and by both constructors), lives as
        // long as `self`, and these words are reached through atomics only.
        unsafe { AtomicU64::from_ptr(self.map.as_ptr().cast_mut().cast::<u64>().add(index)) }
    }

    /// Takes the next sequence; the first is 1.
    pub fn issue(&self) -> u64 {
        self.word(WORD_ISSUED).fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Highest sequence taken.
    pub fn issued(&self) -> u64 {
        self.word(WORD_ISSUED).load(Ordering::Relaxed)
    }

    /// Raises the highest sequence, when the spool proves that more were taken.
    pub fn raise_issued(&self, to: u64) {
        self.word(WORD_ISSUED).fetch_max(to, Ordering::Relaxed);
    }

    /// Counts a span that was left out by sampling.
    pub fn count_sampled_out(&self) {
        self.word(WORD_SAMPLED_OUT).fetch_add(1, Ordering::Relaxed);
    }

    /// Spans left out by sampling.
    pub fn sampled_out(&self) -> u64 {
        self.word(WORD_SAMPLED_OUT).load(Ordering::Relaxed)
    }

    /// The life has ended in order: all that it numbered was written to the spool or counted as given up.
    pub fn set_ended(&self) {
        self.word(WORD_ENDED).store(1, Ordering::Release);
    }

    /// Whether the life has ended in order.
    pub fn ended(&self) -> bool {
        self.word(WORD_ENDED).load(Ordering::Acquire) == 1
    }

    /// How far the spans have come.
    pub fn progress(&self) -> Progress {
        loop {
            let active = self.word(WORD_ACTIVE).load(Ordering::Acquire);
            let slot = WORD_SLOTS[(active & 1) as usize];
            let read = |i: usize| self.word(slot + i).load(Ordering::Relaxed);
            let progress =
                Progress { settled_through: read(0), acknowledged: read(1), given_up: read(2), rejected: read(3) };
            std::sync::atomic::fence(Ordering::Acquire);
            // The slot read is only written again after `active` has moved on.
            if self.word(WORD_ACTIVE).load(Ordering::Relaxed) == active {
                return progress;
            }
        }
    }

    /// Replaces the progress. One writer at a time: the spool's lock sees to it.
    pub fn set_progress(&self, progress: Progress) {
        let next = self.word(WORD_ACTIVE).load(Ordering::Relaxed) + 1;
        let slot = WORD_SLOTS[(next & 1) as usize];
        std::sync::atomic::fence(Ordering::Release);
        let values = [progress.settled_through, progress.acknowledged, progress.given_up, progress.rejected];
        for (i, value) in values.into_iter().enumerate() {
            self.word(slot + i).store(value, Ordering::Relaxed);
        }
        self.word(WORD_ACTIVE).store(next, Ordering::Release);
    }
}

/// Reads the counters of a life without a lock or a mapping. One that goes on may change them meanwhile: they then stand as
/// they were at one moment or another.
pub(crate) fn peek(file: &Path) -> io::Result<CountersOnDisk> {
    let mut bytes = Vec::new();
    File::open(file)?.take(BYTES_MIN as u64).read_to_end(&mut bytes)?;
    if bytes.len() < BYTES_MIN || bytes[..8] != MAGIC.to_ne_bytes() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it does not begin as one of these files"));
    }
    let (words, _) = bytes.as_chunks::<8>();
    let word = |index: usize| words.get(index).map_or(0, |word| u64::from_ne_bytes(*word));
    let slot = WORD_SLOTS[(word(WORD_ACTIVE) & 1) as usize];
    let progress = Progress {
        settled_through: word(slot),
        acknowledged: word(slot + 1),
        given_up: word(slot + 2),
        rejected: word(slot + 3),
    };
    Ok(progress.on_disk(word(WORD_ISSUED), word(WORD_ENDED) == 1))
}

fn resource_in(bytes: &[u8]) -> Option<Vec<u8>> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (crc, rest) = rest.split_first_chunk::<4>()?;
    let resource = rest.get(..u32::from_le_bytes(*length) as usize)?;
    (crc32fast::hash(resource) == u32::from_le_bytes(*crc)).then(|| resource.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_there_again_after_reopening_and_a_living_life_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let counters = Counters::create(directory.path(), b"resource").unwrap();
        assert_eq!((counters.issue(), counters.issue(), counters.issued()), (1, 2, 2));
        counters.count_sampled_out();
        let progress = Progress { settled_through: 4, acknowledged: 3, given_up: 2, rejected: 1 };
        counters.set_progress(Progress::default());
        counters.set_progress(progress);
        assert_eq!(Counters::open(directory.path()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(counters);
        let (counters, resource) = Counters::open(directory.path()).unwrap();
        assert_eq!(resource.as_deref(), Some(&b"resource"[..]));
        assert_eq!((counters.issued(), counters.sampled_out(), counters.progress()), (2, 1, progress));
        assert!(!counters.ended());
        let seen = peek(&directory.path().join(FILE)).unwrap();
        assert_eq!(seen, progress.on_disk(2, false), "and without a lock");
    }

    #[test]
    fn a_damaged_resource_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        drop(Counters::create(directory.path(), b"resource").unwrap());
        let path = directory.path().join(FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[RESOURCE_AT + 9] ^= 1;
        OpenOptions::new().write(true).open(&path).unwrap().write_all(&bytes).unwrap();
        assert_eq!(Counters::open(directory.path()).unwrap().1, None);
        OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
        assert_eq!(Counters::open(directory.path()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
