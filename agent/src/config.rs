//! The agent's configuration: a TOML file, then environment variables, then flags; checked as a whole before anything
//! starts.

mod given;
#[cfg(test)]
mod tests;

use crate::{host, proxy::ProxySettings};
use anyhow::{Context as _, bail, ensure};
use drover_proto::{
    config, ids, limits,
    transport::{Secret, Security, Target},
    v1::Gpu,
};
use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

pub use given::{File, Flags, Restarts};

/// Longest path of a unix socket, in bytes, its end included.
const SOCKET_PATH_MAX: usize = 108;

/// The configuration in force.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of this node.
    pub node: String,
    /// Coordinators.
    pub coordinators: Vec<String>,
    /// Folder for everything that must survive a restart; absolute.
    pub state_dir: PathBuf,
    /// Folder for sockets; absolute.
    pub runtime_dir: PathBuf,
    /// The llama-server to run; absolute.
    pub llama_server: PathBuf,
    /// Added to its environment.
    pub llama_server_environment: BTreeMap<String, String>,
    /// Folders below which models may lie; real paths.
    pub model_roots: Vec<PathBuf>,
    /// Address that the proxy listens on.
    pub proxy_listen: SocketAddr,
    /// Address of the proxy as coordinators reach it, if not the one that it listens on.
    pub proxy_advertise: Option<String>,
    /// Memory that instances may reserve, in bytes.
    pub memory_bytes: i64,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// GPUs.
    pub gpus: Vec<Gpu>,
    /// The shim; absolute.
    pub shim: PathBuf,
    /// File that tells that this node is ready.
    pub ready_file: Option<PathBuf>,
    /// File with the join secret.
    pub join_secret_file: Option<PathBuf>,
    /// The join secret and how it may travel.
    pub security: Security,
    /// What is logged.
    pub log_filter: String,
    /// Log lines as JSON.
    pub log_json: bool,
    /// Most bytes of spans that wait.
    pub spool_bytes_max: u64,
    /// How long the session is kept when the agent is told to end.
    pub return_within: Duration,
    /// Restarts.
    pub restarts: Restarts,
    /// How many servers are launched at a time.
    pub launches_at_once: u32,
    /// Below which cgroup the instances get their own.
    pub cgroup_root: host::cgroup::Root,
}

/// Folders, without which nothing can be looked up; all that `down` needs.
#[derive(Debug, Clone)]
pub struct Places {
    /// Folder for everything that must survive a restart; absolute.
    pub state_dir: PathBuf,
    /// Folder for sockets; absolute.
    pub runtime_dir: PathBuf,
}

/// Where things lie, for a look that changes nothing.
#[derive(Debug, Clone)]
pub struct View {
    /// Folder for everything that must survive a restart; it exists.
    pub state_dir: PathBuf,
    /// Folder for sockets, which may not exist.
    pub runtime_dir: PathBuf,
    /// The llama-server that would be run, if one is configured and there.
    pub llama_server: Option<PathBuf>,
    /// File with the join secret.
    pub join_secret_file: Option<PathBuf>,
}

impl Flags {
    fn file(&self) -> anyhow::Result<File> {
        Ok(config::load(self.config.as_deref())?)
    }

    /// The folders. They are made if they are not there.
    pub fn places(&self) -> anyhow::Result<Places> {
        places(self, &self.file()?)
    }

    /// The places to look at. Makes nothing, and leaves what only a running agent needs unchecked.
    pub fn view(&self) -> anyhow::Result<View> {
        let file = self.file()?;
        let given = self.state_dir.clone().or(file.state_dir);
        let given = given.context("state_dir is not set: name the agent's state folder, or its --config")?;
        let state_dir = fs::canonicalize(&given).with_context(|| format!("state_dir = {}", given.display()))?;
        ensure!(state_dir.is_dir(), "state_dir = {}: is no folder", given.display());
        let runtime_dir = self.runtime_dir.clone().or(file.runtime_dir).unwrap_or_else(|| state_dir.join("run"));
        Ok(View {
            runtime_dir: fs::canonicalize(&runtime_dir).unwrap_or(runtime_dir),
            llama_server: self
                .llama_server
                .clone()
                .or(file.llama_server)
                .or_else(|| on_path("llama-server"))
                .and_then(|path| fs::canonicalize(path).ok()),
            join_secret_file: self.join_secret_file.clone().or(file.join_secret_file),
            state_dir,
        })
    }

