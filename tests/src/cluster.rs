//! A whole fleet of real parts on one machine: etcd, coordinators, agents, llama-servers.

use crate::{
    etcd::Etcd,
    programs::{Running, eventually, llama_server, processes_with, program},
};
use anyhow::{Context as _, bail, ensure};
use drover_proto::{
    transport::{Connection, Secret, Security, Target},
    v1::{
        ApplyDeploymentRequest, DeleteDeploymentRequest, Deployment, DeploymentSpec, GetDeploymentRequest, Instance,
        InstanceState, ListInstancesRequest, ListNodesRequest, fleet_service_client::FleetServiceClient,
    },
};
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
        }
    }
}

/// A coordinator and its addresses.
#[derive(Debug)]
pub struct Coordinator {
    /// The process.
    pub running: Running,
    /// gRPC, "host:port".
    pub grpc: String,
    /// HTTP, "host:port".
    pub http: String,
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
    plan: Plan,
    folder: TempDir,
}

impl Cluster {
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
        let etcd = Etcd::start().await?;
        let mut cluster = Self { coordinators: Vec::new(), agents: Vec::new(), etcd, plan, folder };
        for n in 0..cluster.plan.coordinators {
            let coordinator = cluster.start_coordinator(n).await?;
            cluster.coordinators.push(coordinator);
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

    /// Ends a coordinator and starts it again, on other ports.
    ///
    /// # Errors
    /// When it does not end cleanly or does not come up.
    pub async fn restart_coordinator(&mut self, n: usize) -> anyhow::Result<()> {
        self.coordinators[n].running.terminate(SOON).await?;
        self.coordinators[n] = self.start_coordinator(n).await?;
        Ok(())
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

    async fn start_coordinator(&self, n: usize) -> anyhow::Result<Coordinator> {
        let name = format!("coordinator-{n}");
        let config = self.folder.path().join(format!("{name}.toml"));
        let text = format!(
            "id = '{name}'\ngrpc_listen = '127.0.0.1:0'\nhttp_listen = '127.0.0.1:0'\nstore = 'etcd'\n\
             etcd_endpoints = {:?}\ndata_dir = '{folder}/{name}'\njoin_secret_file = '{folder}/secret'\n\
             log_filter = 'info,drover_coordinator=debug'\n{}",
            self.etcd.endpoints(),
            self.plan.coordinator_toml,
            folder = self.folder.path().display(),
        );
        fs::write(&config, text)?;
        let arguments = ["--config".to_owned(), config.display().to_string()];
        let binary = program("drover-coordinator");
        let environment = [self.plan.environment.clone(), self.plan.coordinator_environment.clone()].concat();
        let mut running = Running::start(&binary, &name, self.folder.path(), &arguments, &environment)?;
        let addresses = running.ready(SOON).await?;
        let address = |key: &str| addresses[key].as_str().map(str::to_owned).context("no address in the ready file");
        Ok(Coordinator { grpc: address("grpc")?, http: address("http")?, running })
    }

    fn prepare_agent(&self, n: usize) -> anyhow::Result<Agent> {
        let node = String::from(char::from(b'a' + u8::try_from(n)?));
        let folder = self.folder.path();
        let state_dir = folder.join(format!("agent-{node}"));
        let config = folder.join(format!("agent-{node}.toml"));
        let coordinators: Vec<&str> = self.coordinators.iter().map(|c| c.grpc.as_str()).collect();
        let text = format!(
            "node = '{node}'\ncoordinators = {coordinators:?}\nstate_dir = '{}'\nllama_server = '{}'\n\
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
        let arguments = ["run".to_owned(), "--config".to_owned(), agent.config.display().to_string()];
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

    /// A connection to a coordinator, as an operator.
    ///
    /// # Errors
    /// When it can't be reached.
    pub async fn client(&self, n: usize) -> anyhow::Result<FleetServiceClient<Connection>> {
        Ok(FleetServiceClient::new(self.connect(n, None).await?))
    }

    /// A connection to a coordinator, as a node when one is named.
    ///
    /// # Errors
    /// When it can't be reached.
    pub async fn connect(&self, n: usize, node: Option<&str>) -> anyhow::Result<Connection> {
        let security = Security { secret: Secret::new(SECRET), allow_plaintext: false };
        Ok(Target::new(&[self.coordinators[n].grpc.clone()], &security, node)?.connect(0).await?)
    }

    /// A deployment of the tiny model.
    #[must_use]
    pub fn spec(&self, name: &str, replicas: i32) -> DeploymentSpec {
        DeploymentSpec {
            name: name.to_owned(),
            model_path: "tiny.gguf".to_owned(),
            replicas: Some(replicas),
            slots: Some(2),
            context_tokens: Some(2048),
            threads: Some(1),
            memory_bytes: Some(256 << 20),
            drain_timeout_ms: Some(20_000),
            ..DeploymentSpec::default()
        }
    }

    /// Applies a new deployment and waits until all of its instances are ready.
    ///
    /// # Errors
    /// When it is refused or does not become ready.
    pub async fn deploy(&self, spec: DeploymentSpec) -> anyhow::Result<Vec<Instance>> {
        let (name, replicas) = (spec.name.clone(), spec.replicas.unwrap_or(1));
        self.client(0).await?.apply_deployment(ApplyDeploymentRequest { spec: Some(spec), generation: 0 }).await?;
        self.ready(&name, replicas).await
    }

    /// Runs `drover` against a coordinator; its exit code, what it printed and what it said beside that.
    ///
    /// # Errors
    /// When it can't be run.
    pub fn drover(&self, coordinator: usize, words: &[&str]) -> anyhow::Result<(Option<i32>, String, String)> {
        let mut command = Command::new(program("drover"));
        command.args(["--coordinators", &self.coordinators[coordinator].grpc, "--join-secret-file"]);
        let output = command.arg(self.folder().join("secret")).args(words).output()?;
        Ok((output.status.code(), String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?))
    }

    /// Waits until exactly this many instances of a deployment exist, all ready.
    ///
    /// # Errors
    /// When they do not become so in time; says how they are.
    pub async fn ready(&self, name: &str, replicas: i32) -> anyhow::Result<Vec<Instance>> {
        let mut client = self.client(0).await?;
        let what = format!("{replicas} instances of {name} are ready");
        let outcome = eventually(&what, SOON * 2, async || {
            let request = ListInstancesRequest { deployment: name.to_owned(), page_size: 1000, ..Default::default() };
            let instances = client.list_instances(request).await?.into_inner().instances;
            let ready = instances.iter().filter(|i| i.state() == InstanceState::Ready && i.wanted).count();
            ensure!(ready == instances.len() && ready == usize::try_from(replicas)?, "{instances:#?}");
            Ok(instances)
        });
        outcome.await.with_context(|| self.logs())
    }

    /// A deployment.
    ///
    /// # Errors
    /// When there is none.
    pub async fn deployment(&self, name: &str) -> anyhow::Result<Deployment> {
        let request = GetDeploymentRequest { name: name.to_owned() };
        self.client(0)
            .await?
            .get_deployment(request)
            .await?
            .into_inner()
            .deployment
            .context("no deployment in the answer")
    }

    /// Deletes a deployment and waits until it is gone.
    ///
    /// # Errors
    /// When it is refused or does not go.
    pub async fn delete(&self, name: &str) -> anyhow::Result<()> {
        let mut client = self.client(0).await?;
        client.delete_deployment(DeleteDeploymentRequest { name: name.to_owned(), generation: 0 }).await?;
        let what = format!("{name} is gone");
        let gone = eventually(&what, SOON * 2, async || {
            match client.get_deployment(GetDeploymentRequest { name: name.to_owned() }).await {
                Err(status) if status.code() == tonic::Code::NotFound => Ok(()),
                Err(status) => Err(status.into()),
                Ok(answer) => bail!("{:?}", answer.into_inner()),
            }
        });
        gone.await.with_context(|| self.logs())
    }

    /// Waits until this many nodes are connected.
    ///
    /// # Errors
    /// When they are not in time.
    pub async fn connected(&self, nodes: usize) -> anyhow::Result<()> {
        let mut client = self.client(0).await?;
        eventually(&format!("{nodes} nodes are connected"), SOON, async || {
            let listed = client.list_nodes(ListNodesRequest::default()).await?.into_inner().nodes;
            let connected = listed.iter().filter(|n| n.connected).count();
            ensure!(connected == nodes, "{connected} are");
            Ok(())
        })
        .await
    }

    /// The ends of all programs' logs.
    #[must_use]
    pub fn logs(&self) -> String {
        let coordinators = self.coordinators.iter().map(|c| ("coordinator", &c.running));
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
        for coordinator in &mut self.coordinators {
            let status = coordinator.running.terminate(SOON).await?;
            ensure!(status.success(), "a coordinator ended with {status}:\n{}", coordinator.running.log_tail());
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
