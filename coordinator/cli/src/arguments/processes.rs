//! The command line of `drover processes`.

use clap::{Args, Subcommand};

/// Options of `processes`.
#[derive(Debug, Args)]
pub struct Processes {
    /// What to do.
    #[command(subcommand)]
    pub command: ProcessesCommand,
}

/// What `processes` does.
#[derive(Debug, Subcommand)]
pub enum ProcessesCommand {
    /// Show every llama-server with its owner, memory and model
    #[command(after_help = "\
Example:
  drover processes list --node a --output json

Owners:
  OWNED        an instance of the node
  STALE        the node's agent started it and wants it no more; it ends it by itself
  FOREIGN      somebody else started it; its memory is taken off the node's
  OTHER AGENT  another agent of the same host keeps it
  UNKNOWN      it can't be inspected, so it is left alone")]
    List(ListProcesses),
    /// End the foreign and stale ones; a dry run without --yes
    #[command(after_help = "\
Examples:
  drover processes cleanup
  drover processes cleanup --node a --yes --reason \"left by a benchmark\"")]
    Cleanup(Cleanup),
    /// Stop an instance (its deployment gets another one), or a process of a node
    #[command(after_help = "\
Examples:
  drover processes stop tiny-x2k9vd
  drover processes stop --node a --pid 4711 --force")]
    Stop(StopProcess),
}

/// Options of `processes list`.
#[derive(Debug, Args)]
pub struct ListProcesses {
    /// Only those of this node
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
}

/// Options of `processes cleanup`.
#[derive(Debug, Args)]
pub struct Cleanup {
    /// Only those of this node
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// End them; without it they are only shown
    #[arg(long)]
    pub yes: bool,
    /// SIGKILL to what has not ended 2 s after SIGTERM
    #[arg(long)]
    pub force: bool,
    /// Why, for the event
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// Options of `processes stop`.
#[derive(Debug, Args)]
pub struct StopProcess {
    /// Id of the instance
    #[arg(required_unless_present = "pid", conflicts_with_all = ["pid", "node"])]
    pub instance: Option<String>,
    /// Node that the process runs on
    #[arg(long, value_name = "NAME", requires = "pid")]
    pub node: Option<String>,
    /// Id of the process on that node
    #[arg(long, value_name = "PID", requires = "node", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
    /// Do not drain; SIGKILL to what has not ended 2 s after SIGTERM
    #[arg(long)]
    pub force: bool,
    /// Why, for the event
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}
