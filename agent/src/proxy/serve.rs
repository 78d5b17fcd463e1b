//! The proxy's listeners and its end: binds first, serves, and on shutdown stops accepting, lets streams finish for a
//! bounded time, and returns.

use super::{
    ProxySettings,
    answer::{self, Body, Code},
    control::Control,
    forward,
    hand_over::{self, Offer, Predecessor, Successor},
    logs,
    route::Table,
};
use anyhow::{Context as _, bail};
use drover_proto::{http_server::Connections, ids, transport::Security};
use http::{HeaderValue, Request, Response, header};
use hyper::{body::Incoming, service::service_fn};
use nix::sys::socket::{setsockopt, sockopt};
use std::{
    convert::Infallible,
    fs::{DirBuilder, File, Permissions},
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::Duration,
};
use tokio::{
    net::{TcpListener, UnixListener},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 4096;
/// How long idle connections are left open after a hand-over: longer than any gateway keeps one, so that none is closed in
/// the moment in which a request is sent over it.
const LINGER: Duration = Duration::from_secs(12);
/// How long what drains after a hand-over may still take when the successor was ordered to end.
const HURRY: Duration = Duration::from_millis(500);

/// A proxy that holds its addresses and does not serve yet.
#[derive(Debug)]
pub struct Proxy {
    listener: TcpListener,
    control_listener: UnixListener,
    control: Control,
    /// Locked as long as this process takes requests: one proxy a folder.
    lock: File,
    socket: PathBuf,
    /// Where the listener is offered at the end.
    next_socket: PathBuf,
    /// Whose listener this is, if it was taken over.
    predecessor: Option<Predecessor>,
    drain: Duration,
    service: Service,
}

impl Proxy {
    /// Binds the addresses; must be called on a runtime. `prefer_port` is tried first when the port to listen on is 0.
    ///
    /// # Errors
    /// A setting is refused, another proxy serves the same folder, or an address can't be bound.
    pub fn bind(settings: &ProxySettings, prefer_port: Option<u16>) -> anyhow::Result<Self> {
        let security = security(settings)?;
        let lock = lock(&settings.lock_file())?;
        let listener = listen(settings.listen, prefer_port)?;
        Self::holding(settings, security, lock, listener, None)
    }

    /// Takes over the listener of a proxy that is about to end and offers it; where none does, binds.
    ///
    /// # Errors
    /// As [`Proxy::bind`]; or what was offered can't be taken.
    pub async fn take_over(settings: &ProxySettings, prefer_port: Option<u16>) -> anyhow::Result<Self> {
        let security = security(settings)?;
        let Some((listener, predecessor)) = hand_over::receive(&settings.next_socket()).await? else {
            return Self::bind(settings, prefer_port);
        };
        let lock = lock(&settings.lock_file())?;
        Self::holding(settings, security, lock, listener, Some(predecessor))
    }

    fn holding(
        settings: &ProxySettings,
        security: Security,
        lock: File,
        listener: TcpListener,
        predecessor: Option<Predecessor>,
    ) -> anyhow::Result<Self> {
        let address = listener.local_addr().context("the listener has no address")?;
        let socket = settings.control_socket();
        let control_listener = listen_unix(&socket)?;
        let table = Table::new();
        let control = Control::new(table.clone(), address);
        let retiring = control.retiring.clone();
        let service = Service { table, security: Arc::new(security), followers: logs::Followers::new(), retiring };
        let (next_socket, drain) = (settings.next_socket(), settings.drain);
        Ok(Self { listener, control_listener, control, lock, socket, next_socket, predecessor, drain, service })
    }

    /// Address of the HTTP listener, with its real port.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.control.address
    }

    /// Serves until `shutdown` is cancelled or an order comes over the control socket; then drains and returns. Where an agent
    /// can start a successor, `shutdown` hands the listener over to that first.
    pub async fn serve(self, shutdown: CancellationToken) {
        let Self { listener, control_listener, control, lock, socket, next_socket, mut predecessor, drain, service } =
            self;
        let (told, mut accepting) = (control.clone(), JoinSet::from_iter([control.accept(control_listener)]));
        if let Some(predecessor) = &mut predecessor {
            // Until then that one accepts, and it has the routes.
            tokio::select! {
                () = told.routed.cancelled() => {}
                () = told.shutdown.cancelled() => {}
                () = sleep(hand_over::ROUTES_DEADLINE) => {
                    tracing::warn!("no agent has given routes in time: connections are accepted without");
                }
            }
            predecessor.accepted().await;
        }
        let mut connections = Connections::at_most(CONNECTIONS_MAX);
        let answer = service_fn(move |request| {
            let service = service.clone();
            async move { Ok::<_, Infallible>(service.answer(request).await) }
        });
        let (mut lock, mut successor) = (Some(lock), None);
        let end = async {
            tokio::select! {
                () = told.shutdown.cancelled() => {}
                () = shutdown.cancelled() => {
                    let release = || {
                        // In this order: whoever has the lock makes a socket of its own.
                        let _ = std::fs::remove_file(&socket);
                        lock = None;
                    };
                    tokio::select! {
                        () = told.shutdown.cancelled() => {}
                        // Nobody is left who would start a successor, as when the whole host ends.
                        () = told.deserted() => {}
                        taken = offer(&next_socket, &listener, &told, release) => successor = taken,
                    }
                }
            }
        };
        connections.accept(&listener, answer, end).await;
        drop(listener);
        if lock.is_some() {
            // From here on a successor may take over the address, the socket and the lock, while streams still finish here.
            let _ = std::fs::remove_file(&socket);
            drop(lock);
        }
        told.retiring.cancel();
        let ordered = || *told.drain.lock().unwrap_or_else(PoisonError::into_inner);
        let drain = ordered().unwrap_or(drain);
        tracing::info!(connections = connections.open(), drain_ms = drain.as_millis(), "the proxy drains");
        let until = Instant::now() + drain;
        let hurry = CancellationToken::new();
        if let Some(mut successor) = successor {
            let (hurried, shutdown) = (hurry.clone(), told.shutdown.clone());
            accepting.spawn(async move {
                tokio::select! {
                    () = successor.ordered() => {}
                    () = shutdown.cancelled() => {}
                }
                hurried.cancel();
            });
            tokio::select! {
                _ = timeout(LINGER.min(drain), connections.closed()) => {}
                () = hurry.cancelled() => {}
            }
        }
        tokio::select! {
            () = connections.drain(until.saturating_duration_since(Instant::now())) => {}
            () = async { hurry.cancelled().await; sleep(ordered().unwrap_or(HURRY)).await } => {}
        }
        if (told.shutdown.is_cancelled() || hurry.is_cancelled())
            && let Some(predecessor) = predecessor
        {
            predecessor.end(drain).await;
        }
        accepting.shutdown().await;
    }
}

