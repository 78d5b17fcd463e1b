//! The two forms in which a configuration is given: the file, and flags or environment variables.

use crate::instance::state::Policy;
use clap::Args;
use serde::Deserialize;
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

/// The configuration file.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct File {
    pub(super) node: Option<String>,
    pub(super) coordinators: Option<Vec<String>>,
    pub(super) state_dir: Option<PathBuf>,
    pub(super) runtime_dir: Option<PathBuf>,
    pub(super) llama_server: Option<PathBuf>,
    pub(super) llama_server_environment: BTreeMap<String, String>,
    pub(super) model_roots: Option<Vec<PathBuf>>,
    pub(super) proxy_listen: Option<SocketAddr>,
    pub(super) proxy_advertise: Option<String>,
    pub(super) memory_bytes: Option<i64>,
    pub(super) labels: Option<BTreeMap<String, String>>,
    pub(super) gpus: Vec<GpuEntry>,
    pub(super) shim: Option<PathBuf>,
    pub(super) ready_file: Option<PathBuf>,
    pub(super) join_secret_file: Option<PathBuf>,
    pub(super) allow_plaintext: Option<bool>,
    pub(super) log_filter: Option<String>,
    pub(super) log_json: Option<bool>,
    pub(super) spool_bytes_max: Option<u64>,
    pub(super) return_within_ms: Option<i64>,
    pub(super) restarts: Restarts,
    pub(super) launches_at_once: Option<u32>,
    pub(super) cgroup_root: Option<String>,
}

/// A GPU, declared.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct GpuEntry {
    pub(super) uuid: String,
    #[serde(default)]
    pub(super) name: String,
    pub(super) memory_bytes: i64,
}

/// When a server that ended is started again, and when it is unrouted. `[restarts]` in the file.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Restarts {
    pub(super) backoff_first_ms: u64,
    pub(super) backoff_max_ms: u64,
    pub(super) quick_ends_max: u32,
    pub(super) stable_ms: u64,
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
    /// How long the session is kept for an agent that was told to end, in milliseconds, so that an upgraded one finds
    /// it unchanged; at most ten minutes. Default: 0, it runs out as if the agent had been lost.
    #[arg(long, env = "DROVER_RETURN_WITHIN_MS")]
    pub return_within_ms: Option<i64>,
    /// How many servers are launched at a time; the others wait for their turn. Default: twice the processor's cores.
    #[arg(long, env = "DROVER_LAUNCHES_AT_ONCE")]
    pub launches_at_once: Option<u32>,
    /// Log lines as JSON.
    #[arg(long, env = "DROVER_LOG_JSON")]
    pub log_json: bool,
}
