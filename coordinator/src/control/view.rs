//! The watched view: the store's content, kept up to date by one watch, shared as snapshots.
//!
//! Service and handle: the service owns the watch, mends it after every kind of error (list again, then watch from there)
//! and publishes; handles read the last snapshot, which stays usable when the store is away. A store that is another one
//! than before, or an older copy of it, is not shown: nothing may be decided from it ([`View::refused`]).

use super::{alarm::Alarm, shares::Shares};
use crate::{
    plan::snapshot::Snapshot,
    store::{Error, Store, keys, records, schema},
};
use drover_proto::world;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

const RETRY: Duration = Duration::from_millis(300);

/// Handle: cheap to clone.
#[derive(Debug, Clone)]
pub struct View {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    shared: watch::Receiver<Shared>,
    live: Live,
    refused: watch::Receiver<Option<String>>,
}

/// A snapshot, and what each node has part in by it.
pub type Shared = (Arc<Snapshot>, Arc<Shares>);

/// Since when the watch has stood without a break; `None` while it does not.
#[derive(Debug, Clone, Default)]
struct Live(Arc<Mutex<Option<Instant>>>);

impl Live {
    fn get(&self) -> Option<Instant> {
        // Nothing panics while it holds the lock; should it ever, the value is still whole.
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, since: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }
}

/// The view did not get as far as asked in time.
#[derive(Debug, thiserror::Error)]
#[error("this coordinator's view of the store is at revision {at} and did not reach {wanted} in time")]
pub struct Behind {
    /// Where it is.
    pub at: i64,
    /// Where it should be.
    pub wanted: i64,
}

impl View {
    /// Starts the service; it runs until `stop`.
    #[must_use]
    pub fn start(store: Store, stop: CancellationToken) -> Self {
        Self::with(store, None, stop)
    }

    /// As [`View::start`]; what is seen is judged too.
    #[must_use]
    pub fn judged(store: Store, alarm: Alarm, stop: CancellationToken) -> Self {
        Self::with(store, Some(alarm), stop)
    }

    fn with(store: Store, alarm: Option<Alarm>, stop: CancellationToken) -> Self {
        let (publish, snapshots) = watch::channel(Arc::new(Snapshot::default()));
        let (share, shared) = watch::channel(Shared::default());
        let live = Live::default();
        let (refuse, refused) = watch::channel(None);
        let service = Service { store, alarm, publish, share, live: live.clone(), refuse };
        tokio::spawn(world::task(async move {
            tokio::select! {
                () = service.run() => {}
                () = stop.cancelled() => {}
            }
        }));
        Self { snapshots, shared, live, refused }
    }

    /// The last snapshot.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshots.borrow().clone()
    }

    /// Snapshots as they come.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.clone()
    }

    /// The last snapshot with its shares, and each as it comes. Never behind [`View::snapshot`].
    #[must_use]
    pub fn shared(&self) -> watch::Receiver<Shared> {
        self.shared.clone()
    }

    /// Whether the watch stands, so that snapshots are as fresh as the store's events.
    #[must_use]
    pub fn live(&self) -> bool {
        self.live_since().is_some()
    }

    /// Since when the watch has stood without a break; `None` while it does not. What happened to leases during a break is seen
    /// all at once after it.
    #[must_use]
    pub fn live_since(&self) -> Option<Instant> {
        self.live.get()
    }

    /// Why the store is not used any more though it answers; `None` when all is well. Whoever leads or serves a session ends
    /// that while it lasts.
    #[must_use]
    pub fn refused(&self) -> watch::Receiver<Option<String>> {
        self.refused.clone()
    }

    /// Waits until the store is not used any more; says why.
    pub async fn until_refused(&self) -> String {
        let mut refused = self.refused.clone();
        let why = refused.wait_for(Option::is_some).await.map(|why| why.clone());
        match why {
            Ok(why) => why.unwrap_or_default(),
            // The service ends with the process.
            Err(_) => std::future::pending().await,
        }
    }

    /// Waits until the view has seen a revision.
    pub async fn at_least(&self, revision: i64, deadline: Duration) -> Result<Arc<Snapshot>, Behind> {
        let mut snapshots = self.snapshots.clone();
        let reached = snapshots.wait_for(|s| s.revision >= revision);
        match tokio::time::timeout(deadline, reached).await {
            Ok(Ok(snapshot)) => Ok(snapshot.clone()),
            _ => Err(Behind { at: self.snapshot().revision, wanted: revision }),
        }
    }
}

