//! What has happened in a run: a hash over all of it, and the last lines in words.

use std::collections::VecDeque;

/// The trace of a run. Two runs of one seed have the same hash.
#[derive(Debug)]
pub struct Trace {
    hash: u64,
    last: VecDeque<String>,
    keep: usize,
    print: bool,
}

impl Trace {
    /// Keeps the last `keep` lines; prints each at once if asked to.
    #[must_use]
    pub fn new(keep: usize, print: bool) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, last: VecDeque::new(), keep, print }
    }

    /// Something has happened `at_ms` after the begin.
    pub fn note(&mut self, at_ms: u64, what: &str, bytes: &[u8]) {
        let all = at_ms.to_le_bytes();
        for byte in all.iter().chain(what.as_bytes()).chain(bytes) {
            self.hash = (self.hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    /// As [`Trace::note`], kept in words too.
    pub fn tell(&mut self, at_ms: u64, what: impl FnOnce() -> String) {
        let text = what();
        self.note(at_ms, &text, &[]);
        let line = format!("{:>7}.{:03}  {text}", at_ms / 1000, at_ms % 1000);
        if self.print {
            println!("{line}");
        }
        if self.last.len() >= self.keep {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }

    /// Hash of everything so far.
    #[must_use]
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// The last lines.
    pub fn last(&self) -> impl Iterator<Item = &str> {
        self.last.iter().map(String::as_str)
    }
}
