//! The proxy's listeners and its end: binds first, serves, and on shutdown stops accepting, lets streams finish for a
//! bounded time, and returns.

use super::{
    ProxySettings,
    answer::{self, Body, Code},
    control::Control,
    forward, logs,
    route::Table,
};
use anyhow::{Context as _, bail};
use drover_proto::{http_server::Connections, ids, transport::Security};
use http::{Request, Response};
use hyper::{body::Incoming, service::service_fn};
use std::{
    convert::Infallible,
    fs::{DirBuilder, File, Permissions},
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    net::{TcpListener, UnixListener},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 4096;

/// A proxy that holds its addresses and does not serve yet.
#[derive(Debug)]
pub struct Proxy {
    listener: TcpListener,
    control_listener: UnixListener,
    control: Control,
    /// Locked as long as this process takes requests: one proxy a folder.
    lock: File,
    socket: std::path::PathBuf,
    drain: Duration,
    service: Service,
}

impl Proxy {
    /// Binds the addresses; must be called on a runtime. `prefer_port` is tried first when the port to listen on is 0.
    ///
    /// # Errors
    /// A setting is refused, another proxy serves the same folder, or an address can't be bound.
    pub fn bind(settings: &ProxySettings, prefer_port: Option<u16>) -> anyhow::Result<Self> {
        let security = settings.security()?;
        security.check_listener("proxy_listen", settings.listen)?;
        let mut folders = DirBuilder::new();
        folders.recursive(true).mode(0o700);
        for folder in [&settings.runtime_dir, &settings.state_dir] {
            folders.create(folder).with_context(|| format!("folder {} can't be made", folder.display()))?;
        }
        let lock = lock(&settings.lock_file())?;
        let listener = listen(settings.listen, prefer_port)?;
        let address = listener.local_addr().context("the listener has no address")?;
        let socket = settings.control_socket();
        let control_listener = listen_control(&socket)?;
        let table = Table::new();
        let control = Control {
            table: table.clone(),
            address,
            shutdown: CancellationToken::new(),
            drain: Arc::new(Mutex::new(None)),
        };
        let service = Service { table, security: Arc::new(security), followers: logs::Followers::new() };
        Ok(Self { listener, control_listener, control, lock, socket, drain: settings.drain, service })
    }

    /// Address of the HTTP listener, with its real port.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.control.address
    }

    /// Serves until `shutdown` is cancelled or an order comes over the control socket; then drains and returns.
    pub async fn serve(self, shutdown: CancellationToken) {
        let Self { listener, control_listener, control, lock, socket, drain, service } = self;
        let (ending, ordered) = (control.shutdown.clone(), control.drain.clone());
        let mut control = JoinSet::from_iter([control.accept(control_listener)]);
        let mut connections = Connections::at_most(CONNECTIONS_MAX);
        let answer = service_fn(move |request| {
            let service = service.clone();
            async move { Ok::<_, Infallible>(service.answer(request).await) }
        });
        let end = async {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = ending.cancelled() => {}
            }
        };
        connections.accept(&listener, answer, end).await;
        // From here on a successor may take over the address, the socket and the lock, while streams still finish here.
        drop(listener);
        let _ = std::fs::remove_file(&socket);
        drop(lock);
        ending.cancel();
        let drain = ordered.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or(drain);
        tracing::info!(connections = connections.open(), drain_ms = drain.as_millis(), "the proxy drains");
        connections.drain(drain).await;
        control.shutdown().await;
    }
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

fn listen_control(path: &Path) -> anyhow::Result<UnixListener> {
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
}

impl Service {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
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
