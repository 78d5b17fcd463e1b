//! The node's session with the coordinators, and its claims.
//!
//! The session's stream has a thread, a runtime and a connection of its own ([`session`]), so that no work of this host
//! delays a heartbeat. Claims go one after the other over another connection ([`claims`]); what the coordinator says of
//! ownership is applied by a task on the main runtime. Must never: decide what an instance does, or reach the store.

pub mod claims;
pub mod identity;
pub mod offers;
pub mod reports;
pub mod session;
pub mod stored;
mod stream;

use crate::{
    blocking,
    instance::registry::Registry,
    model::inventory,
    orphans::{Orphans, commands},
};
use claims::{Claims, Job};
use drover_proto::{
    transport::Target,
    v1::{ClaimSet, ModelInventory, NodeEvent},
};
use identity::Identity;
use std::{sync::Arc, time::Duration};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// How often the last set of claims is applied again, and unowned runs are claimed again.
const AGAIN_INTERVAL: Duration = Duration::from_secs(5);
/// How often the model roots are looked through.
const INVENTORY_INTERVAL: Duration = Duration::from_secs(5);
/// How long that may take: an agent that begins waits for it.
const SCAN_DEADLINE: Duration = Duration::from_secs(10);
/// Claims that wait for their turn; further offers are passed over, they come again.
const CLAIMS_WAITING: usize = 256;

/// What the link needs of the program.
#[derive(Debug)]
pub struct Parts {
    /// The instances.
    pub registry: Arc<Registry>,
    /// The coordinators, as this node.
    pub target: Target,
    /// What this node says of itself.
    pub about: session::About,
    /// Events to send.
    pub events: mpsc::Receiver<NodeEvent>,
    /// The span source.
    pub telemetry: drover_telemetry::Handle,
}

/// The link, at work until it is stopped.
#[derive(Debug)]
pub struct Link {
    identity: Arc<Identity>,
    stop: CancellationToken,
    thread: std::thread::JoinHandle<()>,
}

/// Starts the link. Must be called on the agent's main runtime.
pub async fn start(parts: Parts) -> anyhow::Result<Link> {
    let stop = CancellationToken::new();
    let context = parts.registry.context().clone();
    let identity = Arc::new(Identity::open(&context.settings.state_dir, &context.events));
    let (jobs, waiting) = mpsc::channel(CLAIMS_WAITING);
    let (sets, latest_set) = watch::channel(None);
    let models = watch::Sender::new(scan(&parts.registry).await);
    let models_seen = models.subscribe();

    let orphans = Arc::new(Orphans::start(parts.registry.clone(), parts.about.capacity.clone(), stop.clone()).await);
    let (commands, asked) = mpsc::channel(commands::WAITING);
    let (answer, answers) = mpsc::channel(commands::WAITING);
    let capacity = orphans.capacity();
    tokio::spawn(stop.clone().run_until_cancelled_owned(commands::work(orphans, asked, answer)));

    let claims = Claims::new(parts.registry.clone(), parts.target.clone(), identity.clone());
    tokio::spawn(stop.clone().run_until_cancelled_owned(claims.work(waiting)));
    tokio::spawn(stop.clone().run_until_cancelled_owned(apply(parts.registry.clone(), latest_set, jobs.clone())));
    tokio::spawn(stop.clone().run_until_cancelled_owned(look_through(parts.registry.clone(), models)));

    let session = session::Session {
        registry: parts.registry,
        target: parts.target,
        about: parts.about,
        identity: identity.clone(),
        events: parts.events,
        telemetry: parts.telemetry,
        models: models_seen,
        capacity,
        commands,
        answers,
        sets,
        jobs,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stopped = stop.clone();
    let thread = std::thread::Builder::new()
        .name("session".to_owned())
        .spawn(move || runtime.block_on(session.keep(stopped)))?;
    Ok(Link { identity, stop, thread })
}

impl Link {
    /// Waits until the node has a session.
    pub async fn joined(&self) {
        self.identity.joined().await;
    }

    /// Ends the session's stream; the lease lives on until it runs out, so that the next agent can resume it.
    pub async fn stop(self, deadline: Duration) {
        self.stop.cancel();
        let ended = tokio::task::spawn_blocking(move || self.thread.join());
        if tokio::time::timeout(deadline, ended).await.is_err() {
            tracing::warn!("the session's thread has not ended in time");
        }
    }
}

/// Applies sets of claims as they come, and the last one again from time to time.
async fn apply(registry: Arc<Registry>, mut sets: watch::Receiver<Option<(u64, ClaimSet)>>, jobs: mpsc::Sender<Job>) {
    loop {
        let unowned = match tokio::time::timeout(AGAIN_INTERVAL, sets.changed()).await {
            Ok(Err(_)) => return,
            Ok(Ok(())) => {
                let latest = sets.borrow_and_update().clone();
                match latest {
                    Some((session, set)) => registry.apply(session, set).await,
                    None => continue,
                }
            }
            Err(_) => registry.apply_again().await,
        };
        for run in unowned {
            // When the queue is full the next round brings it again.
            let _ = jobs.try_send(Job::Again(run));
        }
    }
}

async fn scan(registry: &Registry) -> ModelInventory {
    let roots = registry.context().settings.model_roots.clone();
    let scanned = blocking::within(SCAN_DEADLINE, "the model roots", move || inventory::scan(&roots)).await;
    scanned.unwrap_or_else(|error| {
        tracing::warn!(%error, "the model roots could not be looked through");
        ModelInventory { truncated: true, ..ModelInventory::default() }
    })
}

async fn look_through(registry: Arc<Registry>, models: watch::Sender<ModelInventory>) {
    loop {
        tokio::time::sleep(INVENTORY_INTERVAL).await;
        let now = scan(&registry).await;
        models.send_if_modified(|before| {
            let changed = *before != now;
            *before = now;
            changed
        });
    }
}
