//! The configuration files of the programs that `drover dev` starts, and their ready files. Pure.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Configuration of the coordinator, as far as `dev` sets it.
#[derive(Debug, Serialize)]
pub struct Coordinator {
    /// Name among the coordinators.
    pub id: String,
    /// Address of gRPC.
    pub grpc_listen: String,
    /// Address of HTTP.
    pub http_listen: String,
    /// "etcd" or "memory".
    pub store: String,
    /// URLs of etcd; empty with the store in memory.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub etcd_endpoints: Vec<String>,
    /// Folder of its own.
    pub data_dir: PathBuf,
    /// Where it says that it is ready.
    pub ready_file: PathBuf,
    /// The fleet's join secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub join_secret_file: Option<PathBuf>,
}

/// Configuration of an agent, as far as `dev` sets it.
#[derive(Debug, Serialize)]
pub struct Agent {
    /// Name of the node.
    pub node: String,
    /// Addresses of the coordinators.
    pub coordinators: Vec<String>,
    /// Folder of its own.
    pub state_dir: PathBuf,
    /// Folder of its sockets.
    pub runtime_dir: PathBuf,
    /// The llama-server to run.
    pub llama_server: PathBuf,
    /// Folders below which models may lie.
    pub model_roots: Vec<PathBuf>,
    /// Address of the proxy.
    pub proxy_listen: String,
    /// Where it says that it is ready.
    pub ready_file: PathBuf,
    /// The fleet's join secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub join_secret_file: Option<PathBuf>,
}

/// What a coordinator says when it is ready.
#[derive(Debug, Deserialize)]
pub struct CoordinatorReady {
    /// Address of gRPC.
    pub grpc: String,
    /// Address of HTTP.
    pub http: String,
}

/// What an agent says when it is ready.
#[derive(Debug, Deserialize)]
pub struct AgentReady {
    /// Address of the node's proxy.
    pub proxy: String,
}

/// Name of the first deployment for a model file: its stem, as far as names allow.
#[must_use]
pub fn deployment_name(stem: &str) -> String {
    let mut name = String::new();
    for c in stem.chars().map(|c| c.to_ascii_lowercase()) {
        let c = if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' };
        let letter_first = name.is_empty() && !c.is_ascii_lowercase();
        if !(letter_first || (c == '-' && name.ends_with('-'))) {
            name.push(c);
        }
    }
    name.truncate(drover_proto::ids::DEPLOYMENT_NAME_MAX);
    let name = name.trim_end_matches('-');
    if name.is_empty() { "model".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_model_file_gives_a_name_that_is_allowed() {
        let stems = ["Qwen3-8B-Q4_K_M", "7b", "Ünïcode", "-", "", "a--b.-", &"x-".repeat(40)];
        for stem in stems {
            drover_proto::ids::check_deployment_name(&deployment_name(stem)).unwrap();
        }
        assert_eq!(deployment_name("Qwen3-8B-Q4_K_M"), "qwen3-8b-q4-k-m");
        assert_eq!(deployment_name("7b"), "b");
        assert_eq!(deployment_name("001"), "model");
    }
}
