//! Until when this node may start something: the deadline of its session, for those who start.

use crate::clock;
use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// The session's deadline, in nanoseconds on CLOCK_BOOTTIME; 0 while there was no session.
#[derive(Debug, Default)]
pub struct Deadline(AtomicU64);

impl Deadline {
    /// A renewal was granted: the session lives for `ttl` from when the heartbeat was sent. Never shortens.
    pub fn extend(&self, sent_ns: u64, ttl: Duration) {
        let until = sent_ns.saturating_add(u64::try_from(ttl.as_nanos()).unwrap_or(u64::MAX));
        self.0.fetch_max(until, Ordering::AcqRel);
    }

    /// The deadline.
    #[must_use]
    pub fn ns(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Whether it has passed: then nothing new is claimed or started.
    #[must_use]
    pub fn has_passed(&self) -> bool {
        clock::boottime_ns() >= self.ns()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_from_when_the_heartbeat_was_sent_and_never_goes_back() {
        let deadline = Deadline::default();
        assert!(deadline.has_passed());
        let now = clock::boottime_ns();
        deadline.extend(now, Duration::from_secs(60));
        deadline.extend(now - 1_000_000_000, Duration::from_secs(10));
        assert_eq!(deadline.ns(), now + 60_000_000_000);
        assert!(!deadline.has_passed());
    }
}
