//! Answers that the proxy makes itself, told apart from a llama-server's by the header `x-drover-proxy-error`.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};

/// Header that names the proxy's own error; never set on a llama-server's answer.
pub const ERROR_HEADER: &str = "x-drover-proxy-error";

pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub(super) type Body = UnsyncBoxBody<Bytes, BoxError>;

/// What went wrong in the proxy; the word is the header's value and the code in the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    /// The request did not reach any llama-server: there is none.
    NoRoute,
    /// It did not reach one: the instance is being drained.
    Draining,
    /// It did not reach one: nobody accepts on the socket.
    Connect,
    /// It may have been executed: the connection broke before an answer began.
    Upstream,
    /// The secret is missing or wrong.
    Unauthenticated,
    /// The request itself is wrong.
    Invalid,
    /// The path is none of the proxy's.
    NotFound,
    /// Too much at once.
    Busy,
}

impl Code {
    fn parts(self) -> (&'static str, StatusCode, &'static str) {
        match self {
            Self::NoRoute => ("no_route", StatusCode::SERVICE_UNAVAILABLE, "unavailable_error"),
            Self::Draining => ("draining", StatusCode::SERVICE_UNAVAILABLE, "unavailable_error"),
            Self::Connect => ("connect", StatusCode::BAD_GATEWAY, "server_error"),
            Self::Upstream => ("upstream", StatusCode::BAD_GATEWAY, "server_error"),
            Self::Unauthenticated => ("unauthenticated", StatusCode::UNAUTHORIZED, "authentication_error"),
            Self::Invalid => ("invalid", StatusCode::BAD_REQUEST, "invalid_request_error"),
            Self::NotFound => ("not_found", StatusCode::NOT_FOUND, "not_found_error"),
            Self::Busy => ("busy", StatusCode::SERVICE_UNAVAILABLE, "unavailable_error"),
        }
    }
}

pub(super) fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).map_err(|never| match never {}).boxed_unsync()
}

/// An error of the proxy.
pub(super) fn error(code: Code, message: &str) -> Response<Body> {
    let (word, status, kind) = code.parts();
    let body = serde_json::json!({"error": {"code": word, "message": message, "type": kind}});
    let mut response = Response::new(full(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response.headers_mut().insert(ERROR_HEADER, HeaderValue::from_static(word));
    response
}
