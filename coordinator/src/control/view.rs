//! The watched view: the store's content, kept up to date by one watch, shared as snapshots.
//!
//! Service and handle: the service owns the watch, mends it after every kind of error (list again, then watch from there)
//! and publishes; handles read the last snapshot, which stays usable when the store is away.

use crate::{
    plan::snapshot::Snapshot,
    store::{Error, Store, records},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const RETRY: Duration = Duration::from_millis(300);

/// Handle: cheap to clone.
#[derive(Debug, Clone)]
pub struct View {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    live: Arc<AtomicBool>,
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
        let (publish, snapshots) = watch::channel(Arc::new(Snapshot::default()));
        let live = Arc::new(AtomicBool::new(false));
        let service = Service { store, publish, live: live.clone() };
        tokio::spawn(async move {
            tokio::select! {
                () = service.run() => {}
                () = stop.cancelled() => {}
            }
        });
        Self { snapshots, live }
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

    /// Whether the watch stands, so that snapshots are as fresh as the store's events.
    #[must_use]
    pub fn live(&self) -> bool {
        self.live.load(Ordering::Relaxed)
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
    publish: watch::Sender<Arc<Snapshot>>,
    live: Arc<AtomicBool>,
}

impl Service {
    async fn run(self) {
        loop {
            let error = match self.follow().await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            self.live.store(false, Ordering::Relaxed);
            tracing::warn!(%error, "the view of the store is stale; listing again");
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn follow(&self) -> Result<std::convert::Infallible, Error> {
        let listing = self.store.list("").await?;
        let mut watch = self.store.watch("", listing.revision + 1).await?;
        let (mut snapshot, problems) = records::snapshot_after(&listing, &self.publish.borrow());
        for problem in problems {
            tracing::error!(error = %problem, "a record of the store is left out");
        }
        self.live.store(true, Ordering::Relaxed);
        self.publish.send_replace(Arc::new(snapshot.clone()));
        loop {
            let mut next = Some(watch.next().await?);
            // Whatever has arrived meanwhile goes into the same snapshot.
            while let Some(changes) = next {
                for change in &changes.changes {
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
            self.publish.send_replace(Arc::new(snapshot.clone()));
        }
    }
}
