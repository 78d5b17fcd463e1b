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
};

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

#[derive(Debug, Default)]
struct Inner {
    /// Only instances with at least one, so that gone ones leave nothing behind.
    in_flight: Mutex<HashMap<String, u64>>,
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
        let mut in_flight = self.lock();
        let load = |b: &&Backend| Load { in_flight: in_flight.get(&b.instance).copied().unwrap_or(0), slots: b.slots };
        let at = pick::pick(&backends.iter().map(load).collect::<Vec<_>>(), not, random)?;
        let instance = backends[at].instance.clone();
        *in_flight.entry(instance.clone()).or_default() += 1;
        Some((at, Place { loads: self.clone(), instance }))
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
