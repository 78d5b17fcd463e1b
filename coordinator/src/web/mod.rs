//! The coordinator's HTTP listener: the gateway's paths, `/healthz`, `/readyz` and `/metrics`.
//!
//! Owns: the listener and its connections ([`serve`]). Must never: decide anything; it shows what others know.

mod metrics;
mod serve;
#[cfg(test)]
mod tests;

use crate::{
    gateway::{Gateway, error},
    plan::snapshot::Snapshot,
};
use async_trait::async_trait;
use axum::{
    Router,
    extract::State,
    http::{StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use std::{sync::Arc, time::Duration};
use tokio::{sync::watch, time::timeout};

pub use serve::serve;

/// Longest time that a readiness probe waits.
const READY_DEADLINE: Duration = Duration::from_secs(2);

/// What the coordinator's parts say of themselves.
#[async_trait]
pub trait Probe: Send + Sync + 'static {
    /// Ready when the view follows the store and the store answers; else the reason, for people.
    async fn ready(&self) -> Result<(), String>;
    /// Spans received from agents and others since the start.
    fn spans_received(&self) -> u64;
}

/// What the pages are made from.
#[derive(Clone)]
struct Sources {
    gateway: Gateway,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    probe: Arc<dyn Probe>,
}

/// All that the HTTP listener serves.
pub fn router(gateway: &Gateway, snapshots: watch::Receiver<Arc<Snapshot>>, probe: Arc<dyn Probe>) -> Router {
    let sources = Sources { gateway: gateway.clone(), snapshots, probe };
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics_page))
        .with_state(sources)
        .merge(gateway.router())
        .fallback(async |uri: Uri| error::unknown_path(uri.path()).into_response())
}

async fn readyz(State(sources): State<Sources>) -> Response {
    let ready = timeout(READY_DEADLINE, sources.probe.ready()).await;
    let reason = match ready {
        Ok(Ok(())) => return ([(header::CONTENT_TYPE, "application/json")], r#"{"ready":true}"#).into_response(),
        Ok(Err(reason)) => reason,
        Err(_) => format!("no answer within {} s", READY_DEADLINE.as_secs()),
    };
    let body = serde_json::json!({"ready": false, "reason": reason}).to_string();
    (StatusCode::SERVICE_UNAVAILABLE, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

async fn metrics_page(State(sources): State<Sources>) -> Response {
    let snapshot = sources.snapshots.borrow().clone();
    match metrics::text(&sources.gateway.counts(), &snapshot, sources.probe.spans_received()) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("metrics: {error}\n")).into_response(),
    }
}
