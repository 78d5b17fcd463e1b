//! The way to the hosts' proxies: pooled connections, the secret, one attempt of a request, and logs.

use bytes::Bytes;
use drover_proto::transport::{Security, chain, is_loopback};
use futures::{Stream, TryStreamExt as _};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use std::{io, time::Duration};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::{
    codec::{FramedRead, LinesCodec, LinesCodecError},
    io::StreamReader,
};

/// Header by which a proxy marks its own errors; its values are the words of [`Error::Proxy`].
const ERROR_HEADER: &str = "x-drover-proxy-error";
/// Shorter than a proxy keeps an idle connection, so that none is reused in the moment when it is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
const IDLE_PER_PROXY_MAX: usize = 256;
/// A proxy's error is a few hundred bytes.
const ERROR_BYTES_MAX: usize = 64 << 10;
const ERROR_DEADLINE: Duration = Duration::from_secs(2);
const LOGS_DEADLINE: Duration = Duration::from_secs(5);
/// Longest line of a log, in bytes; proxies cut longer ones, and escaping makes them at most this long.
const LOG_LINE_BYTES_MAX: usize = 256 << 10;

/// Why an attempt got no answer of a llama-server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection to the proxy: surely not executed.
    #[error("the proxy at {address} can't be reached: {what}")]
    Unreachable {
        /// Address of the proxy.
        address: String,
        /// Why.
        what: String,
    },
    /// The proxy answered itself.
    #[error("the proxy says {word}: {message}")]
    Proxy {
        /// "no_route", "draining" or "connect": surely not executed. "upstream": may have been. Others: refused.
        word: String,
        /// For people.
        message: String,
    },
    /// The connection to the proxy broke: may have been executed.
    #[error("the connection to the proxy at {address} broke: {what}")]
    Broken {
        /// Address of the proxy.
        address: String,
        /// Why.
        what: String,
    },
    /// No answer began in time; the request was cancelled.
    #[error("no answer began in time")]
    TimedOut,
    /// The secret would be sent unencrypted beyond loopback.
    #[error(
        "proxy address {address} is beyond loopback and the join secret would travel unencrypted: set allow_plaintext = true if the network is trusted"
    )]
    Plaintext {
        /// Address of the proxy.
        address: String,
    },
}

impl Error {
    /// True when the request surely was not executed, so that it may be tried again.
    #[must_use]
    pub fn not_executed(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Proxy { word, .. } => matches!(word.as_str(), "no_route" | "draining" | "connect"),
            Self::Broken { .. } | Self::TimedOut | Self::Plaintext { .. } => false,
        }
    }
}

/// A cheap handle on the connections to all proxies.
#[derive(Debug, Clone)]
pub struct ProxyClient {
    client: Client<HttpConnector, Full<Bytes>>,
    authorization: Option<HeaderValue>,
    allow_plaintext: bool,
}

impl ProxyClient {
    /// A client that presents the secret, where one is configured.
    #[must_use]
    pub fn new(security: &Security, connect_timeout: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(connect_timeout));
        connector.set_nodelay(true);
        connector.set_keepalive(Some(Duration::from_secs(10)));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_PER_PROXY_MAX)
            .build(connector);
        let authorization = security.secret.as_ref().map(drover_proto::transport::Secret::header);
        Self { client, authorization, allow_plaintext: security.allow_plaintext }
    }

    /// One attempt of a request at an instance; `path` begins with '/'. Returns when the answer begins. Dropping the future
    /// or the answer's body cancels the work at llama-server.
    ///
    /// # Errors
    /// Those of [`Error`]; what llama-server answers is no error, whatever its status.
    pub async fn send(
        &self,
        address: &str,
        instance: &str,
        path: &str,
        headers: HeaderMap,
        body: Bytes,
        deadline: Instant,
    ) -> Result<Response<Incoming>, Error> {
        let uri = format!("http://{address}/i/{instance}{path}");
        self.call(address, Method::POST, uri, headers, body, deadline).await
    }

    /// Lines of an instance's log, without line ends: the last `tail`, and new ones for as long as the stream is held where
    /// `follow` is set.
    ///
    /// # Errors
    /// Those of [`Error`]; those of the stream are of the connection.
    pub async fn logs(
        &self,
        address: &str,
        instance: &str,
        tail: u32,
        follow: bool,
    ) -> Result<impl Stream<Item = io::Result<String>> + Send + use<>, Error> {
        let uri = format!("http://{address}/logs/{instance}?tail={tail}&follow={follow}");
        let deadline = Instant::now() + LOGS_DEADLINE;
        let response = self.call(address, Method::GET, uri, HeaderMap::new(), Bytes::new(), deadline).await?;
        let reader = StreamReader::new(response.into_data_stream().map_err(io::Error::other));
        let lines = FramedRead::new(reader, LinesCodec::new_with_max_length(LOG_LINE_BYTES_MAX));
        Ok(lines.map_err(|error| match error {
            LinesCodecError::Io(error) => error,
            LinesCodecError::MaxLineLengthExceeded => io::Error::new(io::ErrorKind::InvalidData, "a line is too long"),
        }))
    }

    async fn call(
        &self,
        address: &str,
        method: Method,
        uri: String,
        mut headers: HeaderMap,
        body: Bytes,
        deadline: Instant,
    ) -> Result<Response<Incoming>, Error> {
        let unreachable = |what: String| Error::Unreachable { address: address.to_owned(), what };
        let uri: http::Uri = uri.parse().map_err(|error| unreachable(format!("{uri} is no address: {error}")))?;
        if let Some(value) = &self.authorization {
            if !self.allow_plaintext && !is_loopback(uri.host().unwrap_or_default()) {
                return Err(Error::Plaintext { address: address.to_owned() });
            }
            headers.insert(header::AUTHORIZATION, value.clone());
        }
        let mut request = Request::new(Full::new(body));
        (*request.method_mut(), *request.uri_mut(), *request.headers_mut()) = (method, uri, headers);
        let response = match timeout_at(deadline, self.client.request(request)).await {
            Err(_) => return Err(Error::TimedOut),
            Ok(Err(error)) if error.is_connect() => return Err(unreachable(chain(&error))),
            Ok(Err(error)) => return Err(Error::Broken { address: address.to_owned(), what: chain(&error) }),
            Ok(Ok(response)) => response,
        };
        let word =
            response.headers().get(ERROR_HEADER).map(|word| String::from_utf8_lossy(word.as_bytes()).into_owned());
        match word {
            None => Ok(response),
            Some(word) => Err(proxy_error(word, response).await),
        }
    }
}

async fn proxy_error(word: String, response: Response<Incoming>) -> Error {
    #[derive(serde::Deserialize)]
    struct Outer {
        error: Inner,
    }
    #[derive(serde::Deserialize)]
    struct Inner {
        message: String,
    }
    let status = response.status();
    let body = timeout(ERROR_DEADLINE, Limited::new(response.into_body(), ERROR_BYTES_MAX).collect()).await;
    let body = body.ok().and_then(Result::ok).map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let message =
        serde_json::from_slice::<Outer>(&body).map_or_else(|_| status_text(status), |outer| outer.error.message);
    Error::Proxy { word, message }
}

fn status_text(status: StatusCode) -> String {
    format!("HTTP status {status}")
}
