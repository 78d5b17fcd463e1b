//! A whole fleet of real parts on one machine: etcd, coordinators, agents, llama-servers.
//!
//! Owns: the parts, and how each is started, ended, killed and halted. Coordinators keep their addresses for the life of
//! the fleet, so that they can be restarted under living agents. What an operator does with it is in [`operate`].

mod operate;

use crate::{
    etcd::{Etcd, free_port},
    link::Link,
    programs::{Running, llama_server, processes_with, program},
};
use anyhow::{Context as _, ensure};
use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use tempfile::TempDir;

/// The secret of every test fleet; also what tests look for where it must not appear.
pub const SECRET: &str = "canary-7f3a-join-secret-of-the-tests";
/// Longest wait for something that takes well under a second on an idle machine.
pub const SOON: Duration = Duration::from_secs(30);

/// Starts tried, each with other ports, when one turned out to be taken.
const STARTS: usize = 5;

/// How a fleet is to be.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Number of coordinators.
    pub coordinators: usize,
    /// Number of agents.
    pub agents: usize,
    /// Lines added to every coordinator's configuration.
    pub coordinator_toml: String,
    /// Lines added to every agent's configuration.
    pub agent_toml: String,
    /// Environment of every program.
    pub environment: Vec<(String, String)>,
    /// Environment of coordinators only.
    pub coordinator_environment: Vec<(String, String)>,
    /// What the agent of this number runs in the place of llama-server.
    pub llama_server_of: Option<(usize, PathBuf)>,
    /// More arguments of etcd.
    pub etcd_arguments: Vec<&'static str>,
    /// Each coordinator reaches etcd through a line of its own, which can be cut: see [`Coordinator::link`].
    pub links: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            coordinators: 1,
            agents: 1,
            coordinator_toml: String::new(),
            agent_toml: String::new(),
            environment: Vec::new(),
            coordinator_environment: Vec::new(),
            llama_server_of: None,
            etcd_arguments: Vec::new(),
            links: false,
        }
    }
}

/// A coordinator and its addresses.
#[derive(Debug)]
pub struct Coordinator {
    /// The process; `None` while it is down.
    pub running: Option<Running>,
    /// gRPC, "host:port"; the same over restarts.
    pub grpc: String,
    /// HTTP, "host:port"; the same over restarts.
    pub http: String,
    /// Its way to etcd, where the plan asks for one that can be cut.
    pub link: Option<Link>,
}

/// An agent.
#[derive(Debug)]
pub struct Agent {
    /// Name of its node.
    pub node: String,
    /// The process; `None` while it is down.
    pub running: Option<Running>,
    config: PathBuf,
    state_dir: PathBuf,
}

/// A running fleet.
#[derive(Debug)]
pub struct Cluster {
    /// Coordinators.
    pub coordinators: Vec<Coordinator>,
    /// Agents, "a", "b", …
    pub agents: Vec<Agent>,
    /// The store.
    pub etcd: Etcd,
    /// Index of the coordinator that is asked where none is named.
    pub asked: usize,
    plan: Plan,
    folder: TempDir,
}

impl Cluster {
    /// Time to live of its sessions: what its plan says, else the default.
    #[must_use]
    pub fn session_ttl(&self) -> Duration {
        let said = self.plan.coordinator_toml.lines().find_map(|line| line.strip_prefix("session_ttl_ms = "));
        said.and_then(|ms| ms.parse().ok()).map_or(Duration::from_secs(10), Duration::from_millis)
    }

