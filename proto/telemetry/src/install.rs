//! What a program calls once, when it begins: the global subscriber with its two layers (logs, spans) and the span source.

use crate::{
    environment::{Exporter, Limits},
    log::{Home, RememberHome, WithTraceId},
    mapped::Counters,
    sampler::{self, Counting},
    sink::Sink,
    source::{Checkpoint, Handle, Source},
};
use anyhow::Context as _;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use std::{path::PathBuf, sync::Arc, time::Duration};
use tracing::{Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::Targets,
    fmt::{
        self,
        format::{DefaultFields, JsonFields},
    },
    layer::SubscriberExt as _,
    registry::LookupSpan,
};

/// Name of the instrumentation scope of all of Drover's spans.
pub(crate) const SCOPE: &str = "drover";

/// What a program says of itself and wants.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of the program: "drover-agent". `OTEL_SERVICE_NAME` wins.
    pub program: &'static str,
    /// Which one it is: the name of the node or the id of the coordinator.
    pub instance: String,
    /// Directory of the span spool; made if it is not there. Several processes may share it.
    pub spool_dir: PathBuf,
    /// What is logged, in the form of `RUST_LOG`: "info,drover_agent=debug".
    pub log_filter: String,
    /// Log lines as JSON objects.
    pub log_json: bool,
    /// Most bytes of spans that wait in the spool; 64 KiB at least.
    pub spool_bytes_max: u64,
}

/// A program's telemetry. Lives in `main` until the end.
#[derive(Debug)]
pub struct Telemetry {
    provider: SdkTracerProvider,
    source: Option<Source>,
    exporter: Exporter,
    handle: Handle,
}

/// Installs the global subscriber and begins the life of the span source. Fails when the log filter can't be read or a
/// subscriber was installed before; a disk that refuses is only told.
pub fn init(settings: Settings) -> anyhow::Result<Telemetry> {
    let filter = EnvFilter::try_new(&settings.log_filter).with_context(|| {
        format!("log_filter = \"{}\": expected directives like \"info,drover_agent=debug\"", settings.log_filter)
    })?;
    let get = |name: &str| std::env::var(name).ok();
    let mut warnings = Vec::new();
    let exporter = Exporter::from_environment(get, &mut warnings);
    let limits = Limits::from_environment(get, &mut warnings);
    let (sampler, warning) = sampler::from_environment(get);
    warnings.extend(warning);

    let builder = SdkTracerProvider::builder().with_resource(opentelemetry_sdk::Resource::builder_empty().build());
    // What opening the spool has to tell is told before there is a subscriber: it goes to a log of its own.
    let home = Home::default();
    let early = fmt::Subscriber::builder().with_writer(std::io::stderr).with_ansi(false).finish();
    let (provider, source, handle) = if exporter == Exporter::None {
        let counters = Arc::new(Counters::in_memory().context("no memory for counters")?);
        let sampler = Counting::new(sampler, counters.clone());
        (builder.with_sampler(sampler).build(), None, Handle::without_spool(counters))
    } else {
        let source = tracing::subscriber::with_default(early, || {
            Source::open(settings.program, &settings.instance, &settings.spool_dir, settings.spool_bytes_max, limits)
        })
        .context("the span source could not be started")?;
        let provider = builder.with_sampler(source.counting(sampler)).with_span_processor(source.processor()).build();
        let handle = source.handle();
        (provider, Some(source), handle)
    };
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(SCOPE))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        // Of our own crates only: the spans of tonic and h2 below an export would make new ones without end.
        .with_filter(Targets::new().with_target("drover", LevelFilter::INFO));
    let subscriber = tracing_subscriber::registry()
        .with(spans)
        .with(log_layer(settings.log_json, home.clone()).with_filter(filter))
        .with(RememberHome(home));
    tracing::subscriber::set_global_default(subscriber).context("telemetry was initialised twice")?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    Ok(Telemetry { provider, source, exporter, handle })
}

fn log_layer<S>(json: bool, home: Home) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let layer = fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    if json {
        let inner = fmt::format().json().flatten_event(true).with_current_span(false).with_span_list(true);
        layer.event_format(WithTraceId { inner, json, home }).fmt_fields(JsonFields::new()).boxed()
    } else {
        layer.event_format(WithTraceId { inner: fmt::format(), json, home }).fmt_fields(DefaultFields::new()).boxed()
    }
}

impl Telemetry {
    /// Begins to export; the sink is not used when `OTEL_TRACES_EXPORTER` says `console` or `none`. Must be called within a
    /// tokio runtime.
    pub fn start_export(&self, sink: Arc<dyn Sink>) {
        match (&self.source, self.exporter) {
            (Some(source), Exporter::Console) => source.start_export(Arc::new(crate::console::Console)),
            (Some(source), _) => source.start_export(sink),
            (None, _) => {}
        }
    }

    /// A handle to the span source.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Ends it: every span that has ended goes to the spool, and as many as possible to the sink until `deadline`. Spans that
    /// end later are not recorded. Returns the last checkpoint.
    pub async fn shutdown(self, deadline: Duration) -> Checkpoint {
        let provider = self.provider.clone();
        let until = tokio::time::Instant::now() + deadline;
        let ended = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(deadline));
        match tokio::time::timeout_at(until, ended).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::warn!(%error, "spans were not written to the spool in time"),
            Ok(Err(error)) => tracing::warn!(%error, "spans were not written to the spool"),
            Err(_) => tracing::warn!("spans were not written to the spool in time"),
        }
        match &self.source {
            Some(source) => source.shutdown(until.saturating_duration_since(tokio::time::Instant::now())).await,
            None => self.handle.checkpoint(),
        }
    }
}
