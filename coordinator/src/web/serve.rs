//! Serves the HTTP listener.

use axum::Router;
use drover_proto::http_server::Connections;
use hyper_util::service::TowerToHyperService;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 8192;

/// Serves until `shutdown` is cancelled, then lets answers finish for at most `drain` and cuts what is left.
pub async fn serve(listener: TcpListener, router: Router, shutdown: CancellationToken, drain: Duration) {
    let mut connections = Connections::at_most(CONNECTIONS_MAX);
    connections.accept(&listener, TowerToHyperService::new(router), shutdown.cancelled()).await;
    drop(listener);
    connections.drain(drain).await;
}
