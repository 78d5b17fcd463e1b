//! The agent's configuration: a TOML file, then environment variables, then flags; checked as a whole before anything
//! starts.

use crate::{host, instance::state::Policy, proxy::ProxySettings};
use anyhow::{Context as _, bail, ensure};
use clap::Args;
use drover_proto::{
    config, ids, limits,
    transport::{Secret, Security, Target},
    v1::Gpu,
};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    time::Duration,
};

/// Longest path of a unix socket, in bytes, its end included.
const SOCKET_PATH_MAX: usize = 108;

/// The configuration file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct File {
    node: Option<String>,
    coordinators: Option<Vec<String>>,
    state_dir: Option<PathBuf>,
    runtime_dir: Option<PathBuf>,
    llama_server: Option<PathBuf>,
    llama_server_environment: BTreeMap<String, String>,
    model_roots: Option<Vec<PathBuf>>,
    proxy_listen: Option<SocketAddr>,
    proxy_advertise: Option<String>,
    memory_bytes: Option<i64>,
    labels: Option<BTreeMap<String, String>>,
    gpus: Vec<GpuEntry>,
    shim: Option<PathBuf>,
    ready_file: Option<PathBuf>,
    join_secret_file: Option<PathBuf>,
    allow_plaintext: Option<bool>,
    log_filter: Option<String>,
    log_json: Option<bool>,
    spool_bytes_max: Option<u64>,
    restarts: Restarts,
}

/// A GPU, declared.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct GpuEntry {
    uuid: String,
    #[serde(default)]
    name: String,
    memory_bytes: i64,
}

/// When a server that ended is started again, and when it is unrouted. `[restarts]` in the file.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Restarts {
    backoff_first_ms: u64,
    backoff_max_ms: u64,
    quick_ends_max: u32,
    stable_ms: u64,
}

impl Default for Restarts {
    fn default() -> Self {
        let policy = Policy::default();
        Self {
            backoff_first_ms: policy.backoff_first_ms,
            backoff_max_ms: policy.backoff_max_ms,
            quick_ends_max: policy.quick_ends_max,
            stable_ms: policy.stable_ms,
        }
    }
}

impl Restarts {
    /// As the state machine has it.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy {
            backoff_first_ms: self.backoff_first_ms,
            backoff_max_ms: self.backoff_max_ms,
            quick_ends_max: self.quick_ends_max,
            stable_ms: self.stable_ms,
            ..Policy::default()
        }
    }
}

/// Flags; each may be given as an environment variable `DROVER_…` too.
#[derive(Debug, Clone, Default, Args)]
pub struct Flags {
    /// Configuration file (TOML).
    #[arg(long, env = "DROVER_CONFIG")]
    pub config: Option<PathBuf>,
    /// Name of this node, unique in the fleet.
    #[arg(long, env = "DROVER_NODE")]
    pub node: Option<String>,
    /// Coordinators, host:port with commas between them.
    #[arg(long, env = "DROVER_COORDINATORS", value_delimiter = ',')]
    pub coordinators: Option<Vec<String>>,
    /// Folder for everything that must survive a restart.
    #[arg(long, env = "DROVER_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Folder for sockets; its path must be short. Default: run below the state folder.
    #[arg(long, env = "DROVER_RUNTIME_DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// The llama-server to run.
    #[arg(long, env = "DROVER_LLAMA_SERVER")]
    pub llama_server: Option<PathBuf>,
    /// Folders below which model files may lie, with commas between them.
    #[arg(long, env = "DROVER_MODEL_ROOTS", value_delimiter = ',')]
    pub model_roots: Option<Vec<PathBuf>>,
    /// Address that this node's proxy listens on.
    #[arg(long, env = "DROVER_PROXY_LISTEN")]
    pub proxy_listen: Option<SocketAddr>,
    /// Address of the proxy as coordinators reach it. Default: the one that it listens on.
    #[arg(long, env = "DROVER_PROXY_ADVERTISE")]
    pub proxy_advertise: Option<String>,
    /// Memory that instances may reserve, in bytes. Default: the host's.
    #[arg(long, env = "DROVER_MEMORY_BYTES")]
    pub memory_bytes: Option<i64>,
    /// Labels of this node: name=value with commas between them.
    #[arg(long, env = "DROVER_LABELS", value_delimiter = ',')]
    pub labels: Option<Vec<String>>,
    /// The shim. Default: drover-shim beside this program.
    #[arg(long, env = "DROVER_SHIM")]
    pub shim: Option<PathBuf>,
    /// File that is written, with the real addresses, once the node has a session.
    #[arg(long, env = "DROVER_READY_FILE")]
    pub ready_file: Option<PathBuf>,
    /// File with the fleet's join secret.
    #[arg(long, env = "DROVER_JOIN_SECRET_FILE")]
    pub join_secret_file: Option<PathBuf>,
    /// Send and accept the join secret unencrypted beyond loopback.
    #[arg(long, env = "DROVER_ALLOW_PLAINTEXT")]
    pub allow_plaintext: bool,
    /// What is logged: "info,drover_agent=debug".
    #[arg(long, env = "DROVER_LOG_FILTER")]
    pub log_filter: Option<String>,
    /// Log lines as JSON.
    #[arg(long, env = "DROVER_LOG_JSON")]
    pub log_json: bool,
}

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
    /// Restarts.
    pub restarts: Restarts,
}