/// Offers the listener; `None` when nobody has taken it in time.
async fn offer(path: &Path, listener: &TcpListener, told: &Control, release: impl FnOnce()) -> Option<Successor> {
    let offer = Offer::make(path);
    // Only now: whoever hears it finds the offer.
    told.retiring.cancel();
    let taken = match offer {
        Ok(offer) => offer.taken(listener, release).await,
        Err(error) => Err(error),
    };
    taken
        .inspect(|_| tracing::info!("a successor accepts connections"))
        .inspect_err(|error| tracing::warn!("the listener was not handed over: {error:#}"))
        .ok()
}

fn security(settings: &ProxySettings) -> anyhow::Result<Security> {
    let security = settings.security()?;
    security.check_listener("proxy_listen", settings.listen)?;
    let mut folders = DirBuilder::new();
    folders.recursive(true).mode(0o700);
    for folder in [&settings.runtime_dir, &settings.state_dir] {
        folders.create(folder).with_context(|| format!("folder {} can't be made", folder.display()))?;
    }
    Ok(security)
}

fn lock(path: &Path) -> anyhow::Result<File> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("lock file {} can't be opened", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => bail!("another proxy serves already: it holds {}", path.display()),
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("lock file {} can't be locked", path.display()))
        }
    }
}

fn listen(address: SocketAddr, prefer_port: Option<u16>) -> anyhow::Result<TcpListener> {
    let bind = |address: SocketAddr| -> std::io::Result<TcpListener> {
        let socket = if address.is_ipv4() { tokio::net::TcpSocket::new_v4() } else { tokio::net::TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        keep_alive(&socket)?;
        socket.bind(address)?;
        socket.listen(1024)
    };
    if let Some(port) = prefer_port.filter(|_| address.port() == 0) {
        match bind(SocketAddr::new(address.ip(), port)) {
            Ok(listener) => return Ok(listener),
            Err(error) => tracing::warn!(port, %error, "the port used before is not free: another is taken"),
        }
    }
    bind(address).with_context(|| format!("proxy_listen = {address} can't be bound: choose a free address"))
}

/// A gateway's host that is gone without a word must not hold a place, nor a llama-server's thread, for ever: whoever sends
/// nothing is asked whether it is there. Connections inherit this from their listener.
fn keep_alive(socket: &tokio::net::TcpSocket) -> std::io::Result<()> {
    socket.set_keepalive(true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &15)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &5)?;
    setsockopt(socket, sockopt::TcpKeepCount, &3)?;
    Ok(())
}

