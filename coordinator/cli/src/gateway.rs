//! HTTP to the gateway: one connection pool, deadlines, and OpenAI's error shape turned into a sentence.

use crate::{failure::Failure, trace::Trace};
use bytes::Bytes;
use drover_proto::transport::{Security, Target};
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use std::time::Duration;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Largest answer that is read as a whole, in bytes.
const ANSWER_BYTES_MAX: usize = 4 << 20;

/// A gateway (or another HTTP server of ours).
#[derive(Debug)]
pub struct Gateway {
    client: Client<HttpConnector, Full<Bytes>>,
    base: String,
    security: Security,
}

impl Gateway {
    /// Checks the address: "host:port" or "http://host:port". The secret goes no further than over gRPC.
    pub fn new(address: &str, security: &Security) -> Result<Self, Failure> {
        Target::new(&[address.to_owned()], security, None)?;
        let base = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self { client, base: base.trim_end_matches('/').to_owned(), security: security.clone() })
    }

    /// Status and whole body of a GET.
    pub async fn get(&self, path: &str, timeout: Duration) -> Result<(StatusCode, Bytes), Failure> {
        let request = self.request(path).body(Full::default());
        let exchange = async {
            let response = self.send(request).await?;
            let status = response.status();
            Ok((status, whole(response.into_body()).await.map_err(|e| self.broken(&*e))?))
        };
        tokio::time::timeout(timeout, exchange).await.unwrap_or_else(|_| Err(self.late(timeout)))
    }

    /// Begins a POST of JSON; the answer's body when the status is a success, else the error that it holds.
    pub async fn post(
        &self,
        path: &str,
        body: &serde_json::Value,
        trace: &Trace,
        timeout: Duration,
    ) -> Result<Incoming, Failure> {
        let request = self
            .request(path)
            .method("POST")
            .header(header::CONTENT_TYPE, "application/json")
            .header("traceparent", trace.parent())
            .body(Full::from(body.to_string()));
        let exchange = async {
            let response = self.send(request).await?;
            let status = response.status();
            if status.is_success() {
                return Ok(response.into_body());
            }
            let body = whole(response.into_body()).await.unwrap_or_default();
            Err(Failure::Answered(error_sentence(status, &body)))
        };
        tokio::time::timeout(timeout, exchange).await.unwrap_or_else(|_| Err(self.late(timeout)))
    }

    /// The failure of a connection that broke while an answer came.
    pub fn broken(&self, error: &(dyn std::error::Error + 'static)) -> Failure {
        Failure::Answered(format!("the answer of the gateway at {} broke off: {}", self.base, chain(error)))
    }

    fn request(&self, path: &str) -> http::request::Builder {
        let mut request = Request::builder().uri(format!("{}{path}", self.base));
        if let Some(secret) = &self.security.secret {
            request = request.header(header::AUTHORIZATION, secret.header());
        }
        request
    }

    async fn send(&self, request: http::Result<Request<Full<Bytes>>>) -> Result<http::Response<Incoming>, Failure> {
        let request = request.map_err(|e| Failure::Input(format!("gateway {}: {e}", self.base)))?;
        self.client.request(request).await.map_err(|e| {
            if e.is_connect() {
                Failure::Unreachable(format!("the gateway at {} can't be reached: {}", self.base, chain(&e)))
            } else {
                self.broken(&e)
            }
        })
    }

    fn late(&self, timeout: Duration) -> Failure {
        Failure::Unreachable(format!("the gateway at {} did not answer within {} s", self.base, timeout.as_secs()))
    }
}

async fn whole(body: Incoming) -> Result<Bytes, Box<dyn std::error::Error + Send + Sync>> {
    match Limited::new(body, ANSWER_BYTES_MAX).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(e) if e.is::<LengthLimitError>() => Err(format!("it is longer than {ANSWER_BYTES_MAX} bytes").into()),
        Err(e) => Err(e),
    }
}

/// OpenAI's error shape as a sentence; other bodies are shown as far as they are short.
pub fn error_sentence(status: StatusCode, body: &[u8]) -> String {
    let json: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let error = &json["error"];
    let message = error["message"].as_str().or(error.as_str()).map(str::to_owned);
    let message = message.unwrap_or_else(|| String::from_utf8_lossy(body).chars().take(200).collect());
    let kind = error["code"].as_str().or(error["type"].as_str());
    let mut text = match message.trim() {
        "" => status.canonical_reason().unwrap_or("the gateway refused the request").to_owned(),
        message => message.to_owned(),
    };
    text.push_str(&match kind {
        Some(kind) => format!(" ({kind}, HTTP {})", status.as_u16()),
        None => format!(" (HTTP {})", status.as_u16()),
    });
    crate::output::printable(&text.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    std::iter::successors(error.source(), |e| e.source()).last().map_or_else(|| error.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_openai_s_shape_is_one_sentence() {
        let body = br#"{"error":{"message":"model \"x\" is not served","type":"invalid_request_error","code":"model_not_found"}}"#;
        let text = error_sentence(StatusCode::NOT_FOUND, body);
        assert_eq!(text, "model \"x\" is not served (model_not_found, HTTP 404)");
        assert_eq!(error_sentence(StatusCode::BAD_GATEWAY, b""), "Bad Gateway (HTTP 502)");
        assert_eq!(error_sentence(StatusCode::BAD_GATEWAY, b"<html>\x1b"), "<html>\u{fffd} (HTTP 502)");
    }

    #[test]
    fn an_address_is_checked_before_anything_is_sent() {
        assert_eq!(Gateway::new("nonsense", &Security::default()).unwrap_err().exit_code(), 2);
        assert_eq!(Gateway::new("http://127.0.0.1:1/", &Security::default()).unwrap().base, "http://127.0.0.1:1");
    }
}
