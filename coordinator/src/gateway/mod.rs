//! The gateway: OpenAI-compatible HTTP in front of every instance of the fleet.
//!
//! Needs the watched snapshot and nothing else, and goes on with the last one known when the store is away. A request goes
//! to the least busy ready instance of its model, over the proxy of that instance's host; its body is handed on as it came.
//! Owns: the choice, the counts behind it, the connections to the proxies, and the trace of each request. Must never: write
//! to the store, rewrite a body, or cut a stream without saying so in it.
//!
//! Pure parts: [`routes`], [`pick`], [`sse`], [`timings`].

mod accept;
mod deadline;
pub mod error;
mod forward;
mod loads;
mod pick;
pub mod proxy_client;
mod relay;
pub mod routes;
mod settings;
mod sse;
mod timings;
mod trace;

use crate::plan::snapshot::Snapshot;
use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use drover_proto::transport::Security;
use error::ApiError;
use routes::Routes;
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::watch;
use tracing::Instrument as _;

pub use loads::Counts;
pub use proxy_client::ProxyClient;
pub use settings::Settings;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Instance that answered.
const INSTANCE: HeaderName = HeaderName::from_static("x-drover-instance");
/// Attempts that it took.
const ATTEMPTS: HeaderName = HeaderName::from_static("x-drover-attempts");

/// A cheap handle on the gateway.
#[derive(Debug, Clone)]
pub struct Gateway(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    settings: Settings,
    security: Security,
    /// Whether clients must show the secret.
    auth: bool,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    /// The snapshot seen last and its routes.
    routes: Mutex<(Arc<Snapshot>, Arc<Routes>)>,
    loads: loads::Loads,
    proxies: ProxyClient,
}

impl Gateway {
    /// A gateway that follows the snapshots. Clients must show the join secret where one is configured and `listen` is
    /// beyond loopback or `settings.auth` says so.
    #[must_use]
    pub fn new(
        settings: Settings,
        listen: SocketAddr,
        security: &Security,
        snapshots: watch::Receiver<Arc<Snapshot>>,
    ) -> Self {
        let snapshot = snapshots.borrow().clone();
        let routes = Arc::new(routes::routes(&snapshot));
        Self(Arc::new(Shared {
            auth: security.secret.is_some() && (settings.auth || !listen.ip().is_loopback()),
            proxies: ProxyClient::new(security, settings.connect_timeout()),
            security: security.clone(),
            settings,
            snapshots,
            routes: Mutex::new((snapshot, routes)),
            loads: loads::Loads::default(),
        }))
    }

    /// The paths under `/v1`.
    pub fn router(&self) -> Router {
        Router::new()
            .route("/v1/chat/completions", post(complete))
            .route("/v1/completions", post(complete))
            .route("/v1/embeddings", post(complete))
            .route("/v1/models", get(models))
            .method_not_allowed_fallback(wrong_method)
            .route("/v1/{*path}", axum::routing::any(unknown_path))
            .layer(middleware::from_fn_with_state(self.clone(), envelope))
            .with_state(self.clone())
    }

    /// What was answered and what is in flight.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.0.loads.counts()
    }

    /// The client for the hosts' proxies, for others that need it (logs).
    #[must_use]
    pub fn proxies(&self) -> ProxyClient {
        self.0.proxies.clone()
    }

    /// The routes of the newest snapshot; computed once for each.
    fn routes(&self) -> Arc<Routes> {
        let newest = self.0.snapshots.borrow().clone();
        let mut cached = self.0.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&cached.0, &newest) {
            let routes = Arc::new(routes::routes(&newest));
            *cached = (newest, routes);
        }
        cached.1.clone()
    }
}

/// Around every request: its id, who may call, and the count of answers.
async fn envelope(State(gateway): State<Gateway>, mut request: Request, next: Next) -> Response {
    let id = request_id(&request);
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = if gateway.0.auth && !gateway.0.security.admits(request.headers()) {
        let message = "send the header \"authorization: Bearer <secret>\" (OpenAI clients: the API key)";
        let error = ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        error.code("invalid_api_key").into_response()
    } else {
        next.run(request).await
    };
    response.headers_mut().insert(REQUEST_ID, id);
    gateway.0.loads.answered(response.status());
    response
}

/// The id of a request, in its extensions.
#[derive(Debug, Clone)]
struct RequestId(HeaderValue);

fn request_id(request: &Request) -> HeaderValue {
    let given = request.headers().get(REQUEST_ID);
    let good = |id: &&HeaderValue| (1..=128).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    given.filter(good).cloned().unwrap_or_else(|| {
        // Hexadecimal digits are always a header's value.
        let id = format!("req-{:032x}", rand::random::<u128>());
        HeaderValue::from_str(&id).unwrap_or_else(|_| HeaderValue::from_static("req-0"))
    })
}

async fn complete(State(gateway): State<Gateway>, request: Request) -> Response {
    let id =
        request.extensions().get::<RequestId>().map_or_else(|| HeaderValue::from_static("req-0"), |id| id.0.clone());
    let span = trace::open(request.headers(), request.uri().path(), &id);
    let answered = gateway.serve(request, &id, &span).instrument(span.clone()).await;
    let response = answered.unwrap_or_else(|error| {
        trace::failed(&span, &error.message);
        error.into_response()
    });
    trace::status(&span, response.status());
    response
}

impl Gateway {
    async fn serve(&self, request: Request, id: &HeaderValue, span: &tracing::Span) -> Result<Response, ApiError> {
        let settings = &self.0.settings;
        let clock = deadline::Clock::start(settings);
        let (parts, body) = request.into_parts();
        let body = accept::read(&parts.headers, body, settings).await?;
        let asked = accept::parse(&body)?;
        trace::asked(span, &asked.model, asked.stream);
        let routes = self.routes();
        let model = routes.get(&asked.model).ok_or_else(|| error::unknown_model(&asked.model, &routes))?;
        let path = parts.uri.path_and_query().map_or_else(|| parts.uri.path(), |path| path.as_str());
        let embeddings = parts.uri.path() == "/v1/embeddings";
        if !model.serves(embeddings) {
            return Err(error::other_kind(&asked.model, embeddings));
        }
        let backends = model.backends_for(embeddings);
        if backends.is_empty() {
            return Err(error::none_ready(&asked.model));
        }
        let call = forward::Call { path, headers: &parts.headers, id, body, clock: &clock, stream: asked.stream };
        let answer = forward::forward(&self.0.proxies, &self.0.loads, &backends, &call, span).await?;
        Ok(relay::relay(answer, clock, self.0.loads.clone(), span.clone()))
    }
}

async fn models(State(gateway): State<Gateway>) -> Response {
    let routes = gateway.routes();
    let data = routes.iter().map(|(id, model)| {
        serde_json::json!({"id": id, "object": "model", "created": model.created_s, "owned_by": "drover"})
    });
    let list = serde_json::json!({"object": "list", "data": data.collect::<Vec<_>>()});
    ([(header::CONTENT_TYPE, "application/json")], Body::from(list.to_string())).into_response()
}

async fn wrong_method(method: Method, uri: Uri) -> Response {
    let wanted = if uri.path() == "/v1/models" { "GET" } else { "POST" };
    let message = format!("{method} {} is not served: use {wanted}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message).into_response()
}

async fn unknown_path(uri: Uri) -> Response {
    error::unknown_path(uri.path()).into_response()
}
