//! A stand-in for llama-server on a unix socket, a proxy of its own for each test, and a plain HTTP client.

use bytes::Bytes;
use drover_agent::proxy::{ProxyHandle, ProxySettings, Route, RouteState};
use drover_proto::v1::Token;
use http::{Method, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use std::{
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    time::timeout,
};

/// Longest wait of any test for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for something that must happen.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not in time: {what}"))
}

/// Looks again and again until a condition holds.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    soon(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// A proxy process of the real program, in a folder of its own; killed at the latest when dropped.
pub struct Host {
    pub folder: tempfile::TempDir,
    pub settings: ProxySettings,
    pub proxy: Option<ProxyHandle>,
}

impl Host {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut ProxySettings)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listen = "127.0.0.1:0".parse().unwrap();
        let mut settings = ProxySettings::new(listen, &folder.path().join("run"), &folder.path().join("state"));
        settings.executable = Some(env!("CARGO_BIN_EXE_drover-agent").into());
        change(&mut settings);
        let proxy = ProxyHandle::ensure(settings.clone()).await.unwrap();
        Self { folder, settings, proxy: Some(proxy) }
    }

    pub fn proxy(&self) -> &ProxyHandle {
        self.proxy.as_ref().unwrap()
    }

    pub fn address(&self) -> SocketAddr {
        self.proxy().address()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address())
    }

    /// Puts routes into force.
    pub async fn route(&self, routes: &[Route]) {
        self.proxy().set_routes(routes.to_vec());
        assert!(self.proxy().wait_applied(PATIENCE).await, "the routes are in force");
    }

    /// Ends the proxy in the regular way.
    pub async fn end(mut self) {
        self.proxy.take().unwrap().end(Duration::from_millis(200)).await.unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(proxy) = &self.proxy {
            kill(proxy.pid(), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

pub fn kill(pid: u32, signal: nix::sys::signal::Signal) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), signal);
}

pub fn alive(pid: u32) -> bool {
    // A child that has ended and is not waited for yet is no living one.
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

pub fn route(instance: &str, socket: &Path, log_dir: &Path) -> Route {
    Route {
        instance: instance.to_owned(),
        token: Token { generation: 1, revision: 5 },
        socket: socket.to_owned(),
        log_dir: log_dir.to_owned(),
        state: RouteState::Open,
    }
}

/// What stands in for a llama-server: one connection after the other, in the hands of the test.
pub struct Upstream {
    pub socket: PathBuf,
    listener: UnixListener,
}

/// A connection with the request that came over it.
pub struct Arrived {
    /// Head of the request, as it came.
    pub head: String,
    /// Its body, by content-length.
    pub body: Vec<u8>,
    stream: UnixStream,
}

impl Upstream {
    pub fn listen(folder: &Path) -> Self {
        let socket = folder.join("a.sock");
        Self { listener: UnixListener::bind(&socket).unwrap(), socket }
    }

    pub async fn request(&self) -> Arrived {
        soon("a request arrives", async {
            let (mut stream, _) = self.listener.accept().await.unwrap();
            let mut bytes = Vec::new();
            let end = loop {
                assert_ne!(stream.read_buf(&mut bytes).await.unwrap(), 0, "the request breaks off");
                if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
                    break at + 4;
                }
            };
            let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
            let length =
                head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
            let mut body = bytes.split_off(end);
            while body.len() < length.unwrap_or(0) {
                assert_ne!(stream.read_buf(&mut body).await.unwrap(), 0, "the body breaks off");
            }
            Arrived { head, body, stream }
        })
        .await
    }
}

impl Arrived {
    pub async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    /// The beginning of a streamed answer.
    pub async fn begin(&mut self) {
        self.send("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nkeep-alive: timeout=5\r\n\r\n")
            .await;
    }

    pub async fn chunk(&mut self, text: &str) {
        self.send(&format!("{:x}\r\n{text}\r\n", text.len())).await;
    }

    pub async fn finish(mut self) {
        self.send("0\r\n\r\n").await;
    }

    /// A whole answer.
    pub async fn answer(mut self, text: &str) {
        self.send(&format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len())).await;
    }

    /// Waits until the other end has closed.
    pub async fn closed(mut self) {
        let mut rest = Vec::new();
        let _ = soon("the connection is closed", self.stream.read_to_end(&mut rest)).await;
        assert!(rest.is_empty());
    }
}

pub fn client() -> Client<HttpConnector, Full<Bytes>> {
    Client::builder(TokioExecutor::new()).build_http()
}

pub fn get(url: &str) -> Request<Full<Bytes>> {
    Request::get(url).body(Full::default()).unwrap()
}

pub fn post(url: &str, body: &str) -> Request<Full<Bytes>> {
    Request::builder().method(Method::POST).uri(url).body(Full::new(body.to_owned().into())).unwrap()
}

pub async fn call(request: Request<Full<Bytes>>) -> Response<Incoming> {
    soon("an answer begins", client().request(request)).await.unwrap()
}

pub async fn text(response: Response<Incoming>) -> String {
    let body = soon("the answer ends", response.into_body().collect()).await.unwrap();
    String::from_utf8(body.to_bytes().to_vec()).unwrap()
}

/// The next piece of a streamed answer.
pub async fn piece(response: &mut Response<Incoming>) -> String {
    let frame = soon("a piece comes", response.body_mut().frame()).await.unwrap().unwrap();
    String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap()
}

/// The word of the proxy's own error.
pub fn word(response: &Response<Incoming>) -> Option<&str> {
    response.headers().get("x-drover-proxy-error").map(|value| value.to_str().unwrap())
}
