//! The store in memory: etcd's twin for simulation and for `drover dev` on a machine without etcd.
//!
//! Owns: its content, and a task that ends leases on tokio's clock (so tests can pause it). Answers exactly as etcd does,
//! which `tests/the_memory_store_answers_as_etcd_does` checks against a real one. Must never: be offered as a store that
//! survives its process.

mod faults;
mod state;
mod txn;

use super::{Backend, Changes, Error, KeyValue, Listing, Txn, TxnOutcome, WATCH_QUEUE, Watch};
use async_trait::async_trait;
use state::State;

pub use faults::Copy;
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, sleep_until},
};

/// Revisions whose changes are kept for watches, unless said otherwise.
pub const HISTORY_MAX: usize = 10_000;

/// A store in memory; clones share it.
#[derive(Debug, Clone)]
pub struct Memory {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    cluster_id: AtomicU64,
    state: Mutex<State>,
    /// Wakes the watches.
    revision: watch::Sender<i64>,
    /// Wakes the task that ends leases. It holds the rest weakly, and ends with it.
    leases_changed: Arc<Notify>,
}

impl Memory {
    /// An empty store, as a fresh etcd is: revision 1. Its identity is the caller's to choose: a real program must take a
    /// new one every time, since agents take another identity for another store. Needs a tokio runtime.
    #[must_use]
    pub fn start(cluster_id: u64) -> Self {
        Self::with_history(cluster_id, HISTORY_MAX)
    }

    /// As [`Memory::start`], keeping the changes of so many revisions; a watch from before them gets [`Error::Compacted`].
    #[must_use]
    pub fn with_history(cluster_id: u64, revisions: usize) -> Self {
        let leases_changed = Arc::new(Notify::new());
        let state = State::new(revisions);
        let shared = Arc::new(Shared {
            cluster_id: AtomicU64::new(cluster_id),
            revision: watch::Sender::new(state.revision()),
            state: Mutex::new(state),
            leases_changed: leases_changed.clone(),
        });
        tokio::spawn(end_leases(Arc::downgrade(&shared), leases_changed));
        Self { shared }
    }

    /// Forgets the history before a revision, as etcd's compaction does.
    ///
    /// # Errors
    /// [`Error::Compacted`] when it is forgotten already, [`Error::Rejected`] for a revision that is still to come.
    pub fn compact(&self, revision: i64) -> Result<(), Error> {
        self.shared.with(|state| state.compact(revision))
    }
}

impl Shared {
    /// The state as of now: what has expired is gone.
    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        state.expire(Instant::now());
        let result = act(&mut state);
        self.revision.send_if_modified(|seen| std::mem::replace(seen, state.revision()) != state.revision());
        result
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves no half-done transaction: each is prepared before it changes anything.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.leases_changed.notify_one();
    }
}

/// Ends leases at their time, so that watches see it although nobody calls.
async fn end_leases(shared: Weak<Shared>, changed: Arc<Notify>) {
    loop {
        let Some(next) = shared.upgrade().map(|shared| shared.with(|state| state.next_expiry())) else { return };
        match next {
            Some(at) => tokio::select! {
                () = sleep_until(at) => {}
                () = changed.notified() => {}
            },
            None => changed.notified().await,
        }
    }
}

fn restored() -> Error {
    Error::Unavailable("the store was set back to an earlier copy".to_owned())
}

/// Hands on changes from a revision on, until the reader leaves, the store is dropped or the history is compacted.
async fn follow(
    shared: Weak<Shared>,
    life: u64,
    prefix: String,
    mut from: i64,
    reader: mpsc::Sender<Result<Changes, Error>>,
) {
    let Some(mut revisions) = shared.upgrade().map(|shared| shared.revision.subscribe()) else { return };
    let next_of = |state: &mut State, from| {
        if state.life() == life { state.changes(from, &prefix) } else { Err(restored()) }
    };
    loop {
        revisions.mark_unchanged();
        loop {
            let Some(next) = shared.upgrade().map(|shared| shared.with(|state| next_of(state, from))) else {
                return;
            };
            match next {
                Ok(Some(changes)) => {
                    from = changes.revision + 1;
                    if !changes.changes.is_empty() && reader.send(Ok(changes)).await.is_err() {
                        return;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    // The reader may have left meanwhile; then nobody needs the error.
                    let _ = reader.send(Err(error)).await;
                    return;
                }
            }
        }
        tokio::select! {
            () = reader.closed() => return,
            changed = revisions.changed() => if changed.is_err() { return },
        }
    }
}

#[async_trait]
impl Backend for Memory {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, Error> {
        Ok(self.shared.with(|state| state.get(key)))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, Error> {
        Ok(self.shared.with(|state| Listing { items: state.list(prefix), revision: state.revision() }))
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, Error> {
        self.shared.with(|state| state.txn(&txn))
    }

    async fn grant(&self, ttl: Duration) -> Result<i64, Error> {
        let id = self.shared.with(|state| state.grant(ttl, Instant::now()));
        self.shared.leases_changed.notify_one();
        Ok(id)
    }

    async fn renew(&self, lease: i64) -> Result<Duration, Error> {
        self.shared.with(|state| state.renew(lease, Instant::now()))
    }

    async fn revoke(&self, lease: i64) -> Result<(), Error> {
        self.shared.with(|state| state.revoke(lease));
        Ok(())
    }

    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<Watch, Error> {
        let (sender, changes) = mpsc::channel(WATCH_QUEUE);
        let (now, life) = self.shared.with(|state| (state.revision(), state.life()));
        let from = if from_revision > 0 { from_revision } else { now + 1 };
        tokio::spawn(follow(Arc::downgrade(&self.shared), life, prefix.to_owned(), from, sender));
        Ok(Watch { changes })
    }

    async fn cluster_id(&self) -> Result<u64, Error> {
        Ok(self.shared.cluster_id.load(Ordering::Relaxed))
    }
}
