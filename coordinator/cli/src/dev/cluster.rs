//! The programs of one `drover dev`: started in order, watched, ended in the reverse order.
//!
//! Owns the processes and their folders. Whatever happens, [`Cluster::end`] is called once at the end: each thing is
//! on record here from the moment it exists, so a start that failed half-way is ended like a whole one.

use super::{config, etcd, place::Place, process::Process, programs::Programs};
use crate::{failure::Failure, progress::Progress};
use serde::de::DeserializeOwned;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

/// Longest wait until a program says that it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(20);
/// Time from SIGTERM to SIGKILL for our programs: more than the coordinator's own drain.
const GRACE: Duration = Duration::from_secs(15);
/// Longest time for `drover-agent down`: it drains and stops servers.
const DOWN_TIMEOUT: Duration = Duration::from_secs(60);

/// Where the coordinator listens.
#[derive(Debug, Clone)]
pub struct Addresses {
    /// gRPC, "host:port".
    pub grpc: String,
    /// HTTP, "host:port".
    pub http: String,
}

/// An agent and what is needed to take down what it started.
#[derive(Debug)]
struct Agent {
    node: String,
    config: PathBuf,
    process: Process,
}

/// The programs.
#[derive(Debug)]
pub struct Cluster {
    /// Folders.
    pub place: Place,
    /// The first deployment is ready.
    pub ready: bool,
    programs: Programs,
    join_secret_file: Option<PathBuf>,
    etcd: Option<Process>,
    coordinator: Option<Process>,
    agents: Vec<Agent>,
    /// Tells of ends that nobody asked for.
    deaths: mpsc::Sender<String>,
}

impl Cluster {
    /// Nothing runs yet. The receiver gets an obituary when a program ends unasked.
    pub fn new(place: Place, programs: Programs, secret: Option<PathBuf>) -> (Self, mpsc::Receiver<String>) {
        // The first one ends the fleet; what does not fit is not needed.
        let (deaths, dead) = mpsc::channel(1);
        let (etcd, coordinator, agents) = (None, None, Vec::new());
        (Self { place, ready: false, programs, join_secret_file: secret, etcd, coordinator, agents, deaths }, dead)
    }

    /// Starts etcd, unless the coordinator is to keep its state in memory; gives its URL.
    pub async fn start_etcd(&mut self, progress: &Progress) -> Result<Option<String>, Failure> {
        let Some(program) = self.programs.etcd.clone() else {
            progress.done("no etcd: the coordinator keeps its state in memory, and loses it when it ends");
            return Ok(None);
        };
        progress.doing("etcd: starting");
        let url = etcd::start(&program, &self.place, &mut self.etcd).await?;
        if let Some(process) = &self.etcd {
            self.watch(process);
        }
        progress.done(&format!("etcd answers at {url}"));
        Ok(Some(url))
    }

    /// Starts the coordinator on these ports (0: free ones) and waits until it listens.
    pub async fn start_coordinator(
        &mut self,
        etcd: Option<String>,
        ports: (u16, u16),
        progress: &Progress,
    ) -> Result<Addresses, Failure> {
        progress.doing("coordinator: starting");
        let ready_file = self.place.ready_file("coordinator");
        let config = config::Coordinator {
            id: "dev".to_owned(),
            grpc_listen: format!("127.0.0.1:{}", ports.0),
            http_listen: format!("127.0.0.1:{}", ports.1),
            store: if etcd.is_some() { "etcd" } else { "memory" }.to_owned(),
            etcd_endpoints: etcd.into_iter().collect(),
            data_dir: self.place.data.join("coordinator"),
            ready_file: ready_file.clone(),
            join_secret_file: self.join_secret_file.clone(),
        };
        let file = self.place.config("coordinator", &to_toml(&config)?)?;
        let process = self.start("coordinator", &self.programs.coordinator, &["--config".to_owned(), shown(&file)])?;
        self.coordinator = Some(process);
        let ready: config::CoordinatorReady = ready("the coordinator", &ready_file).await?;
        progress.done(&format!("coordinator answers at {} (gRPC) and {} (HTTP)", ready.grpc, ready.http));
        Ok(Addresses { grpc: ready.grpc, http: ready.http })
    }