    /// The whole configuration, checked.
    pub fn settings(self) -> anyhow::Result<Settings> {
        let file = self.file()?;
        let Places { state_dir, runtime_dir } = places(&self, &file)?;
        let node =
            self.node.or(file.node).context("node is not set: give this node a name that is unique in the fleet")?;
        ids::check_node_name(&node).map_err(|e| anyhow::anyhow!("node: {e}"))?;
        let coordinators = self
            .coordinators
            .or(file.coordinators)
            .unwrap_or_else(|| vec![format!("127.0.0.1:{}", limits::ports::GRPC)]);
        let join_secret_file = self.join_secret_file.or(file.join_secret_file);
        let secret = join_secret_file.as_deref().map(Secret::read).transpose().context("join_secret_file")?;
        let allow_plaintext = self.allow_plaintext || file.allow_plaintext.unwrap_or(false);
        let security = Security { secret, allow_plaintext };
        Target::new(&coordinators, &security, Some(&node)).context("coordinators")?;
        let default_proxy = SocketAddr::from(([127, 0, 0, 1], limits::ports::PROXY));
        let proxy_listen = self.proxy_listen.or(file.proxy_listen).unwrap_or(default_proxy);
        security.check_listener("proxy_listen", proxy_listen)?;
        let labels = match self.labels {
            Some(words) => parse_labels(&words)?,
            None => file.labels.unwrap_or_default(),
        };
        ensure!(labels.len() <= limits::LABELS_MAX, "labels: {} are more than {}", labels.len(), limits::LABELS_MAX);
        let memory_bytes = match self.memory_bytes.or(file.memory_bytes) {
            Some(bytes) => bytes,
            None => i64::try_from(host::memory::read()?.total_bytes).unwrap_or(i64::MAX),
        };
        ensure!(memory_bytes > 0, "memory_bytes = {memory_bytes}: must be greater than 0");
        let most = limits::ABSENCE_MAX;
        let return_within_ms = self.return_within_ms.or(file.return_within_ms).unwrap_or(0);
        let return_within = u64::try_from(return_within_ms).ok().map(Duration::from_millis).filter(|d| *d <= most);
        let return_within = return_within.with_context(|| {
            format!("return_within_ms = {return_within_ms}: must be from 0 to {}", most.as_millis())
        })?;
        let environment = file.llama_server_environment;
        if let Some(name) = environment.keys().find(|n| n.starts_with("LLAMA_") || *n == "CUDA_VISIBLE_DEVICES") {
            bail!("llama_server_environment: {name} is not allowed: arguments come from deployments, GPUs from claims");
        }
        let spool_bytes_max = file.spool_bytes_max.unwrap_or(64 << 20);
        ensure!(spool_bytes_max >= 64 << 10, "spool_bytes_max = {spool_bytes_max}: must be at least {}", 64 << 10);
        let launches_at_once = match self.launches_at_once.or(file.launches_at_once) {
            Some(launches) => launches,
            // One reads while another computes.
            None => host::machine::cpus().unsigned_abs().saturating_mul(2).max(1),
        };
        ensure!(launches_at_once > 0, "launches_at_once = 0: must be at least 1");
        Ok(Settings {
            llama_server: llama_server(self.llama_server.or(file.llama_server))?,
            llama_server_environment: environment,
            model_roots: model_roots(&self.model_roots.or(file.model_roots).unwrap_or_default())?,
            proxy_listen,
            proxy_advertise: self.proxy_advertise.or(file.proxy_advertise),
            memory_bytes,
            labels,
            gpus: file
                .gpus
                .into_iter()
                .map(|gpu| Gpu { uuid: gpu.uuid, name: gpu.name, memory_bytes: gpu.memory_bytes })
                .collect(),
            shim: shim(self.shim.or(file.shim))?,
            ready_file: self.ready_file.or(file.ready_file),
            join_secret_file,
            security,
            log_filter: self.log_filter.or(file.log_filter).unwrap_or_else(|| "info".to_owned()),
            log_json: self.log_json || file.log_json.unwrap_or(false),
            spool_bytes_max,
            return_within,
            restarts: file.restarts,
            launches_at_once,
            cgroup_root: host::cgroup::Root::parse(file.cgroup_root.as_deref())?,
            node,
            coordinators,
            state_dir,
            runtime_dir,
        })
    }
}

impl Settings {
    /// Folder of the instances' directories.
    #[must_use]
    pub fn instances_dir(&self) -> PathBuf {
        self.state_dir.join("instances")
    }

    /// Folder for files that were found damaged.
    #[must_use]
    pub fn damaged_dir(&self) -> PathBuf {
        self.state_dir.join("damaged")
    }

    /// While this file exists nothing is started.
    #[must_use]
    pub fn halt_file(&self) -> PathBuf {
        self.state_dir.join("halt")
    }

    /// Unix socket of an instance.
    #[must_use]
    pub fn socket_of(&self, instance: &str) -> PathBuf {
        socket_of(&self.runtime_dir, instance)
    }

