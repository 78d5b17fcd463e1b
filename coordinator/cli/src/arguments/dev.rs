//! The command line of `drover dev`.

use clap::{Args, ValueEnum};
use drover_proto::limits;
use std::path::PathBuf;

/// Store of `dev`'s coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Store {
    /// An etcd of its own.
    Etcd,
    /// In the coordinator's memory.
    Memory,
}

/// Options of `dev`.
#[derive(Debug, Args)]
pub struct Dev {
    /// Number of agents
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub nodes: u16,
    /// Model to serve; without one a tiny model is generated (it talks noise)
    #[arg(long, value_name = "GGUF")]
    pub model: Option<PathBuf>,
    /// Instances of the first deployment
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(i32).range(1..=i64::from(limits::REPLICAS_MAX)))]
    pub replicas: i32,
    /// Send one streamed chat completion, show nodes and instances, end
    #[arg(long)]
    pub once: bool,
    /// Folder for everything that is written; kept. Without one, a temporary folder that is removed at the end
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Keep the temporary folder, to look into the logs
    #[arg(long)]
    pub keep: bool,
    /// Port of the coordinator's gRPC; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub grpc_port: u16,
    /// Port of the coordinator's HTTP; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    pub http_port: u16,
    /// Where the coordinator keeps its state [default: etcd where it is installed, else memory]
    #[arg(long, value_enum)]
    pub store: Option<Store>,
    /// Longest wait until the first deployment is ready, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
}
