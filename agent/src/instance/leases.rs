//! The files by which servers end with their lease (`on_lease_lost = "stop"`): which instance hangs on which session, and
//! what its shim is to do when.
//!
//! Owns: which instances those are, and the thread that writes their files ([`keep`]): whenever a renewal of the session was
//! acknowledged, and on no thread that heartbeats or supervisors need, since a disk may hang. An instance hangs on the
//! session under which its claim stood last: it goes on with that session though its claim be gone, which is no loss of the
//! lease; with the next session it only goes on when that has claimed it again. Must never: decide that a server ends; that
//! is its shim's, by the clock ([`drover_shim::lease`]).

use super::{
    claim::Claim,
    context::Context,
    machine::Machine,
    session::{Deadline, Grant},
};
use drover_shim::{lease::Times, record::Directory};
use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// Shares of a lease's time to live that may go by until its end: without new requests, between SIGTERM and SIGKILL, and for
/// SIGKILL to take effect. A deployment may ask for less of the first two. A heartbeat that goes unanswered is given up when
/// 40 % are left, and the next coordinator needs a moment: what can't be taken back begins later than that.
const DRAIN: f64 = 0.25;
const GRACE: f64 = 0.15;
const SPARE: f64 = 0.05;

/// Longest rest of the thread, in case it was not told.
const REST: Duration = Duration::from_secs(1);

/// The instances that end with their lease.
#[derive(Debug, Default)]
pub struct Leases(Mutex<BTreeMap<String, Leased>>);

#[derive(Debug)]
struct Leased {
    /// Session under which its claim stood last.
    session: String,
    directory: Directory,
    drain: Duration,
    grace: Duration,
}

impl Leased {
    fn times(&self, grant: &Grant) -> Option<Times> {
        (self.session == grant.session).then(|| times(grant, self.drain, self.grace))
    }
}

impl Leases {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Leased>> {
        // Nothing panics while it holds the lock; should it ever, the map is still whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The claim of an instance stands under this session. Of one that does not end with its lease nothing is kept.
    pub fn cover(&self, context: &Context, session: &str, claim: &Claim, directory: Directory) {
        if !claim.ends_with_lease() {
            return;
        }
        let policy = context.policy(&claim.spec);
        let [drain, grace] = [policy.drain_ms, policy.grace_ms].map(Duration::from_millis);
        let leased = Leased { session: session.to_owned(), directory, drain, grace };
        let before = self.lock().insert(claim.instance.clone(), leased);
        // Of another session the file tells the end of that one.
        if before.is_none_or(|before| before.session != session) {
            context.session.announce();
        }
    }

    /// The instance is about to be removed here: its file is written no more.
    pub fn forget(&self, instance: &str) {
        self.lock().remove(instance);
    }

    /// What the shim of an instance is told when it is started now; `None` when no claim of the session covers it.
    #[must_use]
    pub fn of(&self, instance: &str, session: &Deadline) -> Option<Times> {
        self.lock().get(instance)?.times(&session.grant())
    }

    /// Writes the files of all that hang on a session.
    fn write(&self, machine: &dyn Machine, grant: &Grant) {
        for (instance, leased) in self.lock().iter() {
            let Some(times) = leased.times(grant) else { continue };
            match machine.keep_lease(&leased.directory, times) {
                Ok(()) => {}
                // It was not started yet.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::error!(
                    instance,
                    %error,
                    "the renewal of its lease can't be written down: its shim ends it when the time is over that it knows of"
                ),
            }
        }
    }
}

/// Keeps the files up to date, for as long as this program lives.
///
/// # Errors
/// There is no thread for it.
pub fn keep(context: Arc<Context>) -> io::Result<()> {
    let work = move || {
        let mut seen = 0;
        loop {
            let grant = context.session.changed(&mut seen, REST);
            context.leases.write(context.machine.as_ref(), &grant);
        }
    };
    thread::Builder::new().name("leases".to_owned()).spawn(work).map(drop)
}

/// PURE. What is to happen when, should this be the last renewal.
fn times(grant: &Grant, drain: Duration, grace: Duration) -> Times {
    let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let before = |at_ns: u64, time: Duration| at_ns.saturating_sub(ns(time));
    let kill_ns = before(grant.until_ns, grant.ttl.mul_f64(SPARE));
    let term_ns = before(kill_ns, grace.min(grant.ttl.mul_f64(GRACE)));
    let drain_ns = before(term_ns, drain.min(grant.ttl.mul_f64(DRAIN)));
    Times { drain_ns, term_ns, kill_ns, until_ns: grant.until_ns }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn all_of_it_fits_into_the_lease_and_asks_for_no_more_than_the_deployment_does() {
        let grant = Grant { session: "s".to_owned(), until_ns: 100 * SECOND, ttl: Duration::from_secs(10) };
        let of = |drain_ms, grace_ms| {
            let times = times(&grant, Duration::from_millis(drain_ms), Duration::from_millis(grace_ms));
            [times.drain_ns, times.term_ns, times.kill_ns, times.until_ns].map(|ns| ns / 1_000_000)
        };
        assert_eq!(of(30_000, 10_000), [95_500, 98_000, 99_500, 100_000]);
        assert_eq!(of(0, 700), [98_800, 98_800, 99_500, 100_000]);
        let short = Grant { until_ns: 1, ..grant.clone() };
        assert_eq!(times(&short, Duration::MAX, Duration::MAX).drain_ns, 0);
    }

    #[test]
    fn one_that_missed_two_heartbeats_and_moved_to_another_coordinator_in_time_is_not_asked_to_end() {
        let ttl = Duration::from_secs(10);
        let grant = Grant { session: "s".to_owned(), until_ns: 10 * SECOND, ttl };
        let asked = Duration::from_nanos(times(&grant, Duration::MAX, Duration::MAX).term_ns);
        // Sent 3 s after the last one that was answered, and given up 3 s later; then the longest wait for a welcome.
        let moved = Duration::from_secs(3) + ttl.mul_f64(0.3) + (ttl - Duration::from_secs(6)) / 4;
        assert!(asked > moved, "{asked:?} {moved:?}");
    }
}
