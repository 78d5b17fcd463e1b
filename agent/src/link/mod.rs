//! The node's session with the coordinators, and its claims.
//!
//! The session's stream has a thread, a runtime and a connection of its own ([`session`]), and so have its heartbeats
//! ([`heartbeats`]), so that no work of this host delays them. Claims go one after the other over another connection ([`claims`]); what the coordinator says of
//! ownership is applied by a task on the main runtime. Must never: decide what an instance does, or reach the store.

pub mod claims;
mod heartbeats;
pub mod identity;
pub mod offers;
pub mod remote;
pub mod reports;
pub mod session;
pub mod stored;
mod stream;

use crate::{
    blocking,
    instance::registry::{Registry, SessionSet},
    model::inventory,
    orphans::{Orphans, commands},
};
use claims::{Again, Claims};
use drover_proto::{
    v1::{Capacity, CommandAnswer, ModelInventory, NodeCommand, NodeEvent, SpanCheckpoint},
    world,
};
use identity::Identity;
use remote::Coordinators;
use std::{sync::Arc, time::Duration};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// How often the last set of claims is applied again, and unowned runs are claimed again.
const AGAIN_INTERVAL: Duration = Duration::from_secs(5);
/// How often the model roots are looked through.
const INVENTORY_INTERVAL: Duration = Duration::from_secs(5);
/// How long that may take: an agent that begins waits for it.
const SCAN_DEADLINE: Duration = Duration::from_secs(10);
/// Offers that wait for their turn; further ones are passed over, they come again.
const OFFERS_WAITING: usize = 256;

/// What the link needs of the program.
#[derive(Debug)]
pub struct Parts {
    /// The instances.
    pub registry: Arc<Registry>,
    /// The coordinators, as this node.
    pub coordinators: Arc<dyn Coordinators>,
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
    threads: [std::thread::JoinHandle<()>; 2],
}

/// What the loops of the link work with, whoever runs them.
#[derive(Debug)]
pub struct Wiring {
    /// The instances.
    pub registry: Arc<Registry>,
    /// The coordinators, as this node.
    pub coordinators: Arc<dyn Coordinators>,
    /// What this node says of itself.
    pub about: session::About,
    /// Events to send.
    pub events: mpsc::Receiver<NodeEvent>,
    /// How its spans stand.
    pub checkpoint: session::Checkpoint,
    /// Its model files.
    pub models: watch::Receiver<ModelInventory>,
    /// What it has to give.
    pub capacity: watch::Receiver<Capacity>,
    /// Commands for whoever carries them out.
    pub commands: mpsc::Sender<NodeCommand>,
    /// What became of them.
    pub answers: mpsc::Receiver<CommandAnswer>,
}

/// Starts the link. Must be called on the agent's main runtime.
pub async fn start(parts: Parts) -> anyhow::Result<Link> {
    let stop = CancellationToken::new();
    let registry = parts.registry;
    let models = watch::Sender::new(scan(&registry).await);
    let models_seen = models.subscribe();
    let orphans = Arc::new(Orphans::start(registry.clone(), parts.about.capacity.clone(), stop.clone()).await);
    let (commands, asked) = mpsc::channel(commands::WAITING);
    let (answer, answers) = mpsc::channel(commands::WAITING);
    let capacity = orphans.capacity();
    tokio::spawn(stop.clone().run_until_cancelled_owned(commands::work(orphans, asked, answer)));
    tokio::spawn(stop.clone().run_until_cancelled_owned(look_through(registry.clone(), models)));
    let telemetry = parts.telemetry;
    let checkpoint = session::Checkpoint(Arc::new(move || of_spans(&telemetry)));
    let (identity, session) = wire(
        Wiring {
            registry,
            coordinators: parts.coordinators,
            about: parts.about,
            events: parts.events,
            checkpoint,
            models: models_seen,
            capacity,
            commands,
            answers,
        },
        &stop,
    );
    let heartbeats = session.heartbeats();
    let threads =
        [thread("heartbeats", heartbeats.keep(stop.clone()))?, thread("session", session.keep(stop.clone()))?];
    Ok(Link { identity, stop, threads })
}

