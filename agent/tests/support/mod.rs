//! A stage for the agent's tests: the real agent, shim and llama-server, and a coordinator that follows a script.
#![allow(
    dead_code,
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr
)]
#![allow(missing_docs, unused_imports, reason = "each test uses a part of this")]

pub mod check;
pub mod coordinator;
pub mod watcher;

pub use coordinator::{Answer, Coordinator};
use drover_proto::v1::{DeploymentSpec, InstanceState, StatusReport};
use drover_shim::{
    durable, identity,
    record::{Directory, Record, Spec},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until a condition holds; fails with what was waited for.
pub async fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn is_alive(pid: i64) -> bool {
    identity::stat(i32::try_from(pid).unwrap()).is_ok_and(|s| s.state != 'Z')
}

pub fn signal(pid: i64, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

pub fn llama_server() -> PathBuf {
    std::env::var_os("DROVER_LLAMA_SERVER")
        .map(PathBuf::from)
        .filter(|path| path.is_file())
        .expect("DROVER_LLAMA_SERVER must name a llama-server: run tests/run, which provides one")
}

/// A node: its folders, its agent while one runs, and the coordinator that it talks to.
pub struct Node {
    pub root: tempfile::TempDir,
    pub coordinator: Coordinator,
    /// More replicas of it, named to the agents after it.
    pub replicas: Vec<Coordinator>,
    pub agent: Option<Child>,
    pub config: String,
    /// What its agents start as llama-server.
    pub program: PathBuf,
    /// Step at which agents started from now on, or their shims, meet an end once: "kill", "exit" or "pause".
    pub fail_point: Option<(&'static str, &'static str)>,
    /// Command that agents are started through, which becomes the agent: its words, before those of the agent's.
    pub wrapper: Vec<String>,
    /// More variables of its agents.
    pub environment: Vec<(&'static str, String)>,
}

impl Node {
    /// A node whose agent has a session.
    pub async fn start() -> Self {
        Self::with("").await
    }

    /// The same, with more lines in the agent's configuration file.
    pub async fn with(config: &str) -> Self {
        Self::armed(config, None).await
    }

    /// The same, with a fail-point.
    pub async fn armed(config: &str, fail_point: Option<(&'static str, &'static str)>) -> Self {
        let mut node = Self::idle(config).await;
        node.fail_point = fail_point;
        node.start_agent().await;
        node
    }

    /// A node with a session whose servers misbehave.
    pub async fn misbehaving(how: &str) -> Self {
        let mut node = Self::idle("").await;
        node.config = misbehave(how, &node.path("mark"));
        node.program = misbehaving();
        node.start_agent().await;
        node
    }

    /// A node without an agent yet.
    pub async fn idle(config: &str) -> Self {
        let node = Self {
            root: tempfile::Builder::new().prefix("drover").tempdir().unwrap(),
            coordinator: Coordinator::start().await,
            replicas: Vec::new(),
            agent: None,
            config: config.to_owned(),
            program: llama_server(),
            fail_point: None,
            wrapper: Vec::new(),
            environment: Vec::new(),
        };
        fs::create_dir(node.path("models")).unwrap();
        drover::tiny_model::write(&node.path("models/tiny.gguf"), 1).unwrap();
        node
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn directory(&self, instance: &str) -> Directory {
        Directory::new(self.path("state/instances").join(instance))
    }

    pub fn record(&self, instance: &str) -> Record {
        durable::read(&self.directory(instance).record()).unwrap()
    }

    pub fn spec(&self, instance: &str) -> Spec {
        durable::read(&self.directory(instance).spec()).unwrap()
    }

    /// Starts an agent and waits until it has a session and has written its ready file.
    pub async fn start_agent(&mut self) {
        let sessions = self.coordinator.state().hellos.len();
        self.spawn_agent();
        let ready = self.path("ready.json");
        let coordinator = &self.coordinator;
        wait_for("the agent's session", || {
            (coordinator.state().hellos.len() > sessions && ready.exists()).then_some(())
        })
        .await;
    }

    pub fn spawn_agent(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("agent.log")).unwrap();
        let words: Vec<String> = self.wrapper.iter().cloned().chain(self.agent_words()).collect();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stderr(log);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if let Some((step, what)) = self.fail_point {
            let value = format!("{step}:{what}:{}", self.path("fail-point").display());
            command.env(drover_shim::failpoint::VARIABLE, value);
        }
        self.agent = Some(command.spawn().unwrap());
    }

    /// The command line of an agent, its configuration file written.
    pub fn agent_words(&self) -> Vec<String> {
        let config = self.path("agent.toml");
        fs::write(&config, &self.config).unwrap();
        let path = |name: &str| self.path(name).display().to_string();
        let all = std::iter::once(&self.coordinator).chain(&self.replicas);
        let addresses: Vec<String> = all.map(|coordinator| coordinator.address().to_string()).collect();
        let words = [
            env!("CARGO_BIN_EXE_drover-agent").to_owned(),
            format!("--config={}", config.display()),
            "--node=host-1".to_owned(),
            "--proxy-listen=127.0.0.1:0".to_owned(),
            format!("--coordinators={}", addresses.join(",")),
            format!("--state-dir={}", path("state")),
            format!("--model-roots={}", path("models")),
            format!("--llama-server={}", self.program.display()),
            format!("--shim={}", shim().display()),
            format!("--ready-file={}", path("ready.json")),
            "--log-filter=info,drover_agent=debug".to_owned(),
        ];
        // A flag would win over the file.
        let memory = (!self.config.contains("memory_bytes")).then(|| "--memory-bytes=100000000000".to_owned());
        words.into_iter().chain(memory).collect()
    }

    /// Waits until the agent has killed itself at its fail-point; those started from now on have none.
    pub async fn died(&mut self) {
        let mut agent = self.agent.take().unwrap();
        let status = wait_for("the agent's end at its fail-point", || agent.try_wait().unwrap()).await;
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{status}");
        let _ = fs::remove_file(self.path("ready.json"));
        self.fail_point = None;
    }

    /// Waits until a process is held at the fail-point; returns its pid.
    pub async fn paused(&self) -> i32 {
        wait_for("a process at the fail-point", || {
            let pid = fs::read_to_string(self.path("fail-point")).ok()?.parse().ok()?;
            identity::stat(pid).is_ok_and(|s| s.state == 'T').then_some(pid)
        })
        .await
    }

    /// Processes that belong to an instance of this node: shims, and whatever names its socket.
    pub fn processes(&self, instance: &str) -> Vec<i32> {
        let (directory, socket) = (self.directory(instance).path().to_owned(), self.socket(instance));
        watcher::processes(|words| words.iter().any(|word| Path::new(word) == directory || Path::new(word) == socket))
    }

    pub fn socket(&self, instance: &str) -> PathBuf {
        self.path("state/run").join(format!("{instance}.sock"))
    }

    /// Waits until neither a process nor a file of an instance is left.
    pub async fn nothing_left(&self, instance: &str, what: &str) {
        wait_for(&format!("{what}: everything of {instance} to go"), || {
            let files = self.directory(instance).path().exists() || self.socket(instance).exists();
            (!files && self.processes(instance).is_empty()).then_some(())
        })
        .await;
    }

    pub fn kill_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
        let _ = fs::remove_file(self.path("ready.json"));
    }

    /// Ends the agent by SIGTERM.
    pub async fn end_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        signal(i64::from(agent.id()), Signal::SIGTERM);
        let status = wait_for("the agent's end", || agent.try_wait().unwrap()).await;
        assert!(status.success(), "{status}");
    }

    /// Offers an instance and waits until it is ready.
    pub async fn run(&self, instance: &str) -> StatusReport {
        self.coordinator.offer(instance, tiny());
        self.reported(instance, InstanceState::Ready).await
    }

    /// Waits until the last report of an instance says this.
    pub async fn reported(&self, instance: &str, state: InstanceState) -> StatusReport {
        self.report(&format!("{instance} to be {state:?}"), instance, |r| r.state() == state).await
    }

    pub async fn report(&self, what: &str, instance: &str, fits: impl Fn(&StatusReport) -> bool) -> StatusReport {
        wait_for(what, || self.coordinator.last_report(instance).filter(|r| fits(r))).await
    }

    /// Events of an instance for this reason, as messages.
    pub fn events(&self, instance: &str, reason: &str) -> Vec<String> {
        let state = self.coordinator.state();
        let these = state.events.iter().filter(|e| e.instance == instance && e.reason == reason);
        these.map(|e| e.message.clone()).collect()
    }

    /// What an instance's server has printed.
    pub fn server_log(&self, instance: &str) -> String {
        fs::read_to_string(drover_shim::logs::file(&self.directory(instance).log(), 0)).unwrap_or_default()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        let mut down = Command::new(env!("CARGO_BIN_EXE_drover-agent"));
        let down = down.arg("down").arg("--state-dir").arg(self.path("state")).output().unwrap();
        if std::thread::panicking() {
            eprintln!("--- agent.log\n{}", self.log());
        } else {
            assert!(down.status.success(), "down: {}", String::from_utf8_lossy(&down.stderr));
        }
    }
}

/// The shim lies beside the agent, as built by the workspace.
pub fn shim() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_drover-agent")).with_file_name("drover-shim");
    assert!(path.is_file(), "{} is not built: run tests/run, or cargo build --workspace", path.display());
    path
}

