//! Until when this node may claim and start something: the deadline of its session.

use crate::{clock, mutant};
use std::{
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// The session that this node has, or had last.
#[derive(Debug, Default)]
struct Granted {
    /// Its id.
    session: String,
    /// Until when it lives, in nanoseconds on CLOCK_BOOTTIME; 0 while there was none.
    until_ns: u64,
    /// The time to live that it was granted last.
    ttl: Duration,
    /// Whether the claims that it has are known here: those of the session before are gone.
    settled: bool,
    /// Rises with every change that others wait for.
    number: u64,
}

/// What a node knows of the life of its session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The session's id; empty while there was none.
    pub session: String,
    /// Until when it lives, in nanoseconds on CLOCK_BOOTTIME; 0 while there was none.
    pub until_ns: u64,
    /// The time to live that it was granted last.
    pub ttl: Duration,
}

/// The session's deadline. A session gives no life to what was claimed under another.
#[derive(Debug, Default)]
pub struct Deadline {
    granted: Mutex<Granted>,
    changed: Condvar,
}

impl Deadline {
    fn lock(&self) -> MutexGuard<'_, Granted> {
        // Nothing panics while it holds the lock; should it ever, the value is still whole.
        self.granted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session was opened or resumed: it lives for `ttl` from when it was asked for.
    pub fn welcome(&self, session: &str, sent_ns: u64, ttl: Duration) {
        let mut granted = self.lock();
        if granted.session != session {
            *granted = Granted { session: session.to_owned(), number: granted.number, ..Granted::default() };
        }
        granted.extend(sent_ns, ttl);
        self.changed.notify_all();
    }

    /// A renewal was granted: the session lives for `ttl` from when the heartbeat was sent. Never shortens; void for a
    /// session that was replaced.
    pub fn extend(&self, session: &str, sent_ns: u64, ttl: Duration) {
        let mut granted = self.lock();
        if granted.session == session {
            granted.extend(sent_ns, ttl);
            self.changed.notify_all();
        }
    }

    /// Lets whoever waits for a change look again.
    pub fn announce(&self) {
        self.lock().number += 1;
        self.changed.notify_all();
    }

    /// Waits until something has changed since number `seen`, but no longer than this; blocks its thread.
    #[must_use]
    pub fn changed(&self, seen: &mut u64, longest: Duration) -> Grant {
        let unchanged = |granted: &mut Granted| granted.number == *seen;
        let waited = self.changed.wait_timeout_while(self.lock(), longest, unchanged);
        let (granted, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *seen = granted.number;
        granted.grant()
    }

    /// What is known of the session's life.
    #[must_use]
    pub fn grant(&self) -> Grant {
        self.lock().grant()
    }

    /// The set of claims of a session was applied.
    pub fn settle(&self, session: &str) {
        let mut granted = self.lock();
        granted.settled |= granted.session == session;
    }

    /// Whether this is the session that the node has, or had last.
    #[must_use]
    pub fn is(&self, session: &str) -> bool {
        self.lock().session == session
    }

    /// Whether it has passed: then nothing new is claimed or started.
    #[must_use]
    pub fn has_passed(&self) -> bool {
        clock::boottime_ns() >= self.lock().until_ns
    }

    /// How much of it is left; zero once it has passed.
    #[must_use]
    pub fn left(&self) -> Duration {
        Duration::from_nanos(self.lock().until_ns.saturating_sub(clock::boottime_ns()))
    }

    /// The session's id, and until when it lives as far as is known, in nanoseconds on CLOCK_BOOTTIME.
    #[must_use]
    pub fn granted(&self) -> (String, u64) {
        let granted = self.lock();
        (granted.session.clone(), granted.until_ns)
    }

    /// Until when what is claimed may be started, in nanoseconds on CLOCK_BOOTTIME; `None` while nothing may, which is so
    /// too while it is not known here what of it the session still has.
    #[must_use]
    pub fn start_until_ns(&self) -> Option<u64> {
        let granted = self.lock();
        let settled = granted.settled || mutant::on(mutant::name::START_UNDER_A_LOST_SESSION);
        (settled && clock::boottime_ns() < granted.until_ns).then_some(granted.until_ns)
    }
}

impl Granted {
    fn extend(&mut self, sent_ns: u64, ttl: Duration) {
        let until_ns = sent_ns.saturating_add(u64::try_from(ttl.as_nanos()).unwrap_or(u64::MAX));
        self.until_ns = self.until_ns.max(until_ns);
        self.ttl = ttl;
        self.number += 1;
    }

    fn grant(&self) -> Grant {
        Grant { session: self.session.clone(), until_ns: self.until_ns, ttl: self.ttl }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn it_counts_from_when_the_heartbeat_was_sent_and_never_goes_back() {
        let deadline = Deadline::default();
        assert!(deadline.has_passed());
        let now = clock::boottime_ns();
        deadline.welcome("s", now, SECOND * 60);
        deadline.extend("s", now - 1_000_000_000, SECOND * 10);
        deadline.settle("s");
        assert_eq!(deadline.start_until_ns(), Some(now + 60_000_000_000));
        assert!(!deadline.has_passed());
        deadline.welcome("s", now + 1, SECOND * 60);
        assert_eq!(deadline.start_until_ns(), Some(now + 60_000_000_001), "resumed: its claims are what they were");
    }

    #[test]
    fn nothing_starts_under_a_session_whose_claims_are_not_known_yet() {
        let deadline = Deadline::default();
        let now = clock::boottime_ns();
        deadline.welcome("s", now, SECOND * 60);
        assert!(!deadline.has_passed());
        assert_eq!(deadline.start_until_ns(), None);
        deadline.settle("s");
        deadline.welcome("t", now, SECOND * 50);
        // What was on its way for the one before.
        deadline.settle("s");
        deadline.extend("s", now, SECOND * 70);
        assert_eq!(deadline.start_until_ns(), None);
        deadline.settle("t");
        assert_eq!(
            deadline.start_until_ns(),
            Some(now + 50_000_000_000),
            "the next session is no longer for the last one"
        );
        assert!(deadline.is("t") && !deadline.is("s"));
    }
}
