//! The election: at most one coordinator at a time reconciles, and every write that it makes compares the leader's key.
//!
//! Service and handle: the service owns the lease; the handle tells whether this coordinator leads, and under which
//! revision of the key.

use super::{clock, view::View};
use crate::store::{Compare, Error, Store, Txn, keys, pack::Step, records};
use drover_proto::store::v1 as record;
use std::time::Duration;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

/// Time to live of the leader's lease.
pub const TTL: Duration = Duration::from_secs(5);
/// Pause after a term, and after an election that was lost or failed: each try grants a lease.
const RETRY: Duration = Duration::from_secs(1);

/// A term: the leader's key as this coordinator wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Term {
    /// Revision of the key; what writes of this term compare.
    pub revision: i64,
    /// Since when, in milliseconds since the epoch.
    pub since_ms: i64,
}

impl Term {
    /// The compare that every write of this term carries.
    #[must_use]
    pub fn compare(&self) -> Compare {
        Compare::ModRevision(keys::LEADER.to_owned(), self.revision)
    }
}

/// Handle.
pub type Leadership = watch::Receiver<Option<Term>>;

/// Starts the election; the returned task ends after `stop`, having given the lead back.
pub fn start(
    store: Store,
    view: View,
    id: String,
    stop: CancellationToken,
) -> (Leadership, tokio::task::JoinHandle<()>) {
    let (publish, leadership) = watch::channel(None);
    let task = tokio::spawn(async move {
        loop {
            tokio::select! {
                // First, since the view ends with it.
                biased;
                () = stop.cancelled() => return,
                () = vacant(&view) => {}
            }
            if let Err(error) = term(&store, &id, &publish, &stop).await {
                tracing::warn!(%error, "election");
            }
            publish.send_replace(None);
            // Also when the view shows no leader: it may lag, or the store may refuse to have one.
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = stop.cancelled() => return,
            }
        }
    });
    (leadership, task)
}

/// Waits until the view shows no leader.
async fn vacant(view: &View) {
    // The sender lives as long as the process; if it is gone, waiting longer changes nothing.
    let _ = view.subscribe().wait_for(|s| s.revision > 0 && s.leader.is_none()).await;
}

/// Stands for election once; when elected, leads until the lease is lost.
async fn term(
    store: &Store,
    id: &str,
    publish: &watch::Sender<Option<Term>>,
    stop: &CancellationToken,
) -> Result<(), Error> {
    let granted_at = Instant::now();
    let lease = store.grant(TTL).await?;
    let since_ms = clock::now_ms();
    let leader = record::Leader { coordinator: id.to_owned(), since: Some(clock::timestamp(since_ms)) };
    let txn = Txn {
        compare: vec![Compare::CreateRevision(keys::LEADER.to_owned(), 0)],
        then: vec![records::put(keys::LEADER.to_owned(), &leader, lease)],
        otherwise: vec![],
    };
    // After an unknown outcome the lease is left to run out: if the key was written, it goes with it.
    let outcome = store.txn(txn).await?;
    if !outcome.succeeded {
        return store.revoke(lease).await;
    }
    let term = Term { revision: outcome.revision, since_ms };
    tracing::info!(revision = term.revision, "this coordinator leads");
    publish.send_replace(Some(term));
    let ended = keep(store, lease, granted_at, stop).await;
    publish.send_replace(None);
    tracing::info!(revision = term.revision, "this coordinator leads no more");
    if stop.is_cancelled() {
        return store.revoke(lease).await;
    }
    ended
}

/// Renews the lease until it is lost, or until its time has run out by our own clock.
async fn keep(store: &Store, lease: i64, granted_at: Instant, stop: &CancellationToken) -> Result<(), Error> {
    let mut deadline = granted_at + TTL;
    let mut tick = tokio::time::interval(TTL / 4);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.cancelled() => return Ok(()),
        }
        let sent = Instant::now();
        match tokio::time::timeout_at(deadline, store.renew(lease)).await {
            Ok(Ok(ttl)) => deadline = sent + ttl,
            Ok(Err(Error::LeaseGone)) => return Err(Error::LeaseGone),
            Ok(Err(error)) => tracing::warn!(%error, "the leader's lease was not renewed"),
            Err(_) => return Err(Error::LeaseGone),
        }
        if Instant::now() >= deadline {
            return Err(Error::LeaseGone);
        }
    }
}

/// A transaction that also compares the leader's key.
#[must_use]
pub fn guarded(term: &Term, Step { mut compare, then }: Step) -> Txn {
    compare.push(term.compare());
    Txn { compare, then, otherwise: vec![] }
}
