//! From a request to the beginning of an answer: chooses, tries, and tries once more where nothing can have been executed.

use super::{
    deadline::Clock,
    error::ApiError,
    loads::{Loads, Place},
    proxy_client::{Error, ProxyClient},
    routes::Backend,
    trace,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use bytes::Bytes;
use http::Response;
use hyper::body::Incoming;
use std::time::Duration;
use tokio::time::{Instant, sleep};
use tracing::Span;

/// Attempts of one request, the first included.
const ATTEMPTS_MAX: u32 = 2;
/// Before the same instance is tried again: its proxy may just be starting anew.
const SAME_AGAIN: Duration = Duration::from_millis(300);

/// A request as it is handed on.
#[derive(Debug)]
pub(super) struct Call<'a> {
    /// Path and query.
    pub(super) path: &'a str,
    /// The client's headers; few are handed on.
    pub(super) headers: &'a HeaderMap,
    pub(super) id: &'a HeaderValue,
    pub(super) body: Bytes,
    pub(super) clock: &'a Clock,
    pub(super) stream: bool,
}

/// The beginning of a llama-server's answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response<Incoming>,
    pub(super) instance: String,
    pub(super) attempts: u32,
    /// Held until the answer has ended.
    pub(super) place: Place,
}

/// Sends a request to the least busy of some instances; there is at least one.
pub(super) async fn forward(
    proxies: &ProxyClient,
    loads: &Loads,
    backends: &[&Backend],
    call: &Call<'_>,
    span: &Span,
) -> Result<Answer, ApiError> {
    let deadline = call.clock.begin(call.stream);
    let (mut last, mut attempts) = (None, 0);
    loop {
        let Some((at, place)) = loads.take(backends, last, rand::random()) else {
            return Err(unavailable("no instance is ready"));
        };
        let backend = backends[at];
        attempts += 1;
        trace::attempt(span, backend, attempts);
        if last == Some(at) {
            sleep(SAME_AGAIN.min(deadline.duration_since(Instant::now()))).await;
        }
        let headers = headers(call);
        let begun = Instant::now();
        let sent =
            proxies.send(&backend.proxy_address, &backend.instance, call.path, headers, call.body.clone(), deadline);
        match sent.await {
            Ok(response) => return Ok(Answer { response, instance: backend.instance.clone(), attempts, place }),
            Err(error) => {
                tracing::info!(instance = backend.instance, node = backend.node, attempts, %error, "an attempt failed");
                if backend.unowned && error.not_executed() {
                    loads.refused(&backend.instance, begun.elapsed());
                }
                if !error.not_executed() || attempts >= ATTEMPTS_MAX {
                    return Err(give_up(&error, call));
                }
                loads.retried();
                last = Some(at);
            }
        }
    }
}

fn headers(call: &Call<'_>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for name in [header::CONTENT_TYPE, header::ACCEPT] {
        if let Some(value) = call.headers.get(&name) {
            headers.insert(name, value.clone());
        }
    }
    headers.insert(super::REQUEST_ID, call.id.clone());
    drover_telemetry::context::inject(&mut headers);
    headers
}

fn unavailable(message: &str) -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message).code("model_not_ready").retry_after(1)
}

fn give_up(error: &Error, call: &Call<'_>) -> ApiError {
    let server = |status, message: &str| ApiError::new(status, "server_error", message);
    match error {
        Error::TimedOut => {
            let which = if call.stream { "first_byte_timeout_ms" } else { "total_timeout_ms" };
            let message = format!("the instance began no answer in time (gateway.{which}); the request was cancelled");
            server(StatusCode::GATEWAY_TIMEOUT, &message).code("upstream_timeout")
        }
        error if error.not_executed() => {
            unavailable("no instance of the model could be reached: nothing was generated, try again shortly")
        }
        Error::Proxy { word, .. } if word == "upstream" => server(
            StatusCode::BAD_GATEWAY,
            "the instance broke off before it answered; it is unknown how far it came, so nothing was tried again",
        )
        .code("upstream_broken"),
        Error::Broken { .. } => server(
            StatusCode::BAD_GATEWAY,
            "the connection to the instance's host broke before an answer began; it is unknown how far it came, so \
             nothing was tried again",
        )
        .code("upstream_broken"),
        // The operator's to mend, and told in the log: the client learns no address.
        Error::Proxy { .. } | Error::Plaintext { .. } | Error::Unreachable { .. } => {
            tracing::error!(%error, "a proxy refuses the gateway");
            server(StatusCode::BAD_GATEWAY, "the instance's host refuses the gateway: see the coordinator's log")
                .code("upstream_refused")
        }
    }
}