    /// Settings of this node's proxy.
    #[must_use]
    pub fn proxy(&self) -> ProxySettings {
        ProxySettings {
            join_secret_file: self.join_secret_file.clone(),
            allow_plaintext: self.security.allow_plaintext,
            log_filter: self.log_filter.clone(),
            ..ProxySettings::new(self.proxy_listen, &self.runtime_dir, &self.state_dir)
        }
    }

    /// How long the agent may take to end.
    #[must_use]
    pub fn end_deadline(&self) -> Duration {
        Duration::from_secs(5)
    }
}

/// Unix socket of an instance: by its name where that fits, else by a hash of it.
#[must_use]
pub fn socket_of(runtime_dir: &Path, instance: &str) -> PathBuf {
    use sha2::Digest as _;
    let named = runtime_dir.join(format!("{instance}.sock"));
    if named.as_os_str().len() < SOCKET_PATH_MAX {
        return named;
    }
    let hash = sha2::Sha256::digest(instance.as_bytes());
    let short: String = hash[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    runtime_dir.join(format!("{short}.sock"))
}

fn places(flags: &Flags, file: &File) -> anyhow::Result<Places> {
    let given = flags.state_dir.clone().or_else(|| file.state_dir.clone());
    let state_dir = folder("state_dir", &given.context("state_dir is not set: name a folder on a local disk")?)?;
    folder("state_dir", &state_dir.join("instances"))?;
    let given = flags.runtime_dir.clone().or_else(|| file.runtime_dir.clone());
    let runtime_dir = folder("runtime_dir", &given.unwrap_or_else(|| state_dir.join("run")))?;
    // "/" + 16 digits + ".sock" + the end
    ensure!(
        runtime_dir.as_os_str().len() + 23 <= SOCKET_PATH_MAX,
        "runtime_dir = {}: too long for the sockets in it; name a folder whose path has at most {} bytes",
        runtime_dir.display(),
        SOCKET_PATH_MAX - 23
    );
    Ok(Places { state_dir, runtime_dir })
}

/// Makes a folder that only we can enter, and returns its real path.
fn folder(setting: &str, path: &Path) -> anyhow::Result<PathBuf> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.and_then(|()| fs::canonicalize(path))
        .with_context(|| format!("{setting} = {}: the agent needs a folder that it can write to", path.display()))
}

fn model_roots(given: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    ensure!(!given.is_empty(), "model_roots is not set: name the folders below which model files lie");
    let mut roots = Vec::new();
    for root in given {
        let real = fs::canonicalize(root).with_context(|| format!("model_roots: {}", root.display()))?;
        ensure!(real.is_dir(), "model_roots: {} is no folder", root.display());
        ensure!(real != Path::new("/"), "model_roots: the whole file system is too much: name the models' folder");
        roots.push(real);
    }
    Ok(roots)
}

fn llama_server(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    let given = given.or_else(|| on_path("llama-server")).context(
        "llama_server is not set and no llama-server is on the PATH: name the program (llama.cpp's HTTP server)",
    )?;
    let path = fs::canonicalize(&given).with_context(|| format!("llama_server = {}", given.display()))?;
    check_program("llama_server", &path)?;
    let mut start = [0; 2];
    let read = fs::File::open(&path).and_then(|mut file| file.read_exact(&mut start));
    read.with_context(|| format!("llama_server = {}", path.display()))?;
    ensure!(
        start != *b"#!",
        "llama_server = {}: is a script: name the program itself, since a process is known by its executable; \
         variables for it go into llama_server_environment",
        path.display()
    );
    Ok(path)
}

fn shim(given: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    let path = match given {
        Some(path) => path,
        None => std::env::current_exe().context("path of this program")?.with_file_name("drover-shim"),
    };
    let path = fs::canonicalize(&path).with_context(|| format!("shim = {}", path.display()))?;
    check_program("shim", &path)?;
    Ok(path)
}

fn check_program(setting: &str, path: &Path) -> anyhow::Result<()> {
    let meta = fs::metadata(path).with_context(|| format!("{setting} = {}", path.display()))?;
    ensure!(meta.is_file() && meta.permissions().mode() & 0o111 != 0, "{setting} = {}: is no program", path.display());
    Ok(())
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

fn parse_labels(words: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    for word in words.iter().filter(|word| !word.is_empty()) {
        let (name, value) = word.split_once('=').with_context(|| format!("labels: \"{word}\": expected name=value"))?;
        ensure!(!name.is_empty(), "labels: \"{word}\": the name is empty");
        labels.insert(name.to_owned(), value.to_owned());
    }
    Ok(labels)
}
