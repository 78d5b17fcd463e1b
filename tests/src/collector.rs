//! A real OTLP/gRPC collector for tests: records every span and answers as it is told to.

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::Span,
};
use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::Notify;
use tonic::{Request, Response, Status, codec::CompressionEncoding, transport::server::TcpIncoming};
use tonic_types::{ErrorDetails, StatusExt as _};

/// How the collector answers a batch.
#[derive(Debug, Clone)]
pub enum Answer {
    /// Takes it.
    Accept,
    /// UNAVAILABLE, with a RetryInfo if there is a delay.
    Unavailable(Option<Duration>),
    /// This status.
    Status(Status),
    /// Takes it, but says that it rejected so many spans.
    Partial(i64),
    /// Never answers.
    Hang,
}

/// A span that was taken.
#[derive(Debug, Clone)]
pub struct Received {
    /// Attributes of its resource, as text.
    pub resource: BTreeMap<String, String>,
    /// The span.
    pub span: Span,
}

impl Received {
    /// An attribute of the span, as text.
    #[must_use]
    pub fn attribute(&self, key: &str) -> Option<String> {
        self.span.attributes.iter().find(|a| a.key == key).map(text)
    }

    /// Number within the epoch; 0 for a span that has none.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.attribute("drover.sequence").and_then(|n| n.parse().ok()).unwrap_or_default()
    }

    /// Epoch of its source; empty for a span that has none.
    #[must_use]
    pub fn epoch(&self) -> &str {
        self.resource.get("drover.epoch").map_or("", String::as_str)
    }

    /// Name of the program that made it.
    #[must_use]
    pub fn service(&self) -> &str {
        self.resource.get("service.name").map_or("", String::as_str)
    }

    /// Trace id, in hexadecimal digits.
    #[must_use]
    pub fn trace_id(&self) -> String {
        self.span.trace_id.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[derive(Debug, Default)]
struct State {
    answers: VecDeque<Answer>,
    otherwise: Option<Answer>,
    spans: Vec<Received>,
    attempts: Vec<ExportTraceServiceRequest>,
    metadata: Vec<tonic::metadata::MetadataMap>,
}

#[derive(Debug, Clone, Default)]
struct Shared {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
}

/// The collector; ends when it is dropped, its connections too.
#[derive(Debug)]
pub struct Collector {
    shared: Shared,
    address: SocketAddr,
    /// Of its own, so that ending it ends the tasks of its connections.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Collector {
    /// Starts one that takes everything, on a free port of the loopback.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_at("127.0.0.1:0".parse()?).await
    }

    /// Starts one at an address, for example that of one that was stopped.
    pub async fn start_at(address: SocketAddr) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let shared = Shared::default();
        let service = TraceServiceServer::new(shared.clone()).accept_compressed(CompressionEncoding::Gzip);
        let bound = runtime.spawn(async move {
            let listener = tokio::net::TcpListener::bind(address).await?;
            let address = listener.local_addr()?;
            let server = tonic::transport::Server::builder().add_service(service);
            // It only ends with the runtime; a failure shows as spans that don't arrive.
            tokio::spawn(async move { server.serve_with_incoming(TcpIncoming::from(listener)).await });
            Ok::<_, std::io::Error>(address)
        });
        let mut collector = Self { shared, address, runtime: Some(runtime) };
        collector.address = bound.await??;
        Ok(collector)
    }

    /// Stops it: what is in flight gets no answer, and its address is free afterwards.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        if let Some(runtime) = self.runtime.take() {
            tokio::task::spawn_blocking(move || runtime.shutdown_timeout(Duration::from_secs(5))).await?;
        }
        Ok(())
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Value for `OTEL_EXPORTER_OTLP_ENDPOINT`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Answers the next batches with these, one each, before `otherwise` counts again.
    pub fn answer_next(&self, answers: impl IntoIterator<Item = Answer>) {
        self.shared.lock().answers.extend(answers);
    }

    /// Answers every batch like this from now on.
    pub fn answer(&self, answer: Answer) {
        let mut state = self.shared.lock();
        state.answers.clear();
        state.otherwise = Some(answer);
    }

    /// Spans taken so far, in the order of arrival.
    #[must_use]
    pub fn spans(&self) -> Vec<Received> {
        self.shared.lock().spans.clone()
    }

    /// Every batch that arrived, whatever the answer.
    #[must_use]
    pub fn attempts(&self) -> Vec<ExportTraceServiceRequest> {
        self.shared.lock().attempts.clone()
    }

    /// Metadata of every call.
    #[must_use]
    pub fn metadata(&self) -> Vec<tonic::metadata::MetadataMap> {
        self.shared.lock().metadata.clone()
    }

    /// Waits until the spans taken fulfil a condition.
    pub async fn wait_for(
        &self,
        condition: impl Fn(&[Received]) -> bool,
        deadline: Duration,
    ) -> anyhow::Result<Vec<Received>> {
        self.wait(|state| condition(&state.spans).then(|| state.spans.clone()), deadline).await
    }

    /// Waits until so many batches have arrived, whatever the answers.
    pub async fn wait_for_attempts(
        &self,
        count: usize,
        deadline: Duration,
    ) -> anyhow::Result<Vec<ExportTraceServiceRequest>> {
        self.wait(|state| (state.attempts.len() >= count).then(|| state.attempts.clone()), deadline).await
    }

    async fn wait<T>(&self, found: impl Fn(&State) -> Option<T>, deadline: Duration) -> anyhow::Result<T> {
        let until = tokio::time::Instant::now() + deadline;
        loop {
            let changed = self.shared.changed.notified();
            if let Some(found) = found(&self.shared.lock()) {
                return Ok(found);
            }
            if tokio::time::timeout_at(until, changed).await.is_err() {
                let state = self.shared.lock();
                let names: Vec<_> = state.spans.iter().rev().take(50).map(|s| s.span.name.clone()).collect();
                anyhow::bail!(
                    "not within {deadline:?}; {} spans in {} batches, the last: {names:?}",
                    state.spans.len(),
                    state.attempts.len()
                );
            }
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, request: Request<ExportTraceServiceRequest>) -> Answer {
        let (metadata, _, batch) = request.into_parts();
        let mut state = self.lock();
        state.metadata.push(metadata);
        let answer = state.answers.pop_front().or_else(|| state.otherwise.clone()).unwrap_or(Answer::Accept);
        if matches!(answer, Answer::Accept | Answer::Partial(_)) {
            for resource in &batch.resource_spans {
                let attributes = resource.resource.iter().flat_map(|r| &r.attributes);
                let of: BTreeMap<_, _> = attributes.map(|a| (a.key.clone(), text(a))).collect();
                let spans = resource.scope_spans.iter().flat_map(|scope| scope.spans.iter().cloned());
                state.spans.extend(spans.map(|span| Received { resource: of.clone(), span }));
            }
        }
        state.attempts.push(batch);
        drop(state);
        self.changed.notify_waiters();
        answer
    }
}

#[tonic::async_trait]
impl TraceService for Shared {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let partial_success = match self.record(request) {
            Answer::Accept => None,
            Answer::Partial(rejected_spans) => {
                Some(ExportTracePartialSuccess { rejected_spans, error_message: "told to".to_owned() })
            }
            Answer::Unavailable(None) => return Err(Status::unavailable("told to")),
            Answer::Unavailable(delay) => {
                let details = ErrorDetails::with_retry_info(delay);
                return Err(Status::with_error_details(tonic::Code::Unavailable, "told to", details));
            }
            Answer::Status(status) => return Err(status),
            Answer::Hang => std::future::pending().await,
        };
        Ok(Response::new(ExportTraceServiceResponse { partial_success }))
    }
}

fn text(attribute: &KeyValue) -> String {
    match attribute.value.as_ref() {
        Some(AnyValue { value: Some(Value::StringValue(text)) }) => text.clone(),
        Some(AnyValue { value: Some(Value::IntValue(number)) }) => number.to_string(),
        Some(AnyValue { value: Some(Value::BoolValue(truth)) }) => truth.to_string(),
        Some(AnyValue { value: Some(Value::DoubleValue(number)) }) => number.to_string(),
        other => format!("{other:?}"),
    }
}
