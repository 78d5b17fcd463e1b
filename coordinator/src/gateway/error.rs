//! Errors in OpenAI's shape.

use super::routes::Routes;
use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};

/// Models named in an error's text.
const NAMED_MAX: usize = 20;

/// An error that the gateway makes itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// Class of the error, as in OpenAI's `type`.
    pub kind: &'static str,
    /// What happened and what to do.
    pub message: String,
    /// Word for programs.
    pub code: Option<&'static str>,
    /// Parameter that is wrong.
    pub param: Option<&'static str>,
    /// When to try again, in seconds.
    pub retry_after_s: Option<u32>,
}

impl ApiError {
    /// An error without code and parameter.
    #[must_use]
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), code: None, param: None, retry_after_s: None }
    }

    /// A wrong request: 400.
    #[must_use]
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// With a word for programs.
    #[must_use]
    pub fn code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// About a parameter.
    #[must_use]
    pub fn param(self, param: &'static str) -> Self {
        Self { param: Some(param), ..self }
    }

    /// To be tried again after so many seconds.
    #[must_use]
    pub fn retry_after(self, seconds: u32) -> Self {
        Self { retry_after_s: Some(seconds), ..self }
    }

    /// The JSON object.
    #[must_use]
    pub fn json(&self) -> String {
        let (message, kind, param, code) = (&self.message, self.kind, self.param, self.code);
        serde_json::json!({"error": {"message": message, "type": kind, "param": param, "code": code}}).to_string()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if matches!(self.status, StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT) {
            // The rest of the body was not read, so the connection ends: a client that keeps it for its next request must know.
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// Text of a caller, short and without control characters.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(100).collect();
    short.escape_debug().to_string()
}

pub(super) fn unknown_model(model: &str, routes: &Routes) -> ApiError {
    let mut names = routes.keys().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
    if routes.len() > NAMED_MAX {
        names.push_str(", …");
    }
    let there_are = if names.is_empty() { "no model is deployed".to_owned() } else { format!("there are: {names}") };
    let message = format!("model \"{}\" does not exist; {there_are}", shown(model));
    ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message).code("model_not_found").param("model")
}

pub(super) fn none_ready(model: &str) -> ApiError {
    let message = format!("model \"{}\" has no instance that is ready now: try again shortly", shown(model));
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message).code("model_not_ready").retry_after(2)
}

/// A model that is asked for what none of its deployments does.
pub(super) fn other_kind(model: &str, embeddings: bool) -> ApiError {
    let (does, use_) =
        if embeddings { ("generates text", "/v1/chat/completions") } else { ("serves embeddings", "/v1/embeddings") };
    let message = format!("model \"{}\" only {does}: use {use_}, or another model", shown(model));
    ApiError::invalid(message).code("unsupported_for_model").param("model")
}

/// A path that is not served.
#[must_use]
pub fn unknown_path(path: &str) -> ApiError {
    let message = format!(
        "{} is not served: use /v1/chat/completions, /v1/completions, /v1/embeddings or /v1/models",
        shown(path)
    );
    ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message).code("unknown_url")
}