    /// Starts a fleet and waits until every agent has its session.
    ///
    /// # Errors
    /// When a part does not come up; with the end of its log.
    pub async fn start(plan: Plan) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("drv-").tempdir()?;
        fs::create_dir(folder.path().join("models"))?;
        drover::tiny_model::write(&folder.path().join("models/tiny.gguf"), 1)?;
        let secret = folder.path().join("secret");
        fs::write(&secret, SECRET)?;
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600))?;
        let etcd = Etcd::start_with(&plan.etcd_arguments).await?;
        let mut cluster = Self { coordinators: Vec::new(), agents: Vec::new(), etcd, asked: 0, plan, folder };
        for n in 0..cluster.plan.coordinators {
            cluster.add_coordinator(n).await?;
        }
        for n in 0..cluster.plan.agents {
            let agent = cluster.prepare_agent(n)?;
            cluster.agents.push(agent);
            cluster.start_agent(n)?;
        }
        for n in 0..cluster.plan.agents {
            cluster.agent_ready(n).await?;
        }
        Ok(cluster)
    }

    /// Folder of everything; part of every process's command line.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Text that every process of this fleet has in its command line.
    #[must_use]
    pub fn mark(&self) -> String {
        self.folder.path().display().to_string()
    }

    /// The tiny model.
    #[must_use]
    pub fn model(&self) -> PathBuf {
        self.folder.path().join("models/tiny.gguf")
    }

    /// Finds a coordinator its addresses and starts it.
    async fn add_coordinator(&mut self, n: usize) -> anyhow::Result<()> {
        let link = if self.plan.links { Some(Link::to(&self.etcd.endpoints()[0]).await?) } else { None };
        self.coordinators.push(Coordinator { running: None, grpc: String::new(), http: String::new(), link });
        for left in (0..STARTS).rev() {
            let coordinator = &mut self.coordinators[n];
            for address in [&mut coordinator.grpc, &mut coordinator.http] {
                *address = format!("127.0.0.1:{}", free_port()?);
            }
            match self.start_coordinator(n).await {
                Ok(()) => break,
                Err(error) if left > 0 && format!("{error:#}").contains("in use") => {
                    eprintln!("a port was taken meanwhile, others are tried: {error:#}");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Starts a coordinator (again), at its addresses, and waits until it serves.
    ///
    /// # Errors
    /// When it does not come up; with the end of its log.
    pub async fn start_coordinator(&mut self, n: usize) -> anyhow::Result<()> {
        self.spawn_coordinator(n)?;
        self.coordinator_ready(n).await
    }

    /// Starts a coordinator (again), at its addresses, and waits for nothing.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn_coordinator(&mut self, n: usize) -> anyhow::Result<()> {
        let Coordinator { grpc, http, link, .. } = &self.coordinators[n];
        let etcd = link.as_ref().map_or_else(|| self.etcd.endpoints(), |link| vec![link.endpoint()]);
        let name = format!("coordinator-{n}");
        let config = self.folder.path().join(format!("{name}.toml"));
        let text = format!(
            "id = '{name}'\ngrpc_listen = '{grpc}'\nhttp_listen = '{http}'\nstore = 'etcd'\n\
             etcd_endpoints = {etcd:?}\ndata_dir = '{folder}/{name}'\njoin_secret_file = '{folder}/secret'\n\
             log_filter = 'info,drover_coordinator=debug'\n{}",
            self.plan.coordinator_toml,
            folder = self.folder.path().display(),
        );
        fs::write(&config, text)?;
        let arguments = ["--config".to_owned(), config.display().to_string()];
        let binary = program("drover-coordinator");
        let environment = [self.plan.environment.clone(), self.plan.coordinator_environment.clone()].concat();
        let running = Running::start(&binary, &name, self.folder.path(), &arguments, &environment)?;
        self.coordinators[n].running = Some(running);
        Ok(())
    }

    /// Waits until a coordinator serves.
    ///
    /// # Errors
    /// When it ends, or takes too long.
    pub async fn coordinator_ready(&mut self, n: usize) -> anyhow::Result<()> {
        self.coordinators[n].running.as_mut().context("the coordinator is down")?.ready(SOON).await?;
        Ok(())
    }

    /// Ends a coordinator in order (SIGTERM).
    ///
    /// # Errors
    /// When it does not end, or not cleanly.
    pub async fn stop_coordinator(&mut self, n: usize) -> anyhow::Result<()> {
        let mut running = self.coordinators[n].running.take().context("the coordinator is down")?;
        let status = running.terminate(SOON).await?;
        ensure!(status.success(), "coordinator-{n} ended with {status}:\n{}", running.log_tail());
        Ok(())
    }

    /// Ends a coordinator at once (SIGKILL).
    ///
    /// # Errors
    /// When it is down.
    pub fn kill_coordinator(&mut self, n: usize) -> anyhow::Result<()> {
        self.coordinators[n].running.take().context("the coordinator is down")?.kill()
    }

    /// Halts an agent where it is (SIGSTOP); what it has started are processes of their own, and go on.
    ///
    /// # Errors
    /// When it is down, or does not stop.
    pub async fn pause_agent(&self, n: usize) -> anyhow::Result<()> {
        self.agents[n].running.as_ref().context("the agent is down")?.pause().await
    }

    /// Lets an agent go on after [`Cluster::pause_agent`].
    ///
    /// # Errors
    /// When it is down.
    pub fn resume_agent(&self, n: usize) -> anyhow::Result<()> {
        self.agents[n].running.as_ref().context("the agent is down")?.resume()
    }

    fn prepare_agent(&self, n: usize) -> anyhow::Result<Agent> {
        let node = String::from(char::from(b'a' + u8::try_from(n)?));
        let folder = self.folder.path();
        let state_dir = folder.join(format!("agent-{node}"));
        let config = folder.join(format!("agent-{node}.toml"));
        let coordinators: Vec<&str> = self.coordinators.iter().map(|c| c.grpc.as_str()).collect();
        let text = format!(
            "node = '{node}'\nlabels = {{ host = '{node}' }}\ncoordinators = {coordinators:?}\nstate_dir = '{}'\nllama_server = '{}'\n\
             model_roots = ['{folder}/models']\nproxy_listen = '127.0.0.1:0'\nmemory_bytes = 68719476736\n\
             join_secret_file = '{folder}/secret'\nlog_filter = 'info,drover_agent=debug'\n{}",
            state_dir.display(),
            llama_server()?.display(),
            self.plan.agent_toml,
            folder = folder.display(),
        );
        fs::write(&config, text)?;
        Ok(Agent { node, running: None, config, state_dir })
    }

    /// Starts an agent (again).
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start_agent(&mut self, n: usize) -> anyhow::Result<()> {
        let agent = &self.agents[n];
        let mut arguments = vec!["run".to_owned(), "--config".to_owned(), agent.config.display().to_string()];
        if let Some((_, program)) = self.plan.llama_server_of.as_ref().filter(|(of, _)| *of == n) {
            arguments.extend(["--llama-server".to_owned(), program.display().to_string()]);
        }
        let name = format!("agent-{}", agent.node);
        let binary = program("drover-agent");
        let running = Running::start(&binary, &name, self.folder.path(), &arguments, &self.plan.environment)?;
        self.agents[n].running = Some(running);
        Ok(())
    }

    /// Waits until an agent has its session.
    ///
    /// # Errors
    /// When it ends, or takes too long.
    pub async fn agent_ready(&mut self, n: usize) -> anyhow::Result<()> {
        self.agents[n].running.as_mut().context("the agent is down")?.ready(SOON).await?;
        Ok(())
    }

    /// The ends of all programs' logs.
    #[must_use]
    pub fn logs(&self) -> String {
        let coordinators = self.coordinators.iter().filter_map(|c| Some(("coordinator", c.running.as_ref()?)));
        let agents = self.agents.iter().filter_map(|a| Some(("agent", a.running.as_ref()?)));
        coordinators.chain(agents).map(|(what, running)| format!("--- {what}\n{}\n", running.log_tail())).collect()
    }

    /// Ends an agent and everything that it started: SIGTERM, then `drover-agent down`.
    ///
    /// # Errors
    /// When one of them fails.
    pub async fn down(&mut self, n: usize) -> anyhow::Result<()> {
        let agent = &mut self.agents[n];
        if let Some(mut running) = agent.running.take() {
            let status = running.terminate(SOON).await?;
            ensure!(status.success(), "the agent ended with {status}:\n{}", running.log_tail());
        }
        let output = Command::new(program("drover-agent")).arg("down").arg("--config").arg(&agent.config).output()?;
        ensure!(output.status.success(), "drover-agent down: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Ends everything in order and checks that nothing is left: no process, no socket.
    ///
    /// # Errors
    /// Says what is left.
    pub async fn end(mut self) -> anyhow::Result<()> {
        for n in 0..self.agents.len() {
            self.down(n).await?;
        }
        for n in 0..self.coordinators.len() {
            if self.coordinators[n].running.is_some() {
                self.stop_coordinator(n).await?;
            }
        }
        let mark = self.mark();
        let left = processes_with(&mark);
        ensure!(left.is_empty(), "processes are left: {left:#?}");
        let sockets = fs::read_to_string("/proc/net/unix")?;
        let sockets: Vec<&str> = sockets.lines().filter(|line| line.contains(&mark)).collect();
        ensure!(sockets.is_empty(), "sockets are left: {sockets:#?}");
        for agent in &self.agents {
            let instances = agent.state_dir.join("instances");
            let left: Vec<_> =
                fs::read_dir(&instances).map(|d| d.flatten().map(|e| e.path()).collect()).unwrap_or_default();
            ensure!(left.is_empty(), "{} is left of instances: {left:?}", instances.display());
        }
        let folder = self.folder.path().to_owned();
        drop(self);
        ensure!(!folder.exists(), "{} is left", folder.display());
        Ok(())
    }
}

impl Drop for Cluster {
    /// After a failed test: nothing of the fleet may live on.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for agent in &mut self.agents {
            agent.running = None;
        }
        self.coordinators.clear();
        for found in processes_with(&self.mark()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(found.pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}