/// A thread of its own, with a runtime of its own.
fn thread(name: &str, work: impl Future<Output = ()> + Send + 'static) -> std::io::Result<std::thread::JoinHandle<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name(name.to_owned()).spawn(move || runtime.block_on(work))
}

/// Starts the loops that claim and that apply sets of claims; the session's own loop ([`session::Session::keep`]) is the
/// caller's to run, where nothing delays it.
#[must_use]
pub fn wire(wiring: Wiring, stop: &CancellationToken) -> (Arc<Identity>, session::Session) {
    let Wiring { registry, coordinators, about, events, checkpoint, models, capacity, commands, answers } = wiring;
    let context = registry.context().clone();
    let identity = Arc::new(Identity::open(&context.settings.state_dir, context.machine.clone(), &context.events));
    let (offers, offered) = mpsc::channel(OFFERS_WAITING);
    let (again, unowned) = watch::channel(Again::default());
    let (reconciling, reconciled) = watch::channel(0);
    let (sets, latest_set) = watch::channel(None);
    let (tell_applied, applied) = watch::channel((0, 0));
    let claims = Claims::new(registry.clone(), coordinators.clone(), identity.clone());
    tokio::spawn(world::task(stop.clone().run_until_cancelled_owned(claims.work(offered, unowned, reconciling))));
    let apply = apply(registry.clone(), latest_set, again, tell_applied);
    tokio::spawn(world::task(stop.clone().run_until_cancelled_owned(apply)));
    let (tell_beats, beats) = watch::channel((0, heartbeats::Beats::Down));
    let session = session::Session {
        beating: watch::Sender::new(None),
        beats,
        tell_beats: Arc::new(tell_beats),
        registry,
        coordinators,
        about,
        identity: identity.clone(),
        events,
        checkpoint,
        models,
        capacity,
        commands,
        answers,
        sets,
        offers,
        applied,
        held: None,
        reconciled,
    };
    (identity, session)
}

fn of_spans(telemetry: &drover_telemetry::Handle) -> SpanCheckpoint {
    let checkpoint = telemetry.checkpoint();
    SpanCheckpoint {
        epoch: checkpoint.epoch,
        highest_sequence: checkpoint.highest_sequence,
        acknowledged_through: checkpoint.acknowledged_through,
        given_up: checkpoint.given_up,
        sampled_out: checkpoint.sampled_out,
        program: "drover-agent".to_owned(),
    }
}

impl Link {
    /// Waits until the node has a session.
    pub async fn joined(&self) {
        self.identity.joined().await;
    }

    /// Ends the session's stream; the lease lives on until it runs out, so that the next agent can resume it.
    pub async fn stop(self, deadline: Duration) {
        self.stop.cancel();
        let ended = tokio::task::spawn_blocking(move || self.threads.map(std::thread::JoinHandle::join));
        if tokio::time::timeout(deadline, ended).await.is_err() {
            tracing::warn!("the session's threads have not ended in time");
        }
    }
}

/// Applies sets of claims as they come, and the last one again from time to time; tells of which stream, and of which
/// revision, the last one was.
async fn apply(
    registry: Arc<Registry>,
    mut sets: watch::Receiver<Option<SessionSet>>,
    again: watch::Sender<Again>,
    applied: watch::Sender<(u64, i64)>,
) {
    let mut session = 0;
    loop {
        let runs = match tokio::time::timeout(AGAIN_INTERVAL, sets.changed()).await {
            Ok(Err(_)) => return,
            Ok(Ok(())) => {
                let latest = sets.borrow_and_update().clone();
                match latest {
                    Some(set) => {
                        let now = (set.stream, set.set.revision);
                        session = set.stream;
                        let unowned = registry.apply(set).await;
                        applied.send_replace(now);
                        unowned
                    }
                    None => continue,
                }
            }
            Err(_) => registry.apply_again().await,
        };
        again.send_replace(Again { session, runs });
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
