//! A life of an agent: the real registry, supervisors and link, on a simulated host. Its session and its heartbeats have a
//! process of their own, as they have threads.

use crate::{
    host::{Here, Host, Plane},
    network::Dialer,
    world::Sim,
};
use drover_agent::{
    config::Settings,
    host::cgroup::Root,
    instance::{
        arguments::Known,
        board::Board,
        context::{Context, Events},
        leases::Leases,
        registry::Registry,
        routes::Routes,
        session::Deadline,
        turns::Turns,
    },
    link::{self, Wiring, session},
};
use drover_proto::{
    transport::Security,
    v1::{Capacity, ModelFile, ModelInventory, SpanCheckpoint},
    world,
    world::simulated::{self, Process},
};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicI64},
    time::Duration,
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// A life of an agent.
#[derive(Debug, Clone, Copy)]
pub struct Agent {
    /// Everything but its session's stream.
    pub main: Process,
    /// The threads of its session and of its heartbeats.
    pub session: Process,
}

/// Begins a life of the agent of a host.
pub fn start(sim: &Arc<Sim>, number: usize) -> Agent {
    let host = sim.hosts[number].clone();
    let main = sim.process(format!("agent {}", host.name));
    let session = sim.process(format!("session of {}", host.name));
    let life = live(sim.clone(), host, number, session);
    simulated::as_process(main, || tokio::spawn(world::task(life)));
    Agent { main, session }
}

async fn live(sim: Arc<Sim>, host: Arc<Host>, number: usize, session_process: Process) {
    let settings = Arc::new(settings(&host));
    let (events, waiting_events) = Events::new();
    let context = Arc::new(Context {
        boot_id: "boot".to_owned(),
        cgroup_base: None,
        known: Known::default(),
        routes: Routes::new(Arc::new(Plane(host.clone()))),
        board: Board::default(),
        session: Deadline::default(),
        leases: Leases::default(),
        events,
        taken_bytes: AtomicI64::new(0),
        turns: Turns::new(8),
        machine: Arc::new(Here(host.clone())),
        settings: settings.clone(),
    });
    let registry = match Registry::adopt(context.clone()).await {
        Ok(registry) => Arc::new(registry),
        Err(error) => return sim.tell(|| format!("agent {}: {error}", host.name)),
    };
    let capacity = Capacity { memory_bytes: host.capacity, cpus: 1, gpus: vec![] };
    let models = ModelInventory {
        roots: vec!["/m".to_owned()],
        files: vec![ModelFile { path: "/m/m.gguf".to_owned(), size_bytes: 1 }],
        truncated: false,
    };
    let (models_told, capacity_told) = (watch::Sender::new(models), watch::Sender::new(capacity.clone()));
    let (commands, _asked) = mpsc::channel(1);
    let (_answer, answers) = mpsc::channel(1);
    let stop = CancellationToken::new();
    let wiring = Wiring {
        registry,
        coordinators: Arc::new(Dialer { sim: sim.clone(), agent: number, node: host.node.clone() }),
        about: session::About {
            machine_id: format!("machine-{}", host.name),
            boot_id: context.boot_id.clone(),
            labels: BTreeMap::new(),
            capacity,
            proxy_address: "127.0.0.1:1".to_owned(),
        },
        events: waiting_events,
        checkpoint: session::Checkpoint(Arc::new(SpanCheckpoint::default)),
        models: models_told.subscribe(),
        capacity: capacity_told.subscribe(),
        commands,
        answers,
    };
    let (_identity, keeper) = link::wire(wiring, &stop);
    let stopped = stop.clone();
    let heartbeats = keeper.heartbeats();
    simulated::as_process(session_process, || {
        tokio::spawn(world::task(heartbeats.keep(stopped.clone())));
        tokio::spawn(world::task(keeper.keep(stopped)))
    });
    // The queues that nobody here uses stay open; what the agent believes of its session is looked at all the while.
    loop {
        let (id, deadline_ns) = context.session.granted();
        sim.deadline(&host.node, &id, deadline_ns);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn settings(host: &Host) -> Settings {
    Settings {
        node: host.node.clone(),
        coordinators: vec![],
        state_dir: "/state".into(),
        runtime_dir: "/run".into(),
        llama_server: "/llama-server".into(),
        llama_server_environment: BTreeMap::new(),
        model_roots: vec!["/m".into()],
        proxy_listen: SocketAddr::from(([127, 0, 0, 1], 1)),
        proxy_advertise: None,
        memory_bytes: host.capacity,
        labels: BTreeMap::new(),
        gpus: vec![],
        shim: "/drover-shim".into(),
        ready_file: None,
        join_secret_file: None,
        security: Security { secret: None, allow_plaintext: false },
        log_filter: String::new(),
        log_json: false,
        spool_bytes_max: 0,
        return_within: Duration::ZERO,
        restarts: Default::default(),
        launches_at_once: 8,
        cgroup_root: Root::Off,
    }
}
