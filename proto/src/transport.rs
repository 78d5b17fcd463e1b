//! How Drover's programs reach each other, and who a peer is. Every client and every server uses this module.
//!
//! Identity comes from the connection, never from a field of a message: today the holder of the fleet's join secret, sent
//! as metadata together with the node's name; mutual TLS takes its place here later, and no other code changes.
//! Rule: no listener beyond loopback without a secret, and, while the secret travels unencrypted, only with
//! `allow_plaintext`, which says so aloud.

use std::{fmt, net::SocketAddr, path::Path, sync::Arc, time::Duration};
use subtle::ConstantTimeEq as _;
use tokio::net::TcpListener;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint, Server, server::TcpIncoming},
};

const NODE_HEADER: &str = "drover-node";
const AUTHORIZATION: &str = "authorization";
/// Interval of HTTP/2 pings. Without them a stopped peer is noticed only when TCP gives up.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// The fleet's join secret. Never printed.
#[derive(Clone)]
pub struct Secret(Arc<str>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What can be wrong between two programs before a call is made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The secret's file can't be used.
    #[error("join secret file {path}: {what}")]
    SecretFile {
        /// The file.
        path: String,
        /// Why, and the way out.
        what: String,
    },
    /// A listener would be open to others.
    #[error("{setting} = {address}: {what}")]
    OpenListener {
        /// Name of the setting.
        setting: String,
        /// Its value.
        address: SocketAddr,
        /// Why it is refused, and the way out.
        what: &'static str,
    },
    /// An address has the wrong form.
    #[error("address \"{address}\": {what}")]
    Address {
        /// As given.
        address: String,
        /// What is wrong with it.
        what: String,
    },
    /// None of the addresses answered.
    #[error("no coordinator answered at {addresses}: {last}")]
    Unreachable {
        /// All that were tried.
        addresses: String,
        /// What the last one said.
        last: String,
    },
}

impl Secret {
    /// Fewest bytes of a secret.
    pub const BYTES_MIN: usize = 16;

    /// Reads a secret from a file; white space around it does not count.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let failed = |what: String| Error::SecretFile { path: path.display().to_string(), what };
        let text = std::fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
        let mode = std::fs::metadata(path).map_or(0, |m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()));
        if mode & 0o077 != 0 {
            tracing::warn!("the join secret file {} is open to others: chmod 600 it", path.display());
        }
        Self::new(text.trim()).ok_or_else(|| {
            failed(format!("holds no secret of at least {} printable ASCII characters", Self::BYTES_MIN))
        })
    }

    /// Takes a secret; `None` when it is too short or not printable ASCII.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let good = text.len() >= Self::BYTES_MIN && text.bytes().all(|b| b.is_ascii_graphic());
        good.then(|| Self(text.into()))
    }

    /// Compares in constant time with the value of an `authorization` header.
    #[must_use]
    pub fn matches_header(&self, header: Option<&[u8]>) -> bool {
        let given = header.and_then(|h| h.strip_prefix(b"Bearer ")).unwrap_or_default();
        bool::from(given.ct_eq(self.0.as_bytes()))
    }

    /// The value of an `authorization` header.
    #[must_use]
    pub fn header(&self) -> http::HeaderValue {
        // Checked on construction: printable ASCII only.
        let mut value = http::HeaderValue::from_str(&format!("Bearer {}", self.0))
            .unwrap_or_else(|_| http::HeaderValue::from_static("Bearer"));
        value.set_sensitive(true);
        value
    }
}

/// How a program secures its own listeners and its calls.
#[derive(Debug, Clone, Default)]
pub struct Security {
    /// Join secret; without one, loopback only.
    pub secret: Option<Secret>,
    /// Send and accept the secret unencrypted beyond loopback.
    pub allow_plaintext: bool,
}

impl Security {
    /// Refuses an address to listen on that would be open to others. `setting` is named in the error.
    pub fn check_listener(&self, setting: &str, address: SocketAddr) -> Result<(), Error> {
        let refuse = |what| Err(Error::OpenListener { setting: setting.to_owned(), address, what });
        match (address.ip().is_loopback(), &self.secret, self.allow_plaintext) {
            (true, ..) | (false, Some(_), true) => Ok(()),
            (false, None, _) => refuse(
                "is beyond loopback and no join secret is configured: set join_secret_file, or listen on 127.0.0.1",
            ),
            (false, Some(_), false) => refuse(
                "is beyond loopback and connections are not encrypted: set allow_plaintext = true if the network is \
                 trusted, or listen on 127.0.0.1",
            ),
        }
    }