struct Service {
    store: Store,
    alarm: Option<Alarm>,
    publish: watch::Sender<Arc<Snapshot>>,
    share: watch::Sender<Shared>,
    live: Live,
    refuse: watch::Sender<Option<String>>,
}

/// Why the view follows the store no more.
enum Stale {
    /// It has to list again.
    Interrupted(Error),
    /// What it sees is not what it was.
    Refused(String),
}

impl From<Error> for Stale {
    fn from(error: Error) -> Self {
        Self::Interrupted(error)
    }
}

impl Service {
    async fn run(self) {
        loop {
            let stale = match self.follow().await {
                Ok(never) => match never {},
                Err(stale) => stale,
            };
            self.live.set(None);
            match stale {
                Stale::Interrupted(error) => tracing::warn!(%error, "the view of the store is stale; listing again"),
                Stale::Refused(why) => {
                    let why = Some(format!(
                        "{why}; nothing is decided from it: restore the store, or end all servers and start the \
                         coordinators with --new-store"
                    ));
                    self.refuse.send_if_modified(|before| {
                        let is_news = *before != why;
                        if is_news {
                            tracing::error!("{}", why.as_deref().unwrap_or_default());
                        }
                        *before = why;
                        is_news
                    });
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    fn check(&self, now: &Snapshot) -> Result<(), Stale> {
        schema::regressed(&self.publish.borrow(), now).map_or(Ok(()), |why| Err(Stale::Refused(why)))
    }

    async fn follow(&self) -> Result<std::convert::Infallible, Stale> {
        let listing = self.store.list("").await?;
        let mut watch = self.store.watch("", listing.revision + 1).await?;
        let (mut snapshot, problems) = records::snapshot_after(&listing, &self.publish.borrow());
        for problem in problems {
            tracing::error!(error = %problem, "a record of the store is left out");
        }
        self.check(&snapshot)?;
        if let Some(alarm) = &self.alarm {
            alarm.begin(&listing);
        }
        self.live.set(Some(Instant::now()));
        self.refuse.send_if_modified(|before| before.take().is_some());
        self.show(&snapshot);
        loop {
            let mut next = Some(watch.next().await?);
            let mut rewritten = false;
            // Whatever has arrived meanwhile goes into the same snapshot.
            while let Some(changes) = next {
                if let Some(alarm) = &self.alarm {
                    alarm.take(&changes);
                }
                for change in &changes.changes {
                    rewritten |= change.key() == keys::SCHEMA;
                    if let Err(problem) = records::apply(&mut snapshot, change) {
                        tracing::error!(error = %problem, "a record of the store is left as it was");
                    }
                }
                snapshot.revision = snapshot.revision.max(changes.revision);
                next = match watch.changes.try_recv() {
                    Ok(more) => Some(more?),
                    Err(_) => None,
                };
            }
            if rewritten {
                self.check(&snapshot)?;
            }
            self.show(&snapshot);
        }
    }

    /// The shares first, so that whoever has waited for a snapshot finds those of that one or of a later one.
    fn show(&self, snapshot: &Snapshot) {
        let snapshot = Arc::new(snapshot.clone());
        let shares = {
            let (before, shares) = &*self.share.borrow();
            Arc::new(shares.after(before, &snapshot))
        };
        self.share.send_replace((snapshot.clone(), shares));
        self.publish.send_replace(snapshot);
    }
}
