//! What these tests share: the collector of the end-to-end tests, a source that sends to it, and spans in plenty.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "what fails here fails a test")]

#[path = "../../../../tests/src/collector.rs"]
pub mod collector;

use drover_proto::transport::{Security, Target};
use drover_telemetry::{GrpcSink, Limits, Source};
use opentelemetry::trace::{Span as _, Tracer as _, TracerProvider as _};
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use std::{path::Path, sync::Arc, time::Duration};

/// Longest wait for anything in these tests.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Limits that don't keep a test waiting.
pub fn quick() -> Limits {
    Limits {
        batch_spans: 50,
        linger: Duration::from_millis(5),
        backoff: Duration::from_millis(5),
        backoff_max: Duration::from_millis(50),
        export_timeout: Duration::from_millis(500),
        ..Limits::default()
    }
}

pub fn open(directory: &Path, limits: Limits) -> (Source, SdkTracerProvider) {
    let source = Source::open("drover-test", "one", directory, 16 << 20, limits).unwrap();
    let provider = SdkTracerProvider::builder()
        .with_sampler(source.counting(Sampler::AlwaysOn))
        .with_span_processor(source.processor())
        .build();
    (source, provider)
}

pub fn sink(collector: &collector::Collector) -> Arc<GrpcSink> {
    let address = collector.address().to_string();
    Arc::new(GrpcSink::new(Target::new(&[address], &Security::default(), None).unwrap()))
}

pub fn spans(provider: &SdkTracerProvider, count: usize) {
    let tracer = provider.tracer("drover");
    for _ in 0..count {
        tracer.start("work").end();
    }
}

/// The numbers of one epoch among what a collector took, in the order of arrival.
pub fn sequences(spans: &[collector::Received], epoch: &str) -> Vec<u64> {
    spans.iter().filter(|s| s.epoch() == epoch).map(collector::Received::sequence).collect()
}
