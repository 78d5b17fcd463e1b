//! One request to an instance, over its unix socket, streaming both ways.
//!
//! Every request gets a connection of its own. A kept one would hold one of llama-server's few HTTP threads for as long as
//! it idles, and could break in the moment of reuse, when nobody can tell whether the request was executed; a unix socket
//! connects in microseconds. So "connect" means surely not executed, and dropping the connection cancels the generation.

use super::{
    answer::{self, Body, BoxError, Code},
    route::{InFlight, Refusal, Table},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, header};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{net::UnixStream, task::AbortHandle, time::timeout};

/// A unix socket connects at once or not at all.
const CONNECT_DEADLINE: Duration = Duration::from_secs(1);

/// Names that belong to one connection and are not handed on (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Hands a request on to an instance; `path` begins with '/' and may bear a query.
pub(super) async fn forward(
    table: &Arc<Table>,
    instance: &str,
    path: &str,
    mut request: Request<Incoming>,
) -> Response<Body> {
    if request.method() != Method::GET && request.method() != Method::POST {
        return answer::error(Code::Invalid, &format!("method {} is not handed on: use GET or POST", request.method()));
    }
    let Ok(uri) = path.parse::<Uri>() else {
        return answer::error(Code::Invalid, "the path behind the instance's id can't be parsed");
    };
    let (route, in_flight) = match table.admit(instance) {
        Ok(admitted) => admitted,
        Err(Refusal::NoRoute) => {
            return answer::error(Code::NoRoute, &format!("instance {instance} takes no requests on this host"));
        }
        Err(Refusal::Draining) => {
            return answer::error(Code::Draining, &format!("instance {instance} is being drained"));
        }
    };
    let connected = match timeout(CONNECT_DEADLINE, UnixStream::connect(&route.socket)).await {
        Ok(connected) => connected,
        Err(_) => Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer in time")),
    };
    let (mut sender, connection) = match connected {
        Ok(stream) => match http1::handshake::<_, Incoming>(TokioIo::new(stream)).await {
            Ok(pair) => pair,
            Err(error) => return answer::error(Code::Connect, &format!("instance {instance}: {error}")),
        },
        Err(error) => {
            tracing::debug!(instance, socket = %route.socket.display(), %error, "no connection");
            return answer::error(
                Code::Connect,
                &format!("llama-server of instance {instance} does not accept: {error}"),
            );
        }
    };
    // The task ends with the connection; should the caller go first, the guard ends it, and the generation with it.
    let connection = Connection(tokio::spawn(connection).abort_handle());

    *request.uri_mut() = uri;
    *request.version_mut() = http::Version::HTTP_11;
    strip(request.headers_mut());
    request.headers_mut().remove(header::AUTHORIZATION);
    request.headers_mut().insert(header::HOST, HeaderValue::from_static("localhost"));
    request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    match sender.send_request(request).await {
        Ok(response) => {
            let (mut parts, body) = response.into_parts();
            strip(&mut parts.headers);
            parts.headers.remove(answer::ERROR_HEADER);
            let body = Streamed { body, _connection: connection, _in_flight: in_flight };
            Response::from_parts(parts, body.boxed_unsync())
        }
        Err(error) => {
            tracing::info!(instance, %error, "the connection broke before an answer began");
            answer::error(Code::Upstream, &format!("llama-server of instance {instance} broke off before it answered"))
        }
    }
}

fn strip(headers: &mut HeaderMap) {
    let listed: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in listed.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// The connection's task; ended when dropped.
struct Connection(AbortHandle);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A llama-server's body, with what must live exactly as long.
struct Streamed {
    body: Incoming,
    _connection: Connection,
    _in_flight: InFlight,
}

impl http_body::Body for Streamed {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Pin::new(&mut self.body).poll_frame(context).map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_to_one_connection_is_not_handed_on() {
        let mut headers = HeaderMap::new();
        headers.insert("connection", HeaderValue::from_static("close, X-Local"));
        headers.insert("x-local", HeaderValue::from_static("1"));
        headers.insert("keep-alive", HeaderValue::from_static("timeout=5"));
        headers.insert("transfer-encoding", HeaderValue::from_static("chunked"));
        headers.insert("content-type", HeaderValue::from_static("application/json"));
        strip(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["content-type"]);
    }
}