/// Folders, without which nothing can be looked up; all that `down` needs.
#[derive(Debug, Clone)]
pub struct Places {
    /// Folder for everything that must survive a restart; absolute.
    pub state_dir: PathBuf,
    /// Folder for sockets; absolute.
    pub runtime_dir: PathBuf,
}

impl Flags {
    fn file(&self) -> anyhow::Result<File> {
        Ok(config::load(self.config.as_deref())?)
    }

    /// The folders. They are made if they are not there.
    pub fn places(&self) -> anyhow::Result<Places> {
        places(self, &self.file()?)
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
        let environment = file.llama_server_environment;
        if let Some(name) = environment.keys().find(|n| n.starts_with("LLAMA_") || *n == "CUDA_VISIBLE_DEVICES") {
            bail!("llama_server_environment: {name} is not allowed: arguments come from deployments, GPUs from claims");
        }
        let spool_bytes_max = file.spool_bytes_max.unwrap_or(64 << 20);
        ensure!(spool_bytes_max >= 64 << 10, "spool_bytes_max = {spool_bytes_max}: must be at least {}", 64 << 10);
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
            restarts: file.restarts,
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
    made.and_then(|()| fs::canonicalize(path)).with_context(|| format!("{setting} = {}", path.display()))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(root: &Path) -> Flags {
        Flags {
            node: Some("host-1".to_owned()),
            state_dir: Some(root.join("state")),
            llama_server: Some("/bin/sleep".into()),
            shim: Some("/bin/true".into()),
            model_roots: Some(vec![root.to_owned()]),
            ..Flags::default()
        }
    }

    fn with_file(root: &Path, text: &str) -> anyhow::Result<Settings> {
        let path = root.join("agent.toml");
        std::io::Write::write_all(&mut fs::File::create(&path).unwrap(), text.as_bytes()).unwrap();
        Flags { config: Some(path), ..flags(root) }.settings()
    }

    #[test]
    fn flags_win_over_the_file_and_the_rest_has_defaults() {
        let place = tempfile::tempdir().unwrap();
        let text = "node = 'from-file'\nlabels = { zone = 'a' }\nmemory_bytes = 5\n[[gpus]]\nuuid = 'GPU-1'\nmemory_bytes = 9\n";
        let settings = with_file(place.path(), text).unwrap();
        assert_eq!((settings.node.as_str(), settings.memory_bytes, settings.gpus.len()), ("host-1", 5, 1));
        assert_eq!(settings.labels["zone"], "a");
        assert_eq!(settings.coordinators, ["127.0.0.1:7400"]);
        assert!(settings.runtime_dir.ends_with("state/run") && settings.runtime_dir.is_dir());
        assert_eq!(fs::metadata(&settings.state_dir).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn what_is_wrong_is_named_with_the_way_out() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path();
        for (text, part) in [
            ("nodes = 1\n", "line 1"),
            ("\nrestarts = { quick = 1 }\n", "line 2"),
            ("memory_bytes = -1\n", "memory_bytes = -1"),
            ("proxy_listen = '0.0.0.0:7410'\n", "proxy_listen"),
            ("coordinators = ['nowhere']\n", "host:port"),
            ("join_secret_file = '/none'\n", "join_secret_file"),
            ("llama_server_environment = { LLAMA_ARG_HOST = '0.0.0.0' }\n", "LLAMA_ARG_HOST"),
        ] {
            let error = format!("{:#}", with_file(root, text).unwrap_err());
            assert!(error.contains(part), "{error}");
        }
        let wrong = |change: fn(&mut Flags)| {
            let mut flags = flags(root);
            change(&mut flags);
            format!("{:#}", flags.settings().unwrap_err())
        };
        assert!(wrong(|f| f.node = Some("Bad_Name".to_owned())).contains("Bad_Name"));
        assert!(wrong(|f| f.node = None).contains("node is not set"));
        assert!(wrong(|f| f.model_roots = Some(vec!["/none".into()])).contains("/none"));
        assert!(wrong(|f| f.model_roots = Some(vec!["/".into()])).contains("whole file system"));
        assert!(wrong(|f| f.llama_server = Some("/etc/passwd".into())).contains("no program"));
        assert!(wrong(|f| f.labels = Some(vec!["zone".to_owned()])).contains("name=value"));
        assert!(
            wrong(|f| f.runtime_dir = Some(PathBuf::from(format!("/tmp/{}", "x".repeat(90))))).contains("too long")
        );
        let _ = fs::remove_dir(format!("/tmp/{}", "x".repeat(90)));
        let script = root.join("wrapper");
        std::io::Write::write_all(&mut fs::File::create(&script).unwrap(), b"#!/bin/sh\n").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let error = Flags { llama_server: Some(script), ..flags(root) }.settings().unwrap_err().to_string();
        assert!(error.contains("is a script"), "{error}");
    }

    #[test]
    fn a_socket_has_its_instance_s_name_where_that_fits() {
        let short = socket_of(Path::new("/run/drover"), "tiny-234567");
        assert_eq!(short, Path::new("/run/drover/tiny-234567.sock"));
        let deep = PathBuf::from(format!("/{}", "d".repeat(80)));
        let (one, other) = (socket_of(&deep, &"a".repeat(55)), socket_of(&deep, &"b".repeat(55)));
        assert!(one.as_os_str().len() < SOCKET_PATH_MAX && one != other);
    }
}
