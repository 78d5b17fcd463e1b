//! Counts: requests in flight by instance, behind the choice, and what was answered, for the metrics.

use super::{
    pick::{self, Load},
    routes::Backend,
};
use axum::http::StatusCode;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

/// What the gateway has done so far; everything but `in_flight` only rises.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Answers by the first digit of their status, 1 to 5; place 0 is unused.
    pub answers: [u64; 6],
    /// Requests handed to an instance and not finished.
    pub in_flight: u64,
    /// Second attempts.
    pub retries: u64,
    /// Answers that broke off after they had begun.
    pub broken: u64,
    /// Answers whose client left before the end.
    pub abandoned: u64,
}

/// How long a server without an owner is left out after it could not be reached: nobody vouches for it, and nobody will say
/// that its host is gone.
const LEFT_OUT: Duration = Duration::from_secs(5);
/// An attempt that took longer and did not even reach the host is not made again while it is left out, though there is nothing
/// else to try: an answer at once is worth more than another wait.
const SLOW: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
struct Refused {
    at: Instant,
    slow: bool,
}

#[derive(Debug, Default)]
struct Inner {
    /// Only instances with at least one, so that gone ones leave nothing behind.
    in_flight: Mutex<HashMap<String, u64>>,
    /// Servers without an owner that could not be reached, for as long as they are left out.
    refused: Mutex<HashMap<String, Refused>>,
    answers: [AtomicU64; 6],
    retries: AtomicU64,
    broken: AtomicU64,
    abandoned: AtomicU64,
}

/// A cheap handle on the counts.
#[derive(Debug, Clone, Default)]
pub(super) struct Loads(Arc<Inner>);

/// A place taken at an instance; given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    loads: Loads,
    instance: String,
}

impl Loads {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.0.in_flight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Chooses an instance and counts the request there, in one step: of two requests at once the second sees the first.
    pub(super) fn take(&self, backends: &[&Backend], not: Option<usize>, random: u64) -> Option<(usize, Place)> {
        let open = self.open(backends);
        let mut in_flight = self.lock();
        let load = |at: &usize| {
            let b = backends[*at];
            Load { in_flight: in_flight.get(&b.instance).copied().unwrap_or(0), slots: b.slots }
        };
        let not = not.and_then(|not| open.iter().position(|at| *at == not));
        let at = open[pick::pick(&open.iter().map(load).collect::<Vec<_>>(), not, random)?];
        let instance = backends[at].instance.clone();
        *in_flight.entry(instance.clone()).or_default() += 1;
        Some((at, Place { loads: self.clone(), instance }))
    }

    /// Places of those that may be tried now.
    fn open(&self, backends: &[&Backend]) -> Vec<usize> {
        let refused = self.0.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let last = |b: &Backend| {
            let last = refused.get(&b.instance).filter(|last| last.at.elapsed() < LEFT_OUT);
            last.filter(|_| b.unowned)
        };
        let places = |keep: &dyn Fn(&Backend) -> bool| {
            backends.iter().enumerate().filter(|(_, b)| keep(b)).map(|(at, _)| at).collect::<Vec<_>>()
        };
        let open = places(&|b| last(b).is_none());
        if open.is_empty() { places(&|b| last(b).is_none_or(|last| !last.slow)) } else { open }
    }

    /// A server without an owner could not be reached, and to find that out took so long.
    pub(super) fn refused(&self, instance: &str, took: Duration) {
        let mut refused = self.0.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.retain(|_, last| last.at.elapsed() < LEFT_OUT);
        refused.insert(instance.to_owned(), Refused { at: Instant::now(), slow: took >= SLOW });
    }

    pub(super) fn answered(&self, status: StatusCode) {
        let class = usize::from(status.as_u16() / 100).min(5);
        self.0.answers[class].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn retried(&self) {
        self.0.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn broke(&self) {
        self.0.broken.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn was_abandoned(&self) {
        self.0.abandoned.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            answers: std::array::from_fn(|class| read(&self.0.answers[class])),
            in_flight: self.lock().values().sum(),
            retries: read(&self.0.retries),
            broken: read(&self.0.broken),
            abandoned: read(&self.0.abandoned),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut in_flight = self.loads.lock();
        if let Some(count) = in_flight.get_mut(&self.instance) {
            *count -= 1;
            if *count == 0 {
                in_flight.remove(&self.instance);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(instance: &str, unowned: bool) -> Backend {
        Backend {
            instance: instance.to_owned(),
            node: "a".to_owned(),
            proxy_address: "127.0.0.1:1".to_owned(),
            slots: 1,
            embeddings: false,
            unowned,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_without_an_owner_that_can_not_be_reached_is_left_out_for_a_while() {
        let (loads, owned, unowned) = (Loads::default(), backend("one", false), backend("two", true));
        let both = [&owned, &unowned];
        let taken = |backends: &[&Backend]| {
            let chosen = (0..8).filter_map(|random| Some(loads.take(backends, None, random)?.0));
            chosen.collect::<std::collections::BTreeSet<_>>().into_iter().collect::<Vec<_>>()
        };
        assert_eq!(taken(&both), [0, 1]);
        loads.refused("two", Duration::ZERO);
        loads.refused("one", Duration::ZERO);
        assert_eq!(taken(&both), [0], "an owner vouches for the other");
        assert_eq!(taken(&[&unowned]), [0], "there is nothing else, and it is known at once");
        loads.refused("two", Duration::from_secs(2));
        assert_eq!(taken(&[&unowned]), [0; 0], "nobody waits for its host again");
        tokio::time::advance(LEFT_OUT).await;
        assert_eq!((taken(&both), taken(&[&unowned])), (vec![0, 1], vec![0]));
    }
}
