//! A life of a coordinator: the real parts, built as `serve` builds them, over the simulated store.

use crate::{
    store::Client,
    world::{Sim, lock},
};
use drover_coordinator::{
    api,
    audit::{self, Audit},
    control::{
        absences::Absences, claims::Claims, cycle::Cycle, events::Events, leader, reach::Reach, seen::Rate, sessions,
        status::Statuses, view::View,
    },
    plan,
    store::{Store, guarded::Guarded, schema},
};
use drover_proto::{
    world,
    world::simulated::{self, Process},
};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// What a coordinator offers to agents.
#[derive(Debug)]
pub struct Serving {
    pub process: Process,
    pub sessions: sessions::Sessions,
    pub node: api::Node,
    stop: CancellationToken,
}

/// Begins a life of a coordinator.
pub fn start(sim: &Arc<Sim>, number: usize) -> Process {
    let process = sim.process(format!("coordinator {number}"));
    let sim = sim.clone();
    simulated::as_process(process, || tokio::spawn(world::task(live(sim, number, process))));
    process
}

/// Ends it as SIGTERM does; its tasks end by themselves.
pub fn stop(sim: &Arc<Sim>, number: usize) {
    if let Some(serving) = lock(&sim.network).serving[number].take() {
        serving.stop.cancel();
    }
}

async fn live(sim: Arc<Sim>, number: usize, process: Process) {
    let store: Store = Arc::new(Client { sim: sim.clone(), coordinator: number });
    // A coordinator that can't open its store ends, and is started again by whoever keeps it.
    while let Err(error) = schema::open(&store, None).await {
        sim.tell(|| format!("coordinator {number}: {error}"));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let id = format!("c{number}");
    let ttl_ms = i64::try_from(sim.settings.ttl_ms).unwrap_or(i64::MAX);
    let stop = CancellationToken::new();
    let view = View::start(store.clone(), stop.clone());
    let store: Store = Arc::new(Guarded::new(store, view.refused()));
    let (events, _) = Events::start(store.clone(), format!("coordinator/{id}"));
    let (leadership, _) = leader::start(store.clone(), view.clone(), id.clone(), stop.clone());
    let absences = Absences {
        store: store.clone(),
        view: view.clone(),
        leadership: leadership.clone(),
        events: events.clone(),
        coordinator: id.clone(),
    };
    tokio::spawn(world::task(absences.run(stop.clone())));
    let cycle = Cycle {
        store: store.clone(),
        view: view.clone(),
        events: events.clone(),
        settings: plan::Settings {
            candidates: sim.settings.candidates,
            offer_deadline_ms: sim.settings.offer_deadline_ms,
            grace_ms: ttl_ms,
            revisions_kept: 10,
            freeze_share_percent: 55,
            progress_deadline_ms: 15_000,
            give_up_after_ms: 10_000,
            avoid: plan::avoid::Delays { first_ms: 10_000, max_ms: 40_000 },
        },
        replace_rate: Rate { burst: 50, per_s: 10 },
        seed: world::random_u64(),
    };
    tokio::spawn(world::task(cycle.run(leadership, stop.clone())));
    let sessions = sessions::Sessions {
        store: store.clone(),
        view: view.clone(),
        events: events.clone(),
        statuses: Statuses::new(store.clone(), view.clone(), events.clone()),
        audit: Audit::new(audit::Settings::default()),
        streams: sessions::Streams::default(),
        refusals: sessions::Refusals::default(),
        reach: Reach::start(store.clone(), view.clone(), events.clone(), stop.clone()),
        settings: sessions::Settings {
            coordinator: id,
            ttl: Duration::from_millis(sim.settings.ttl_ms),
            heartbeat_interval: Duration::from_millis(sim.settings.ttl_ms * 3 / 10),
        },
        stop: stop.clone(),
    };
    let node = api::Node::new(sessions.clone(), Claims::new(store, view, events));
    let serving = Serving { process, sessions, node, stop: stop.clone() };
    lock(&sim.network).serving[number] = Some(Arc::new(serving));
    stop.cancelled().await;
}
