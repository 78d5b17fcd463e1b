//! The coordinator's HTTP listener: the gateway's paths, `/healthz`, `/readyz` and `/metrics`.
//!
//! `/readyz` is of the whole coordinator: without the store it can change nothing, and says so. Routing needs only what it saw
//! last: whoever balances requests over several gateways asks `/readyz/gateway`, or an outage of the store, which none of
//! the servers feels, would take all of them out.
//!
//! Owns: the listener and its connections ([`serve`]). Must never: decide anything; it shows what others know.

mod metrics;
mod serve;
#[cfg(test)]
mod tests;

use crate::{
    gateway::{Gateway, error},
    plan::{Freeze, snapshot::Snapshot},
};
use axum::{
    Router,
    extract::State,
    http::{StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
    routing::get,
};
use serde_json::{Value, json};
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;

pub use serve::serve;

/// The store is out of reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreLost {
    /// For how long.
    pub elapsed: Duration,
    /// Why, for people.
    pub why: String,
}

/// What the coordinator's parts say of themselves.
pub trait Probe: Send + Sync + 'static {
    /// `None` when the view follows the store and the store answers.
    fn store_lost(&self) -> Option<StoreLost>;
    /// Whether the store refuses changes because it is out of space.
    fn store_out_of_space(&self) -> bool {
        false
    }
    /// Whether nothing is replaced, by this snapshot.
    fn freeze(&self, snapshot: &Snapshot) -> Freeze;
    /// Spans received from agents and others since the start.
    fn spans_received(&self) -> u64;
    /// How often each rule of claiming was broken, as far as this replica has seen, by the rule's name.
    fn violations(&self) -> Vec<(String, u64)>;
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
        .route("/readyz/gateway", get(readyz_gateway))
        .route("/metrics", get(metrics_page))
        .with_state(sources)
        .merge(gateway.router())
        .fallback(async |uri: Uri| error::unknown_path(uri.path()).into_response())
}

async fn readyz(State(sources): State<Sources>) -> Response {
    match sources.probe.store_lost() {
        None => said(StatusCode::OK, &json!({"ready": true})),
        Some(lost) => {
            let reason = format!("the store is out of reach since {} s: {}", lost.elapsed.as_secs(), lost.why);
            said(
                StatusCode::SERVICE_UNAVAILABLE,
                &json!({"ready": false, "reason": reason, "lost_ms": ms(lost.elapsed)}),
            )
        }
    }
}

/// Ready to route: the store was read once, however long ago.
async fn readyz_gateway(State(sources): State<Sources>) -> Response {
    if sources.snapshots.borrow().revision == 0 {
        let reason = "this coordinator has not read the store yet";
        return said(StatusCode::SERVICE_UNAVAILABLE, &json!({"ready": false, "reason": reason}));
    }
    let lost_ms = sources.probe.store_lost().map_or(0, |lost| ms(lost.elapsed));
    said(StatusCode::OK, &json!({"ready": true, "lost_ms": lost_ms}))
}

fn said(status: StatusCode, body: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

async fn metrics_page(State(sources): State<Sources>) -> Response {
    let snapshot = sources.snapshots.borrow().clone();
    match metrics::text(&sources.gateway.counts(), &snapshot, sources.probe.as_ref()) {
        Ok(text) => ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("metrics: {error}\n")).into_response(),
    }
}