/// Listens at a path that only this user's programs reach. What a dead proxy left there is removed.
pub(super) fn listen_unix(path: &Path) -> anyhow::Result<UnixListener> {
    // sun_path has 108 bytes, the last one zero.
    if path.as_os_str().len() > 107 {
        bail!("the path {} is too long for a socket (107 bytes at most): set a shorter runtime_dir", path.display());
    }
    match std::fs::remove_file(path) {
        // The lock is ours, so nobody listens there.
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("{} can't be removed", path.display())),
    }
    let listener = UnixListener::bind(path).with_context(|| format!("{} can't be bound", path.display()))?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))
        .with_context(|| format!("{} can't be kept from others", path.display()))?;
    Ok(listener)
}

/// What answers one request.
#[derive(Debug, Clone)]
struct Service {
    table: Arc<Table>,
    security: Arc<Security>,
    followers: logs::Followers,
    /// Cancelled when this proxy is about to end.
    retiring: CancellationToken,
}

impl Service {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let mut response = self.respond(request).await;
        if self.retiring.is_cancelled() {
            // The next request is to come over a connection to the successor.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    async fn respond(&self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path();
        if path == "/healthz" {
            return Response::new(answer::full("ok\n"));
        }
        if !self.security.admits(request.headers()) {
            return answer::error(Code::Unauthenticated, "send the header \"authorization: Bearer <join secret>\"");
        }
        let path_and_query = request.uri().path_and_query().map_or("", |p| p.as_str());
        if let Some((instance, path)) = path_and_query.strip_prefix("/i/").and_then(split) {
            let (instance, path) = (instance.to_owned(), path.to_owned());
            return match ids::check_instance_id(&instance) {
                Ok(()) => forward::forward(&self.table, &instance, &path, request).await,
                Err(error) => answer::error(Code::Invalid, &format!("instance {error}")),
            };
        }
        if let Some(instance) = path.strip_prefix("/logs/") {
            return match ids::check_instance_id(instance) {
                Ok(()) => logs::answer(&self.table, &self.followers, instance, request.uri().query()).await,
                Err(error) => answer::error(Code::Invalid, &format!("instance {error}")),
            };
        }
        answer::error(Code::NotFound, "the proxy serves /i/<instance>/<path>, /logs/<instance> and /healthz")
    }
}

/// Splits "<instance>/<path>" before the slash.
fn split(text: &str) -> Option<(&str, &str)> {
    text.find('/').map(|at| text.split_at(at))
}
