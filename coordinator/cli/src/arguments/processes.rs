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
  UNKNOWN      it can't be inspected, so it is left alone

GPU MEMORY is \"-\" where it is not known: without NVIDIA's driver, say.")]
    List(ListProcesses),
    /// End the foreign and stale ones; a dry run without --yes
    #[command(after_help = "\
Examples:
  drover processes cleanup
  drover processes cleanup --node a --yes --reason \"left by a benchmark\"")]
    Cleanup(Cleanup),
    /// Stop processes by hand: an instance, a process, all of a name, or all of a node
    #[command(after_help = "\
Examples:
  drover processes stop tiny-x2k9vd                 one instance; its deployment asks for one less from now on
  drover processes stop tiny-x2k9vd --replace       one instance; its deployment gets another one
  drover processes stop --name tiny                 everything that serves tiny, on all nodes
  drover processes stop --node a --all              everything on node a
  drover processes stop --node a --pid 4711 --yes   a process that somebody else started

An instance finishes its requests (up to the deployment's drain_timeout_ms), is sent SIGTERM, and is killed with all that it
has started when stop_grace_ms is over. What is stopped stays stopped, also when its node is away just now: the deployment
asks for fewer instances, as `drover get deployments` shows. `drover scale` or `drover apply` brings them back. A node whose
processes are stopped may be given new ones.

What no instance accounts for (STALE, FOREIGN) is only shown unless --yes confirms it. --name means the deployment of that
name, else all that serve the model of that name; and what was started by hand with that alias or model file.

The exit code is 1 when anything was left alone, did not end, or could not be asked; each is shown with the reason.")]
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
    /// SIGKILL to what has not ended 2 s after SIGTERM, and to all that it started
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
    #[arg(required_unless_present_any = ["name", "node", "which"], conflicts_with_all = ["name", "node", "which"])]
    pub instance: Option<String>,
    /// All that serve this deployment or model, on all nodes
    #[arg(long, value_name = "NAME", conflicts_with_all = ["node", "which", "replace"])]
    pub name: Option<String>,
    /// Node, with --pid or --all
    #[arg(long, value_name = "NAME", requires = "which")]
    pub node: Option<String>,
    /// Id of the process on that node
    #[arg(long, value_name = "PID", group = "which", requires = "node", value_parser = clap::value_parser!(i32).range(1..))]
    pub pid: Option<i32>,
    /// All processes of that node
    #[arg(long, group = "which", requires = "node")]
    pub all: bool,
    /// Let the deployment have another instance for each one stopped
    #[arg(long)]
    pub replace: bool,
    /// End stale and foreign processes too; without it they are only shown
    #[arg(long)]
    pub yes: bool,
    /// Do not drain; SIGKILL to what has not ended 2 s after SIGTERM, and to all that it started
    #[arg(long)]
    pub force: bool,
    /// Why, for the event
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}