/// A program that behaves like a llama-server, and then does not (tests/support/misbehaving.rs).
pub fn misbehaving() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_drover-agent")).with_file_name("examples").join("misbehaving-server");
    assert!(
        path.is_file(),
        "{} is not built: run tests/run, or cargo build -p drover-agent --examples",
        path.display()
    );
    path
}

/// Configuration of an agent whose servers misbehave so; restarts are quick.
pub fn misbehave(how: &str, mark: &Path) -> String {
    format!(
        "[restarts]\nbackoff_first_ms = 10\nquick_ends_max = 3\n\
         [llama_server_environment]\nMISBEHAVE = '{how}'\nMARK = '{}'\n",
        mark.display()
    )
}

pub fn tiny() -> DeploymentSpec {
    DeploymentSpec {
        name: "tiny".to_owned(),
        model_path: "tiny.gguf".to_owned(),
        context_tokens: Some(512),
        slots: Some(1),
        threads: Some(1),
        ..DeploymentSpec::default()
    }
}

/// Asks an instance for its health through the node's proxy, as a coordinator would; the status of the answer.
pub async fn ask(node: &Node, instance: &str) -> u16 {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let ready: serde_json::Value = serde_json::from_str(&fs::read_to_string(node.path("ready.json")).unwrap()).unwrap();
    let mut stream = tokio::net::TcpStream::connect(ready["proxy"].as_str().unwrap()).await.unwrap();
    let request = format!("GET /i/{instance}/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer.split(' ').nth(1).unwrap().parse().unwrap()
}