    /// Checks an HTTP request's headers against the secret. Without a secret every peer is on loopback and allowed.
    #[must_use]
    pub fn admits(&self, headers: &http::HeaderMap) -> bool {
        let header = headers.get(http::header::AUTHORIZATION).map(http::HeaderValue::as_bytes);
        self.secret.as_ref().is_none_or(|secret| secret.matches_header(header))
    }
}

/// Who is at the other end of a call; put into the extensions of every request by [`Admit`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Name of the node, when the peer is an agent.
    pub node: Option<String>,
}

impl Peer {
    /// The peer of a request.
    #[allow(clippy::result_large_err)] // tonic's own type
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        request.extensions().get().cloned().ok_or_else(|| Status::internal("the connection has no identity"))
    }

    /// The node at the other end; PERMISSION_DENIED for anybody who is no agent.
    #[allow(clippy::result_large_err)] // tonic's own type
    pub fn node_of<T>(request: &Request<T>) -> Result<String, Status> {
        Self::of(request)?
            .node
            .ok_or_else(|| Status::permission_denied("only an agent may call this: no node identity"))
    }
}

/// Server side: admits a call and attaches its [`Peer`].
#[derive(Debug, Clone)]
pub struct Admit(Security);

impl Admit {
    /// Admits by these rules.
    #[must_use]
    pub fn new(security: Security) -> Self {
        Self(security)
    }
}

impl Interceptor for Admit {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let header = request.metadata().get(AUTHORIZATION).map(|v| v.as_encoded_bytes().to_owned());
        if self.0.secret.as_ref().is_some_and(|secret| !secret.matches_header(header.as_deref())) {
            return Err(crate::status::with_reason(
                tonic::Code::Unauthenticated,
                crate::status::reason::UNAUTHENTICATED,
                "the call carries no valid join secret: send the metadata \"authorization: Bearer <secret>\"",
            ));
        }
        let node = match request.metadata().get(NODE_HEADER) {
            None => None,
            Some(value) => {
                let name = value.to_str().unwrap_or_default();
                crate::ids::check_node_name(name)
                    .map_err(|e| crate::status::invalid_field(NODE_HEADER, e.to_string()))?;
                Some(name.to_owned())
            }
        };
        request.extensions_mut().insert(Peer { node });
        Ok(request)
    }
}

/// A server with the settings that all of Drover's servers share. What it serves comes through [`incoming`].
#[must_use]
pub fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEP_ALIVE_TIMEOUT))
}

/// The connections of a listener. The settings of their sockets stand here, since a [`Server`]'s own are for listeners that
/// it opens itself: without `nodelay` an answer of two packets waits some 40 ms for the peer's delayed acknowledgement.
#[must_use]
pub fn incoming(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(Duration::from_secs(10)))
}

/// Client side: presents the caller's identity with every call.
#[derive(Debug, Clone)]
pub struct Present {
    authorization: Option<MetadataValue<Ascii>>,
    node: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Present {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.authorization {
            request.metadata_mut().insert(AUTHORIZATION, value.clone());
        }
        if let Some(value) = &self.node {
            request.metadata_mut().insert(NODE_HEADER, value.clone());
        }
        Ok(request)
    }
}

/// A connection to a coordinator, with the caller's identity.
pub type Connection = InterceptedService<Channel, Present>;

/// Where coordinators are, and as whom to call them.
#[derive(Debug, Clone)]
pub struct Target {
    endpoints: Vec<Endpoint>,
    addresses: Vec<String>,
    present: Present,
}

impl Target {
    /// Checks the addresses ("host:port" or "http://host:port") and the identity.
    pub fn new(addresses: &[String], security: &Security, node: Option<&str>) -> Result<Self, Error> {
        let mut endpoints = Vec::with_capacity(addresses.len());
        for address in addresses {
            let wrong = |what: String| Error::Address { address: address.clone(), what };
            let url = if address.contains("://") { address.clone() } else { format!("http://{address}") };
            let uri: http::Uri = url.parse().map_err(|e: http::uri::InvalidUri| wrong(e.to_string()))?;
            let host = uri.host().unwrap_or_default();
            if uri.port_u16().is_none() || host.is_empty() {
                return Err(wrong("expected host:port, for example 127.0.0.1:7400".to_owned()));
            }
            if security.secret.is_some() && !security.allow_plaintext && !is_loopback(host) {
                return Err(wrong(
                    "is beyond loopback and the join secret would travel unencrypted: set allow_plaintext = true if the \
                     network is trusted"
                        .to_owned(),
                ));
            }
            endpoints.push(endpoint(uri));
        }
        if endpoints.is_empty() {
            return Err(Error::Address { address: String::new(), what: "no coordinator address is given".to_owned() });
        }
        let authorization = security.secret.as_ref().and_then(|secret| {
            let mut value = MetadataValue::try_from(format!("Bearer {}", secret.0)).ok()?;
            value.set_sensitive(true);
            Some(value)
        });
        let node = match node {
            None => None,
            Some(name) => Some(
                MetadataValue::try_from(name)
                    .map_err(|_| Error::Address { address: name.to_owned(), what: "is no node name".to_owned() })?,
            ),
        };
        Ok(Self { endpoints, addresses: addresses.to_vec(), present: Present { authorization, node } })
    }

