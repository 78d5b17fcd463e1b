//! Reads a request's body within its bounds and finds out what it asks for. The body itself is never changed.

use super::{Settings, error::ApiError};
use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header},
};
use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::Deserialize;
use tokio::time::timeout;

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Asked {
    pub(super) model: String,
    pub(super) stream: bool,
}

/// The whole body.
pub(super) async fn read(headers: &HeaderMap, body: Body, settings: &Settings) -> Result<Bytes, ApiError> {
    let max = settings.body_bytes_max;
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|length| length > max as u64) {
        return Err(too_large(max));
    }
    match timeout(settings.body_timeout(), Limited::new(body, max).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large(max)),
        Ok(Err(error)) if error.downcast_ref().is_some_and(is_length_limit) => Err(too_large(max)),
        Ok(Err(error)) => Err(ApiError::invalid(format!("the body could not be read: {error}"))),
        Err(_) => {
            let message = format!("the body was not sent within {} ms", settings.body_timeout_ms);
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message))
        }
    }
}

fn is_length_limit(error: &axum::Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<LengthLimitError>())
}

fn too_large(max: usize) -> ApiError {
    let message = format!("the body is larger than {max} bytes: send less, or raise gateway.body_bytes_max");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message).code("body_too_large")
}

/// Only what the gateway needs; the rest is checked to be JSON and left to llama-server.
#[derive(Deserialize)]
struct Head {
    #[serde(default)]
    model: Option<serde_json::Value>,
    #[serde(default)]
    stream: Option<serde_json::Value>,
}

/// What a body asks for. A field given twice is refused, since the two readers of a body could disagree on it.
pub(super) fn parse(body: &[u8]) -> Result<Asked, ApiError> {
    let refused = |why: &str| ApiError::invalid(format!("the body is no JSON object: {why}")).code("invalid_json");
    // serde would take an array for a struct, its elements for the fields.
    match body.trim_ascii_start().first() {
        Some(b'{') => {}
        Some(_) => return Err(refused("it does not begin with '{'")),
        None => return Err(refused("it is empty")),
    }
    let head: Head = serde_json::from_slice(body).map_err(|error| refused(&error.to_string()))?;
    let model = match head.model {
        Some(serde_json::Value::String(model)) if !model.is_empty() => model,
        None | Some(serde_json::Value::Null) => {
            return Err(ApiError::invalid("model is missing: name one that GET /v1/models lists").param("model"));
        }
        Some(_) => return Err(ApiError::invalid("model must be a string that is not empty").param("model")),
    };
    let stream = match head.stream {
        None | Some(serde_json::Value::Null) => false,
        Some(serde_json::Value::Bool(stream)) => stream,
        Some(_) => return Err(ApiError::invalid("stream must be true or false").param("stream")),
    };
    Ok(Asked { model, stream })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn model_and_stream_are_found_and_bad_bodies_named() {
        let asked = parse(br#"{"messages":[{"model":"x"}],"model":"tiny","stream":true}"#).unwrap();
        assert_eq!(asked, Asked { model: "tiny".to_owned(), stream: true });
        assert!(!parse(br#"{"model":"tiny","stream":null}"#).unwrap().stream);
        for (body, named) in [
            (&b""[..], "empty"),
            (b"{\"model\":\"tiny\"", "no JSON object"),
            (b"[]", "no JSON object"),
            (b"{\"model\":\"tiny\"} x", "no JSON object"),
            (b"{\"model\":\"a\",\"model\":\"b\"}", "duplicate field `model`"),
            (b"{}", "model is missing"),
            (b"{\"model\":7}", "model must be"),
            (b"{\"model\":\"tiny\",\"stream\":1}", "stream must be"),
        ] {
            let error = parse(body).unwrap_err();
            assert_eq!(error.status, StatusCode::BAD_REQUEST);
            assert!(error.message.contains(named), "{}", error.message);
        }
    }
}