    /// Starts `count` agents at once and waits until each has a session; gives names and proxy addresses.
    pub async fn start_agents(
        &mut self,
        count: u16,
        addresses: &Addresses,
        model_root: &Path,
        progress: &Progress,
    ) -> Result<Vec<(String, String)>, Failure> {
        let mut ready_files = Vec::new();
        for n in 1..=count {
            let node = format!("node-{n}");
            let ready_file = self.place.ready_file(&node);
            let config = config::Agent {
                node: node.clone(),
                coordinators: vec![addresses.grpc.clone()],
                state_dir: self.place.data.join("agents").join(&node),
                runtime_dir: self.place.runtime(&node),
                llama_server: self.programs.llama_server.clone(),
                model_roots: vec![model_root.to_owned()],
                proxy_listen: "127.0.0.1:0".to_owned(),
                ready_file: ready_file.clone(),
                join_secret_file: self.join_secret_file.clone(),
            };
            let config = self.place.config(&node, &to_toml(&config)?)?;
            let process = self.start(&node, &self.programs.agent, &["--config".to_owned(), shown(&config)])?;
            self.agents.push(Agent { node: node.clone(), config, process });
            ready_files.push((node, ready_file));
        }
        let mut nodes = Vec::new();
        for (node, ready_file) in ready_files {
            progress.doing(&format!("agents: {} of {count} are connected", nodes.len()));
            let answer: config::AgentReady = ready(&format!("the agent of {node}"), &ready_file).await?;
            nodes.push((node, answer.proxy));
        }
        progress.done(&format!("{count} {} connected", if count == 1 { "agent is" } else { "agents are" }));
        Ok(nodes)
    }

    fn start(&self, name: &str, program: &Path, arguments: &[String]) -> Result<Process, Failure> {
        let process = Process::start(name, program, arguments, &self.place.log(name))
            .map_err(|e| Failure::Answered(format!("{} can't be started: {e}", program.display())))?;
        self.watch(&process);
        Ok(process)
    }

    fn watch(&self, process: &Process) {
        let (deaths, obituary, ended) = (self.deaths.clone(), process.mourner(), process.ended());
        tokio::spawn(async move {
            let end = ended.await;
            if !end.asked {
                // Full: another one has told already.
                let _ = deaths.try_send(obituary(end));
            }
        });
    }

    /// Ends everything and says what could not be ended. With `hurry`, without waiting for those that take their time.
    pub async fn end(self, hurry: &watch::Receiver<bool>, keep: bool, progress: &Progress) -> Vec<String> {
        let mut problems = Vec::new();
        progress.doing("agents: ending");
        futures::future::join_all(self.agents.iter().map(|a| a.process.stop(GRACE, hurry))).await;
        progress.doing("servers: draining and ending");
        let downs = self.agents.iter().map(|agent| self.down(agent, hurry));
        problems.extend(futures::future::join_all(downs).await.into_iter().flatten());
        for process in [&self.coordinator, &self.etcd].into_iter().flatten() {
            progress.doing(&format!("{}: ending", process.name()));
            process.stop(GRACE, hurry).await;
        }
        let leftovers = self.place.leftovers();
        if !leftovers.is_empty() {
            problems.push(format!("still running: {}", leftovers.join(", ")));
        }
        // What still runs is on record there: `drover-agent down` needs it.
        let keep = keep || !problems.is_empty();
        match self.place.remove(keep) {
            Ok(None) => {}
            Ok(Some(left)) => progress.done(&format!("kept: {}", left.display())),
            Err(e) => problems.push(format!("the temporary folder was not removed: {e}")),
        }
        problems
    }

    /// Ends what an agent leaves running by design: servers, shims, the proxy.
    async fn down(&self, agent: &Agent, hurry: &watch::Receiver<bool>) -> Option<String> {
        let name = format!("{}-down", agent.node);
        let arguments = ["down".to_owned(), "--config".to_owned(), shown(&agent.config)];
        let process = match Process::start(&name, &self.programs.agent, &arguments, &self.place.log(&name)) {
            Ok(process) => process,
            Err(e) => return Some(format!("{} down can't be started: {e}", self.programs.agent.display())),
        };
        let Ok(end) = tokio::time::timeout(DOWN_TIMEOUT, process.ended()).await else {
            process.stop(Duration::ZERO, hurry).await;
            return Some(format!("`drover-agent down` of {} took over {} s", agent.node, DOWN_TIMEOUT.as_secs()));
        };
        let good = end.status.is_some_and(|status| status.success());
        (!good).then(|| process.mourner()(end))
    }
}

/// Waits until a program has written its ready file, and reads it. That the program has ended is noticed elsewhere.
async fn ready<T: DeserializeOwned>(who: &str, file: &Path) -> Result<T, Failure> {
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        // It is written as a whole or not at all.
        if let Ok(text) = std::fs::read_to_string(file) {
            return serde_json::from_str(&text)
                .map_err(|e| Failure::Answered(format!("the ready file of {who} can't be read: {e}")));
        }
        if Instant::now() >= deadline {
            return Err(Failure::TimedOut(format!("{who} was not ready within {} s", READY_TIMEOUT.as_secs())));
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

fn to_toml(config: &impl serde::Serialize) -> Result<String, Failure> {
    toml::to_string(config).map_err(|e| Failure::Answered(format!("a configuration can't be written: {e}")))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
