//! A gateway in front of a proxy, what stands behind it, and a client.

use bytes::Bytes;
use drover_agent::proxy::{Proxy, ProxyHandle, ProxySettings, Route, RouteState};
use drover_coordinator::{
    gateway::{Gateway, Settings},
    plan::{
        Freeze,
        snapshot::{Map, Snapshot, Stored},
    },
    web,
};
use drover_proto::{
    store::v1 as record,
    transport::{Secret, Security},
    v1::{DeploymentSpec, InstanceState, Token},
};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, UnixListener, UnixStream},
    sync::watch,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// Longest wait of any test for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);
pub const SECRET: &str = "0123456789abcdef";

/// Waits for something that must happen.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not in time: {what}"))
}

/// Asks again and again until the answer is yes.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    soon(what, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// The gateway's test bench. Its one host is node "a".
pub struct Bench {
    pub folder: tempfile::TempDir,
    pub gateway: Gateway,
    pub proxy: ProxyHandle,
    pub address: SocketAddr,
    pub snapshots: watch::Sender<Arc<Snapshot>>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

struct Probe(bool);

impl web::Probe for Probe {
    fn store_lost(&self) -> Option<web::StoreLost> {
        let lost = web::StoreLost { elapsed: Duration::from_secs(12), why: "it does not answer".to_owned() };
        (!self.0).then_some(lost)
    }

    fn freeze(&self, snapshot: &Snapshot) -> Freeze {
        Freeze::of(snapshot, 1_800_000_000_000, 55)
    }

    fn spans_received(&self) -> u64 {
        7
    }

    fn violations(&self) -> Vec<(String, u64)> {
        vec![("SecondClaim".to_owned(), 2), ("StaleEffect".to_owned(), 0)]
    }
}

pub struct Options {
    pub settings: Settings,
    pub secret: bool,
    pub ready: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { settings: Settings::default(), secret: false, ready: true }
    }
}

impl Bench {
    pub async fn start() -> Self {
        Self::start_with(Options::default()).await
    }

    pub async fn start_with(options: Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listen = "127.0.0.1:0".parse().unwrap();
        let mut settings = ProxySettings::new(listen, &folder.path().join("run"), &folder.path().join("state"));
        settings.drain = Duration::ZERO;
        if options.secret {
            let path = folder.path().join("secret");
            std::fs::write(&path, SECRET).unwrap();
            settings.join_secret_file = Some(path);
        }
        let serving = Proxy::bind(&settings, None).unwrap().serve(CancellationToken::new());
        let proxy_task = AbortOnDropHandle::new(tokio::spawn(serving));
        let proxy = ProxyHandle::ensure(settings).await.unwrap();

        let mut snapshot = Snapshot::default();
        let node = record::Node { proxy_address: proxy.address().to_string(), ..Default::default() };
        put(&mut snapshot.nodes, "a", node, 1);
        let (snapshots, snapshot) = watch::channel(Arc::new(snapshot));
        let security =
            Security { secret: options.secret.then(|| Secret::new(SECRET).unwrap()), allow_plaintext: false };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let gateway = Gateway::new(options.settings, address, &security, snapshot.clone());
        let router = web::router(&gateway, snapshot, Arc::new(Probe(options.ready)));
        let serving = web::serve(listener, router, CancellationToken::new(), Duration::ZERO);
        let gateway_task = AbortOnDropHandle::new(tokio::spawn(serving));
        Self { folder, gateway, proxy, address, snapshots, _tasks: [proxy_task, gateway_task] }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn change(&self, change: impl FnOnce(&mut Snapshot)) {
        self.snapshots.send_modify(|snapshot| {
            let mut next = Snapshot::clone(snapshot);
            next.revision += 1;
            change(&mut next);
            *snapshot = Arc::new(next);
        });
    }

    /// A deployment of the model "tiny" without instances.
    pub fn deploy(&self, embeddings: bool) {
        self.change(|snapshot| {
            let spec = DeploymentSpec { name: "tiny".to_owned(), slots: Some(2), embeddings, ..Default::default() };
            let revision = record::Revision { spec: Some(spec.clone()), ..Default::default() };
            put(&mut snapshot.revisions, &format!("tiny/{:020}", 1), revision, 1);
            put(&mut snapshot.deployments, "tiny", record::Deployment { spec: Some(spec), ..Default::default() }, 1);
        });
    }

    /// Ready instances of that deployment on a node, whether or not anybody answers for them.
    pub fn ready(&self, ids: &[&str], node: &str) {
        self.change(|snapshot| {
            for id in ids {
                let deployment = "tiny".to_owned();
                let instance = record::Instance { deployment, revision: 1, wanted: true, ..Default::default() };
                put(&mut snapshot.instances, id, instance, 2);
                put(&mut snapshot.claims, id, record::Claim { node: node.to_owned(), ..Default::default() }, 3);
                let state = InstanceState::Ready.into();
                let token = Some(Token { generation: 0, revision: 3 });
                put(&mut snapshot.statuses, id, record::Status { token, state, ..Default::default() }, 4);
            }
        });
    }

    pub async fn route(&self, routes: &[Route]) {
        self.proxy.set_routes(routes.to_vec());
        assert!(self.proxy.wait_applied(PATIENCE).await, "the routes are in force");
    }

    /// The model "tiny" on one real llama-server, as instance "tiny-222222".
    pub async fn with_llama(self, arguments: &[&str]) -> (Self, Llama) {
        self.deploy(arguments.contains(&"--embeddings"));
        let llama = Llama::start(self.folder.path(), arguments).await;
        self.route(&[route("tiny-222222", &llama.socket)]).await;
        self.ready(&["tiny-222222"], "a");
        (self, llama)
    }

    /// The same on a stand-in.
    pub async fn with_upstream(self) -> (Self, Upstream) {
        self.deploy(false);
        let upstream = Upstream::listen(&self.folder.path().join("a.sock"));
        self.route(&[route("tiny-222222", &upstream.socket)]).await;
        self.ready(&["tiny-222222"], "a");
        (self, upstream)
    }
}

pub fn put<T>(map: &mut Map<T>, key: &str, value: T, mod_revision: i64) {
    map.insert(key.to_owned(), Arc::new(Stored { value, create_revision: mod_revision, mod_revision }));
}

pub fn route(instance: &str, socket: &Path) -> Route {
    Route {
        instance: instance.to_owned(),
        token: Token { generation: 0, revision: 3 },
        socket: socket.to_owned(),
        log_dir: socket.parent().unwrap().to_owned(),
        state: RouteState::Open,
    }
}

/// A stock llama-server on the tiny model; killed when dropped.
pub struct Llama {
    pub socket: PathBuf,
    child: Child,
}

impl Llama {
    pub async fn start(folder: &Path, arguments: &[&str]) -> Self {
        let program = std::env::var_os("DROVER_LLAMA_SERVER")
            .expect("DROVER_LLAMA_SERVER is not set: start the tests with tests/run, which gets llama-server");
        let (model, socket) = (folder.join("tiny.gguf"), folder.join("llama.sock"));
        drover::tiny_model::write(&model, 1).unwrap();
        let log = std::fs::File::create(folder.join("server.log")).unwrap();
        let child = Command::new(program)
            .env_clear()
            .args(["--fit", "off", "--slots", "-np", "2", "-c", "65536", "--model"])
            .arg(&model)
            .arg("--host")
            .arg(&socket)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let llama = Self { socket, child };
        until("llama-server has loaded", async || llama.get("/health").await.is_some_and(|a| a.contains("\"ok\"")))
            .await;
        llama
    }

