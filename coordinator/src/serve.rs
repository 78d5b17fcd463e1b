//! Builds the coordinator from its parts and serves until a signal.

use crate::{
    api::{self, Elsewhere},
    audit::{self, Audit},
    config::{Config, StoreKind},
    control::{
        absences::Absences, alarm::Alarm, claims::Claims, clock, cycle::Cycle, events::Events, leader, reach::Reach,
        seen::Rate, sessions, space::Space, status::Statuses, view::View,
    },
    gateway::Gateway,
    plan::{self, snapshot::Snapshot},
    stall,
    store::{
        Store, etcd,
        guarded::Guarded,
        memory,
        schema::{self, Known},
    },
    web,
};
use anyhow::Context as _;
use drover_proto::{
    DESCRIPTORS, VERSION, limits,
    store::v1::Schema,
    transport::{self, Admit, Security},
    v1::{fleet_service_server::FleetServiceServer, node_service_server::NodeServiceServer},
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::TraceServiceServer;
use std::{path::Path, sync::Arc, time::Duration};
use tokio::{
    net::TcpListener,
    runtime::Handle,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;
use tonic::{codec::CompressionEncoding, service::interceptor::InterceptedService};

/// Longest time that requests in flight are waited for after a signal.
const DRAIN: Duration = Duration::from_secs(10);
/// Longest time that spans are exported for at the end.
const FLUSH: Duration = Duration::from_secs(3);

/// Runs a coordinator until SIGTERM or SIGINT. Connections of gRPC live on the runtime `connections`, and heartbeats and
/// renewals of leases with them; all else is done on the one that this is called on.
pub async fn run(config: Config, connections: Handle) -> anyhow::Result<()> {
    stall::watch();
    let telemetry = drover_telemetry::init(drover_telemetry::Settings {
        program: "drover-coordinator",
        instance: config.id.clone(),
        spool_dir: config.data_dir.join("spans"),
        log_filter: config.log_filter.clone(),
        log_json: config.log_json,
        spool_bytes_max: config.spool_bytes_max,
    })
    .context("telemetry")?;
    let security = config.security()?;
    security.check_listener("grpc_listen", config.grpc_listen)?;
    security.check_listener("http_listen", config.http_listen)?;
    // Bound before any work, so that a port that is taken costs nothing.
    let grpc = connections.spawn(TcpListener::bind(config.grpc_listen)).await?;
    let grpc = grpc.with_context(|| format!("grpc_listen = {}", config.grpc_listen))?;
    let http =
        TcpListener::bind(config.http_listen).await.with_context(|| format!("http_listen = {}", config.http_listen))?;
    let (grpc_address, http_address) = (grpc.local_addr()?, http.local_addr()?);
    let store = open_store(&config, connections.clone()).await?;

    let stop = CancellationToken::new();
    let audit = Audit::new(audit::Settings::from_env().context("the trace backend's settings")?);
    telemetry.start_export(audit.local_sink());
    let alarm = Alarm::new(Duration::from_millis(config.session_ttl_ms));
    let view = View::judged(store.clone(), alarm.clone(), stop.clone());
    let store: Store = Arc::new(Guarded::new(store, view.refused()));
    let (events, events_written) = Events::start(store.clone(), format!("coordinator/{}", config.id));
    let reach = Reach::start(store.clone(), view.clone(), events.clone(), stop.clone());
    let space = Space::start(store.clone(), events.clone(), stop.clone());
    let (leadership, mut election) = leader::start(store.clone(), view.clone(), config.id.clone(), stop.clone());
    let absences = Absences {
        store: store.clone(),
        view: view.clone(),
        leadership: leadership.clone(),
        events: events.clone(),
        coordinator: config.id.clone(),
    };
    let absences = tokio::spawn(absences.run(stop.clone()));
    let mut cycle = tokio::spawn(cycle(&config, &store, &view, &events).run(leadership, stop.clone()));

    let gateway = Gateway::new(config.gateway.clone(), http_address, &security, view.subscribe());
    let statuses = Statuses::new(store.clone(), view.clone(), events.clone());
    let sessions = sessions::Sessions {
        store: store.clone(),
        view: view.clone(),
        reach: reach.clone(),
        events: events.clone(),
        statuses,
        audit: audit.clone(),
        streams: sessions::Streams::default(),
        refusals: sessions::Refusals::default(),
        settings: sessions::Settings {
            coordinator: config.id.clone(),
            ttl: Duration::from_millis(config.session_ttl_ms),
            heartbeat_interval: Duration::from_millis(config.heartbeat_interval_ms),
        },
        stop: stop.clone(),
    };
    let node = api::Node::new(sessions, Claims::new(store.clone(), view.clone(), events.clone()));
    let fleet = api::Fleet::new(
        store.clone(),
        view.clone(),
        events.clone(),
        gateway.proxies(),
        &planning(&config),
        stop.clone(),
    );
    let mut grpc_server = serve_grpc(grpc, &security, fleet, node, audit.clone(), (stop.clone(), connections)).await?;
    let probe = Arc::new(Probe { reach, space, audit, alarm, freeze_share_percent: config.freeze_share_percent });
    let router = web::router(&gateway, view.subscribe(), probe);
    let mut http_server = tokio::spawn(web::serve(http, router, stop.clone(), DRAIN));

    tracing::info!(version = VERSION, id = config.id, grpc = %grpc_address, http = %http_address, "serving");
    if let Some(path) = &config.ready_file {
        let addresses = serde_json::json!({ "grpc": grpc_address.to_string(), "http": http_address.to_string() });
        drover_proto::files::write_atomically(path, addresses.to_string().as_bytes())
            .with_context(|| format!("ready_file = {}", path.display()))?;
    }
    // A part that ends by itself has failed: going on without it would look alive and be none of it.
    let failed = tokio::select! {
        signal = until_signal() => {
            signal?;
            tracing::info!("a signal asks for the end: draining");
            None
        }
        _ = &mut grpc_server => Some("the gRPC server"),
        _ = &mut http_server => Some("the HTTP server"),
        _ = &mut election => Some("the election"),
        _ = &mut cycle => Some("the cycle of planning"),
    };
    stop.cancel();
    let drained = async {
        // A task that has been looked at after its end may not be asked again.
        if failed.is_none() {
            let _ = election.await;
            let _ = absences.await;
            let _ = http_server.await;
            let _ = grpc_server.await;
        }
        // The parts that hold the other handles have ended; what is queued is written.
        drop(events);
        let _ = events_written.await;
    };
    if tokio::time::timeout(DRAIN, drained).await.is_err() {
        tracing::warn!("not everything ended within {} s", DRAIN.as_secs());
    }
    if config.store == StoreKind::Etcd
        && let Some(known) = Known::of(&view.snapshot())
        && let Err(error) = remember(&config.data_dir.join("store"), &known)
    {
        tracing::warn!("{error:#}");
    }
    telemetry.shutdown(FLUSH).await;
    failed
        .map_or(Ok(()), |part| Err(anyhow::anyhow!("{part} has ended by itself: see the log; start the program again")))
}

/// The store; it renews leases over a connection of their own.
async fn open_store(config: &Config, connections: Handle) -> anyhow::Result<Store> {
    let store: Store = match config.store {
        StoreKind::Memory => {
            tracing::warn!("the store is this process's memory: nothing survives its end");
            Arc::new(memory::Memory::start(rand::random()))
        }
        StoreKind::Etcd => {
            let settings = etcd::Settings {
                prefix: config.etcd_prefix.clone(),
                renewals: Some(connections),
                ..etcd::Settings::new(config.etcd_endpoints.clone())
            };
            Arc::new(etcd::Etcd::connect(settings).await?)
        }
    };
    // What is in memory is new each time.
    let file = config.data_dir.join("store");
    let known = match config.store {
        StoreKind::Etcd if !config.new_store => remembered(&file)?,
        StoreKind::Etcd | StoreKind::Memory => None,
    };
    let schema = schema::open(&store, known.as_ref()).await.map_err(|error| match error {
        schema::Error::Changed(why) => anyhow::anyhow!(
            "{why} (as {} says): restore the store; if it is lost, end all servers and start with --new-store",
            file.display()
        ),
        error => error.into(),
    })?;
    if config.store == StoreKind::Etcd {
        let Schema { id, generation, .. } = schema.value.clone();
        remember(&file, &Known { id, generation, revision: schema.mod_revision })?;
    }
    tracing::info!(generation = schema.value.generation, format = schema.value.format, "the store is open");
    Ok(store)
}

/// The store that this replica has used before, so that an empty or older one is not taken for it after a restart.
fn remembered(file: &Path) -> anyhow::Result<Option<Known>> {
    match std::fs::read(file) {
        Ok(content) => {
            let known = serde_json::from_slice(&content);
            Ok(Some(known.with_context(|| format!("{} can't be read: remove it", file.display()))?))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| file.display().to_string()),
    }
}

fn remember(file: &Path, known: &Known) -> anyhow::Result<()> {
    let write = || {
        std::fs::create_dir_all(file.parent().unwrap_or(Path::new(".")))?;
        drover_proto::files::write_atomically(file, &serde_json::to_vec(known)?)
    };
    write().with_context(|| format!("{}: which store this is can't be written down", file.display()))
}

/// Settings of planning.
fn planning(config: &Config) -> plan::Settings {
    let ms = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
    plan::Settings {
        candidates: config.offer_candidates,
        offer_deadline_ms: ms(config.offer_deadline_ms),
        grace_ms: ms(config.session_ttl_ms),
        revisions_kept: 10,
        freeze_share_percent: config.freeze_share_percent,
        progress_deadline_ms: ms(config.progress_deadline_ms),
        give_up_after_ms: ms(config.give_up_after_ms),
        avoid: plan::avoid::Delays { first_ms: ms(config.avoid_first_ms), max_ms: ms(config.avoid_max_ms) },
    }
}

fn cycle(config: &Config, store: &Store, view: &View, events: &Events) -> Cycle {
    Cycle {
        store: store.clone(),
        view: view.clone(),
        events: events.clone(),
        settings: planning(config),
        replace_rate: Rate { burst: config.replace_burst, per_s: config.replace_per_s },
        seed: rand::random(),
    }
}

/// What `/readyz` and `/metrics` ask for.
struct Probe {
    reach: Reach,
    space: Space,
    audit: Audit,
    alarm: Alarm,
    freeze_share_percent: u32,
}

impl web::Probe for Probe {
    fn store_lost(&self) -> Option<web::StoreLost> {
        self.reach.lost().map(|lost| web::StoreLost { elapsed: lost.elapsed(), why: lost.why.to_string() })
    }

    fn store_out_of_space(&self) -> bool {
        self.space.is_out()
    }

    fn freeze(&self, snapshot: &Snapshot) -> plan::Freeze {
        plan::Freeze::of(snapshot, clock::now_ms(), self.freeze_share_percent)
    }

    fn spans_received(&self) -> u64 {
        self.audit.counts().received
    }

    fn violations(&self) -> Vec<(String, u64)> {
        self.alarm.counts()
    }
}

async fn serve_grpc(
    listener: TcpListener,
    security: &Security,
    fleet: api::Fleet,
    node: api::Node,
    audit: Audit,
    (stop, connections): (CancellationToken, Handle),
) -> anyhow::Result<tokio::task::JoinHandle<Result<(), tonic::transport::Error>>> {
    let admit = Admit::new(security.clone());
    let max = limits::MESSAGE_BYTES_MAX;
    let fleet = FleetServiceServer::new(fleet).max_decoding_message_size(max);
    let node = NodeServiceServer::new(node).max_decoding_message_size(max);
    let traces = audit.service().max_decoding_message_size(max).accept_compressed(CompressionEncoding::Gzip);
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<FleetServiceServer<api::Fleet>>().await;
    health.set_serving::<NodeServiceServer<api::Node>>().await;
    health.set_serving::<TraceServiceServer<audit::Ingest>>().await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // Many clients (grpcurl before 1.8.9, Python's) still ask the older form.
    let reflection_v1alpha = reflection().build_v1alpha().context("reflection")?;
    let reflection = reflection().build_v1().context("reflection")?;
    let here = Handle::current();
    let router = transport::server()
        .add_service(InterceptedService::new(Elsewhere::new(fleet, here.clone()), admit.clone()))
        .add_service(InterceptedService::new(Elsewhere::new(node, here.clone()), admit.clone()))
        .add_service(InterceptedService::new(Elsewhere::new(traces, here), admit.clone()))
        .add_service(InterceptedService::new(reflection, admit.clone()))
        .add_service(InterceptedService::new(reflection_v1alpha, admit))
        .add_service(health_service);
    let incoming = transport::incoming(listener);
    Ok(connections.spawn(async move { router.serve_with_incoming_shutdown(incoming, stop.cancelled_owned()).await }))
}

async fn until_signal() -> anyhow::Result<()> {
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
