//! PURE: what was given up, in ranges with their reason. Bounded: beyond that the oldest ranges are forgotten, and only their
//! number is kept.

use std::collections::VecDeque;

/// Most ranges that are remembered.
pub(crate) const RANGES_MAX: usize = 256;

/// Why spans were given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The spool had reached its bound; the oldest went.
    SpoolFull,
    /// The disk was so slow that the queue in memory was full.
    QueueFull,
    /// The disk refused to write.
    Disk,
    /// The span was larger than the spool takes.
    TooLarge,
    /// The spool's file was damaged or gone when it was read.
    Damaged,
    /// The receiver refused the batch for good.
    Refused,
    /// The process ended before they were written.
    Crashed,
}

/// A range of spans that were given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GivenUp {
    /// Lowest sequence.
    pub first: u64,
    /// Highest sequence.
    pub last: u64,
    /// How many of the range: fewer than its length when some of it had been settled before.
    pub spans: u64,
    /// Why.
    pub reason: Reason,
}

/// The ranges of one life.
#[derive(Debug, Default)]
pub(crate) struct Log {
    ranges: VecDeque<GivenUp>,
    forgotten: u64,
}

impl Log {
    /// Adds a range, joined to the last one when it follows on for the same reason.
    pub fn add(&mut self, range: GivenUp) {
        if let Some(last) = self.ranges.back_mut()
            && last.reason == range.reason
            && last.last + 1 == range.first
        {
            last.last = range.last;
            last.spans += range.spans;
            return;
        }
        if self.ranges.len() == RANGES_MAX {
            self.forgotten += self.ranges.pop_front().map_or(0, |oldest| oldest.spans);
        }
        self.ranges.push_back(range);
    }

    /// The ranges remembered, oldest first.
    pub fn ranges(&self) -> Vec<GivenUp> {
        self.ranges.iter().copied().collect()
    }

    /// Spans in ranges that are no longer remembered.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_follow_on_are_joined_and_the_oldest_are_only_counted() {
        let range = |first, reason| GivenUp { first, last: first + 1, spans: 2, reason };
        let mut log = Log::default();
        log.add(range(1, Reason::SpoolFull));
        log.add(range(3, Reason::SpoolFull));
        assert_eq!(log.ranges(), [GivenUp { first: 1, last: 4, spans: 4, reason: Reason::SpoolFull }]);
        log.add(range(5, Reason::Disk));
        for i in 0..RANGES_MAX as u64 {
            log.add(range(10 + i * 3, Reason::Disk));
        }
        assert_eq!((log.ranges().len(), log.forgotten()), (RANGES_MAX, 6));
    }
}