    /// An answer's text, directly over its socket.
    pub async fn get(&self, path: &str) -> Option<String> {
        let mut stream = UnixStream::connect(&self.socket).await.ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        Some(answer.split_once("\r\n\r\n")?.1.to_owned())
    }

    /// Slots that work on a request.
    pub async fn busy_slots(&self) -> usize {
        let slots: serde_json::Value = serde_json::from_str(&self.get("/slots").await.unwrap()).unwrap();
        slots.as_array().unwrap().iter().filter(|slot| slot["is_processing"] == true).count()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Llama {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What stands in for a llama-server: one connection after the other, in the hands of the test.
pub struct Upstream {
    pub socket: PathBuf,
    listener: UnixListener,
}

/// A connection with the request that came over it.
pub struct Arrived {
    pub head: String,
    pub body: Vec<u8>,
    stream: UnixStream,
}

impl Upstream {
    pub fn listen(socket: &Path) -> Self {
        Self { listener: UnixListener::bind(socket).unwrap(), socket: socket.to_owned() }
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

    /// The beginning of a stream of events.
    pub async fn begin(&mut self) {
        self.send("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n").await;
    }

    pub async fn chunk(&mut self, text: &str) {
        self.try_chunk(text).await.unwrap();
    }

    /// A chunk, to a peer that may have closed.
    pub async fn try_chunk(&mut self, text: &str) -> std::io::Result<()> {
        self.stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await
    }

    pub async fn finish(mut self) {
        self.send("0\r\n\r\n").await;
    }

    /// A whole answer.
    pub async fn answer(mut self, text: &str) {
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", text.len());
        self.send(&(head + text)).await;
    }

    /// Waits until the other end has closed.
    pub async fn closed(mut self) {
        let mut rest = Vec::new();
        let _ = soon("the connection is closed", self.stream.read_to_end(&mut rest)).await;
    }
}

pub fn client() -> Client<HttpConnector, Full<Bytes>> {
    Client::builder(TokioExecutor::new()).build_http()
}

pub fn get(url: &str) -> Request<Full<Bytes>> {
    Request::get(url).body(Full::default()).unwrap()
}

pub fn post(url: &str, body: impl Into<String>) -> Request<Full<Bytes>> {
    let request = Request::post(url).header("content-type", "application/json");
    request.body(Full::new(body.into().into())).unwrap()
}

/// A chat request for the model "tiny".
pub fn chat(bench: &Bench, stream: bool, max_tokens: u32) -> Request<Full<Bytes>> {
    let body = serde_json::json!({
        "model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "seed": 1,
        "max_tokens": max_tokens, "stream": stream,
    });
    post(&bench.url("/v1/chat/completions"), body.to_string())
}

pub async fn call(request: Request<Full<Bytes>>) -> Response<Incoming> {
    soon("an answer begins", client().request(request)).await.unwrap()
}

pub async fn text(response: Response<Incoming>) -> String {
    let body = soon("the answer ends", response.into_body().collect()).await.unwrap();
    String::from_utf8(body.to_bytes().to_vec()).unwrap()
}

pub async fn json(response: Response<Incoming>) -> serde_json::Value {
    let text = text(response).await;
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The next piece of a streamed answer.
pub async fn piece(response: &mut Response<Incoming>) -> String {
    let frame = soon("a piece comes", response.body_mut().frame()).await.unwrap().unwrap();
    String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap()
}

pub fn header<'a>(response: &'a Response<Incoming>, name: &str) -> &'a str {
    response.headers().get(name).map_or("", |value| value.to_str().unwrap())
}

/// The data of each event of a whole stream.
pub fn events(stream: &str) -> Vec<&str> {
    assert!(stream.ends_with("\n\n"), "the stream ends behind an event: {stream:?}");
    stream.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect()
}
