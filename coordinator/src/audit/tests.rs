//! The audit over real gRPC, between real sources and a real collector.

use super::*;
use drover_proto::transport::{Security, Target};
use drover_telemetry::{GrpcSink, Limits, SEQUENCE_ATTRIBUTE, Source};
use drover_tests::collector::{Answer, Collector, Received};
use opentelemetry::trace::{Span as _, Tracer as _, TracerProvider as _};
use opentelemetry_sdk::trace::SdkTracerProvider;
use std::{net::SocketAddr, time::Duration};
use tonic::{Code, Status, transport::server::TcpIncoming};

const DEADLINE: Duration = Duration::from_secs(20);

fn settings(collector: &Collector) -> Settings {
    let headers = vec![("api-key".parse().unwrap(), "secret".parse().unwrap())];
    let endpoint = Some(collector.endpoint().parse().unwrap());
    Settings { endpoint, headers, timeout: Duration::from_millis(500), gzip: true }
}

async fn serve(audit: &Audit) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = drover_proto::transport::server().add_service(audit.service());
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    address
}

fn target(address: SocketAddr) -> Target {
    Target::new(&[address.to_string()], &Security::default(), Some("a")).unwrap()
}

fn source(directory: &std::path::Path) -> (Source, SdkTracerProvider) {
    let limits = Limits {
        batch_spans: 50,
        linger: Duration::from_millis(5),
        backoff: Duration::from_millis(5),
        ..Limits::default()
    };
    let source = Source::open("drover-agent", "a", directory, 1 << 20, limits).unwrap();
    let provider = SdkTracerProvider::builder().with_span_processor(source.processor()).build();
    (source, provider)
}

fn make(provider: &SdkTracerProvider, count: usize) {
    let tracer = provider.tracer("drover");
    (0..count).for_each(|_| tracer.start("work").end());
}

fn numbers(spans: &[Received], epoch: &str) -> Vec<u64> {
    spans.iter().filter(|s| s.epoch() == epoch).map(Received::sequence).collect()
}

#[tokio::test]
async fn spans_of_an_agent_and_our_own_reach_the_backend_once_though_it_was_away() {
    let collector = Collector::start().await.unwrap();
    let soon = Some(Duration::from_millis(10));
    collector.answer_next([Answer::Unavailable(soon), Answer::Unavailable(soon), Answer::Unavailable(soon)]);
    let audit = Audit::new(settings(&collector));
    let address = serve(&audit).await;
    let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [agent, own] = [0, 1].map(|i| source(directories[i].path()));
    make(&agent.1, 300);
    make(&own.1, 200);
    agent.0.start_export(Arc::new(GrpcSink::new(target(address))));
    own.0.start_export(audit.local_sink());
    let spans = collector.wait_for(|spans| spans.len() >= 500, DEADLINE).await.unwrap();
    let (agent, own) = (agent.0.shutdown(DEADLINE).await, own.0.shutdown(DEADLINE).await);
    assert_eq!(numbers(&spans, &agent.epoch), (1..=300).collect::<Vec<_>>());
    assert_eq!(numbers(&spans, &own.epoch), (1..=200).collect::<Vec<_>>());
    assert_eq!((agent.acknowledged, own.acknowledged), (300, 200));
    let counts = audit.counts();
    assert_eq!((counts.accepted, counts.rejected, counts.refused, counts.unaudited), (500, 0, 0, 0));
    assert!(counts.pushed_back > 0 && counts.received == 500 + counts.pushed_back, "{counts:?}");
    let epoch = audit.epochs().into_iter().find(|e| e.epoch == agent.epoch).unwrap();
    assert_eq!((epoch.accepted, epoch.program.as_str()), (300, "drover-agent"));
    assert!(collector.metadata().iter().all(|m| m.get("api-key").unwrap() == "secret"));
}

#[tokio::test]
async fn nothing_is_acknowledged_that_the_backend_has_not_taken() {
    let collector = Collector::start().await.unwrap();
    let audit = Audit::new(settings(&collector));
    let sink = audit.local_sink();
    let batch = || {
        let spans = vec![Default::default(); 10];
        let scope_spans = vec![opentelemetry_proto::tonic::trace::v1::ScopeSpans { spans, ..Default::default() }];
        let resource_spans =
            vec![opentelemetry_proto::tonic::trace::v1::ResourceSpans { scope_spans, ..Default::default() }];
        ExportTraceServiceRequest { resource_spans }
    };
    let away = |result: Result<(), ExportError>| match result {
        Err(ExportError::Retry { after, .. }) => after,
        other => panic!("{other:?}"),
    };
    collector.answer(Answer::Hang);
    assert_eq!(away(sink.export(batch()).await), Some(Duration::from_secs(1)));
    collector.answer(Answer::Unavailable(Some(Duration::from_secs(7))));
    assert_eq!(away(sink.export(batch()).await), Some(Duration::from_secs(7)));
    collector.answer(Answer::Status(Status::unauthenticated("who?")));
    assert_eq!(away(sink.export(batch()).await), Some(Duration::from_secs(10)));
    collector.answer(Answer::Status(Status::invalid_argument("no")));
    assert!(matches!(sink.export(batch()).await, Err(ExportError::Refused { .. })));
    collector.answer(Answer::Partial(3));
    assert!(matches!(sink.export(batch()).await, Err(ExportError::Partial { rejected: 3, .. })));
    collector.stop().await.unwrap();
    assert!(away(sink.export(batch()).await).is_some());
    let counts = audit.counts();
    assert_eq!((counts.received, counts.accepted, counts.rejected, counts.refused), (60, 7, 3, 10));
    assert_eq!((counts.pushed_back, counts.unaudited), (40, 60));
}

#[tokio::test]
async fn without_a_backend_received_is_acknowledged_from_any_otlp_exporter() {
    use opentelemetry_otlp::WithExportConfig as _;
    let audit = Audit::new(Settings::default());
    let address = serve(&audit).await;
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(format!("http://{address}"))
        .build()
        .unwrap();
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).build();
    make(&provider, 20);
    tokio::task::spawn_blocking(move || provider.shutdown()).await.unwrap().unwrap();
    let counts = audit.counts();
    assert_eq!((counts.received, counts.accepted, counts.unaudited, counts.epochs), (20, 20, 20, 0));
    assert!(!audit.forwards());
}

#[tokio::test]
async fn a_batch_over_the_limit_is_refused_and_not_counted() {
    let audit = Audit::new(Settings::default());
    let address = serve(&audit).await;
    let connection = target(address).connect(0).await.unwrap();
    let mut client =
        opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient::new(connection);
    let large = opentelemetry_proto::tonic::trace::v1::ResourceSpans {
        schema_url: "x".repeat(drover_proto::limits::MESSAGE_BYTES_MAX + 1),
        ..Default::default()
    };
    let status = client.export(ExportTraceServiceRequest { resource_spans: vec![large] }).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange);
    assert_eq!(audit.counts(), Counts::default());
    // The attribute that every numbered span bears is part of what the audit builds on.
    assert_eq!(SEQUENCE_ATTRIBUTE, "drover.sequence");
}
