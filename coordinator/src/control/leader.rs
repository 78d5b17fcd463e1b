//! The election: at most one coordinator at a time reconciles, and every write that it makes compares the leader's key.
//!
//! Service and handle: the service owns the lease; the handle tells whether this coordinator leads, and under which
//! revision of the key.

use super::{clock, mutant, view::View};
use crate::store::{Compare, Error, Op, Store, Txn, keys, pack::Step, records};
use drover_proto::{store::v1 as record, world};
use std::time::Duration;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

/// Time to live of the leader's lease.
pub const TTL: Duration = Duration::from_secs(5);
/// How long a leader may be without a view of the store. What it writes is safe all the same, since it compares; but it would
/// plan from what was, and nobody else could lead.
const BLIND: Duration = TTL;
/// Pause after a term, and after an election that was lost or failed: each try grants a lease.
const RETRY: Duration = Duration::from_secs(1);

/// A term: the leader's key as this coordinator wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Term {
    /// Revision of the key; what writes of this term compare.
    pub revision: i64,
    /// Revision of the store's schema, which they compare too: in a restored store revisions come again.
    pub schema: i64,
    /// Since when, by the clock of this process.
    pub since: Instant,
    /// Lease of the key: what hangs on it goes with the term.
    pub lease: i64,
}

impl Term {
    /// What every write of this term compares.
    #[must_use]
    pub fn compares(&self) -> Vec<Compare> {
        let mut compares = vec![Compare::ModRevision(keys::LEADER.to_owned(), self.revision)];
        if !mutant::on(mutant::name::NO_SCHEMA_COMPARE) {
            compares.push(Compare::ModRevision(keys::SCHEMA.to_owned(), self.schema));
        }
        compares
    }

    /// How many those are, at most.
    pub const COMPARES: usize = 2;
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
    let task = tokio::spawn(world::task(async move {
        loop {
            tokio::select! {
                // First, since the view ends with it.
                biased;
                () = stop.cancelled() => return,
                () = vacant(&view) => {}
            }
            if let Err(error) = term(&store, &view, &id, &publish, &stop).await {
                tracing::warn!(%error, "election");
            }
            publish.send_replace(None);
            // Also when the view shows no leader: it may lag, or the store may refuse to have one.
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = stop.cancelled() => return,
            }
        }
    }));
    (leadership, task)
}

/// Waits until the view shows no leader. Who does not see the store does not stand: it could not lead.
async fn vacant(view: &View) {
    loop {
        // The sender lives as long as the process; if it is gone, waiting longer changes nothing.
        let _ = view.subscribe().wait_for(|s| s.schema.is_some() && s.leader.is_none()).await;
        if view.live() || mutant::on(mutant::name::BLIND_LEADER) {
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Waits until the view shows that a term is over though its lease may live: its key was removed (which forces a release),
/// or the store is not what it was.
async fn deposed(view: &View, term: Term) {
    let mut snapshots = view.subscribe();
    let over = snapshots.wait_for(|snapshot| {
        let schema = snapshot.schema.as_ref().map_or(0, |s| s.mod_revision);
        // A restored store may be at a lower revision than the term began at.
        schema != term.schema
            || (snapshot.revision >= term.revision
                && snapshot.leader.as_ref().map_or(0, |leader| leader.create_revision) != term.revision)
    });
    tokio::select! {
        // The sender lives as long as the process.
        _ = over => {}
        _ = view.until_refused() => {}
    }
}

/// Stands for election once; when elected, leads until the lease is lost.
async fn term(
    store: &Store,
    view: &View,
    id: &str,
    publish: &watch::Sender<Option<Term>>,
    stop: &CancellationToken,
) -> Result<(), Error> {
    let unread = || Error::Unavailable("this coordinator has not read the store yet".to_owned());
    let schema = view.snapshot().schema.as_ref().ok_or_else(unread)?.mod_revision;
    let granted_at = Instant::now();
    let lease = store.grant(TTL).await?;
    let leader = record::Leader { coordinator: id.to_owned(), since: Some(clock::now()) };
    let txn = Txn {
        compare: vec![
            Compare::CreateRevision(keys::LEADER.to_owned(), 0),
            Compare::ModRevision(keys::SCHEMA.to_owned(), schema),
        ],
        then: vec![records::put(keys::LEADER.to_owned(), &leader, lease)],
        otherwise: vec![],
    };
    // After an unknown outcome the lease is left to run out: if the key was written, it goes with it.
    let outcome = store.txn(txn).await?;
    if !outcome.succeeded {
        return store.revoke(lease).await;
    }
    let term = Term { revision: outcome.revision, schema, since: Instant::now(), lease };
    tracing::info!(revision = term.revision, "this coordinator leads");
    publish.send_replace(Some(term));
    let ended = tokio::select! {
        ended = keep(store, view, term.revision, lease, granted_at, stop) => ended,
        () = deposed(view, term) => Ok(()),
    };
    publish.send_replace(None);
    tracing::info!(revision = term.revision, "this coordinator leads no more");
    match ended {
        // Given back, so that another need not wait for its end.
        Ok(()) => store.revoke(lease).await,
        lost => lost,
    }
}

/// Renews the lease until it is lost, or until its time has run out by our own clock. `Ok` when the lead is to be given back:
/// at the end of this coordinator, or when it does not see the store, or not even its own term in it.
async fn keep(
    store: &Store,
    view: &View,
    term: i64,
    lease: i64,
    granted_at: Instant,
    stop: &CancellationToken,
) -> Result<(), Error> {
    let (mut deadline, mut saw) = (granted_at + TTL, Instant::now());
    let mut tick = tokio::time::interval(TTL / 4);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.cancelled() => return Ok(()),
        }
        let sent = Instant::now();
        if view.live() && view.snapshot().revision >= term || mutant::on(mutant::name::BLIND_LEADER) {
            saw = sent;
        } else if saw.elapsed() > BLIND {
            tracing::warn!("this coordinator leads and does not see the store: another one may");
            return Ok(());
        }
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

/// Writes the leader's key anew, as it is. A write of this term whose outcome is not known compares the key as it was, so from
/// then on it has taken effect or never will, and a view of the returned revision shows which. `created` is the revision at which
/// this term's key was made, `schema` that of the store's schema.
///
/// # Errors
/// [`Error::LeaseGone`] when the key is another's; those of the store. It may be tried again whatever the error.
pub async fn settle(store: &Store, created: i64, schema: i64) -> Result<i64, Error> {
    let key = keys::LEADER.to_owned();
    let ours = store.get(&key).await?.filter(|kv| kv.create_revision == created).ok_or(Error::LeaseGone)?;
    let txn = Txn {
        compare: vec![
            Compare::ModRevision(key.clone(), ours.mod_revision),
            Compare::ModRevision(keys::SCHEMA.to_owned(), schema),
        ],
        then: vec![Op::Put { key, value: ours.value, lease: ours.lease }],
        otherwise: vec![],
    };
    let outcome = store.txn(txn).await?;
    if outcome.succeeded {
        Ok(outcome.revision)
    } else {
        Err(Error::Unavailable("the leader's key has just changed".to_owned()))
    }
}

/// A transaction that also compares the leader's key, and what the store is.
#[must_use]
pub fn guarded(term: &Term, Step { mut compare, then }: Step) -> Txn {
    compare.extend(term.compares());
    Txn { compare, then, otherwise: vec![] }
}