    /// Connects to the first coordinator that answers, beginning with number `first` of the list.
    pub async fn connect(&self, first: usize) -> Result<Connection, Error> {
        self.connect_from(first).await.map(|(_, connection)| connection)
    }

    /// As [`Target::connect`]; says also which number of the list answered.
    pub async fn connect_from(&self, first: usize) -> Result<(usize, Connection), Error> {
        let mut last = String::new();
        for i in 0..self.endpoints.len() {
            let n = first.wrapping_add(i) % self.endpoints.len();
            match self.endpoints[n].connect().await {
                Ok(channel) => return Ok((n, InterceptedService::new(channel, self.present.clone()))),
                Err(error) => last = chain(&error),
            }
        }
        Err(Error::Unreachable { addresses: self.addresses.join(", "), last })
    }

    /// A connection that is made when it is first used, to the first address of the list.
    #[must_use]
    pub fn connect_lazy(&self) -> Connection {
        InterceptedService::new(self.endpoints[0].connect_lazy(), self.present.clone())
    }

    /// Number of addresses.
    #[must_use]
    pub fn len(&self) -> usize {
        self.endpoints.len()
    }

    /// Never true: a target has at least one address.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.endpoints.is_empty()
    }
}

/// An endpoint with the settings that all of Drover's clients share, for peers that are no coordinators too.
#[must_use]
pub fn endpoint(uri: http::Uri) -> Endpoint {
    Endpoint::from(uri)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .tcp_keepalive(Some(Duration::from_secs(10)))
        .tcp_nodelay(true)
}

/// Whether a host, as it stands in a URI, is this machine: only there may the secret travel unencrypted unasked.
#[must_use]
pub fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// An error with all of its causes, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn security(secret: bool, allow_plaintext: bool) -> Security {
        Security { secret: secret.then(|| Secret::new("0123456789abcdef").unwrap()), allow_plaintext }
    }

    #[tokio::test]
    async fn no_answer_waits_for_a_delayed_acknowledgement() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let _client = tokio::net::TcpStream::connect(address).await.unwrap();
        let accepted = tokio_stream::StreamExt::next(&mut incoming(listener)).await.unwrap().unwrap();
        assert!(accepted.nodelay().unwrap());
    }

    #[test]
    fn no_listener_opens_beyond_loopback_without_a_secret_and_a_flag() {
        let open: SocketAddr = "0.0.0.0:7400".parse().unwrap();
        assert!(security(false, true).check_listener("listen", open).is_err());
        let error = security(true, false).check_listener("grpc_listen", open).unwrap_err().to_string();
        assert!(error.contains("grpc_listen = 0.0.0.0:7400") && error.contains("allow_plaintext"), "{error}");
        assert!(security(true, true).check_listener("listen", open).is_ok());
        assert!(security(false, false).check_listener("listen", "127.0.0.1:1".parse().unwrap()).is_ok());
    }

    #[test]
    fn a_secret_is_not_sent_to_strangers_nor_printed() {
        let far = ["10.0.0.1:7400".to_owned()];
        assert!(Target::new(&far, &security(true, false), None).is_err());
        assert!(Target::new(&far, &security(true, true), None).is_ok());
        let target = Target::new(&far, &security(true, true), Some("a")).unwrap();
        assert!(!format!("{target:?} {:?}", security(true, true)).contains("0123456789abcdef"));
        assert!(Target::new(&["nonsense".to_owned()], &security(false, false), None).is_err());
    }

    #[test]
    fn a_call_without_the_secret_is_refused_and_a_node_name_is_checked() {
        let mut admit = Admit::new(security(true, false));
        assert_eq!(admit.call(Request::new(())).unwrap_err().code(), tonic::Code::Unauthenticated);
        let mut present =
            Target::new(&["127.0.0.1:1".to_owned()], &security(true, false), Some("host-1")).unwrap().present;
        let request = admit.call(present.call(Request::new(())).unwrap()).unwrap();
        assert_eq!(Peer::node_of(&request).unwrap(), "host-1");
        let mut request = Request::new(());
        request.metadata_mut().insert(NODE_HEADER, "Bad_Name".parse().unwrap());
        let error = Admit::new(security(false, false)).call(request).unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument);
    }
}
