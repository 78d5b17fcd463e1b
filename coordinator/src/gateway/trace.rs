//! The trace of one request: the span `gateway.request`, from its arrival to the end of its answer.

use super::{routes::Backend, timings::Timings};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use drover_telemetry::context;
use tracing::{Span, field::Empty};

/// Opens the span; it goes on with the caller's trace where the request names one.
pub(super) fn open(headers: &HeaderMap, path: &str, id: &HeaderValue) -> Span {
    let span = tracing::info_span!(
        target: "drover",
        "gateway.request",
        otel.kind = "server",
        otel.status_code = Empty,
        otel.status_description = Empty,
        path,
        request_id = id.to_str().unwrap_or_default(),
        model = Empty,
        stream = Empty,
        instance = Empty,
        node = Empty,
        attempts = Empty,
        status = Empty,
        bytes = Empty,
        outcome = Empty,
        llama.timings.cache_n = Empty,
        llama.timings.prompt_n = Empty,
        llama.timings.prompt_ms = Empty,
        llama.timings.prompt_per_second = Empty,
        llama.timings.predicted_n = Empty,
        llama.timings.predicted_ms = Empty,
        llama.timings.predicted_per_second = Empty,
    );
    context::set_parent(&span, &context::extract(headers));
    span
}

pub(super) fn asked(span: &Span, model: &str, stream: bool) {
    span.record("model", model);
    span.record("stream", stream);
}

pub(super) fn attempt(span: &Span, backend: &Backend, attempts: u32) {
    span.record("instance", &backend.instance);
    span.record("node", &backend.node);
    span.record("attempts", attempts);
}

pub(super) fn status(span: &Span, status: StatusCode) {
    span.record("status", status.as_u16());
}

pub(super) fn failed(span: &Span, message: &str) {
    span.record("otel.status_code", "ERROR");
    span.record("otel.status_description", message);
}

/// The answer's end: `outcome` is "complete", "broken" or "abandoned".
pub(super) fn ended(span: &Span, outcome: &'static str, bytes: u64, timings: Option<Timings>) {
    span.record("outcome", outcome);
    span.record("bytes", bytes);
    let Some(timings) = timings else { return };
    // Counts are whole numbers far below the limits of either type.
    let counts = [
        ("llama.timings.cache_n", timings.cache_n),
        ("llama.timings.prompt_n", timings.prompt_n),
        ("llama.timings.predicted_n", timings.predicted_n),
    ];
    for (name, value) in counts {
        if let Some(value) = value {
            span.record(name, value as i64);
        }
    }
    let measures = [
        ("llama.timings.prompt_ms", timings.prompt_ms),
        ("llama.timings.prompt_per_second", timings.prompt_per_second),
        ("llama.timings.predicted_ms", timings.predicted_ms),
        ("llama.timings.predicted_per_second", timings.predicted_per_second),
    ];
    for (name, value) in measures {
        if let Some(value) = value {
            span.record(name, value);
        }
    }
}
