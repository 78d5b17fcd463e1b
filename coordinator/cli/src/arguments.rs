//! The command line of `drover`: commands, options, their help and their defaults.

mod check;
mod dev;
mod nodes;
mod processes;

use crate::output::Format;
use clap::{Args, Parser, Subcommand, ValueEnum};
use drover_proto::limits;
use std::path::PathBuf;

pub use check::{Check, CheckCommand};
pub use dev::{Dev, Store};
pub use nodes::{EndAbsence, Freeze, FreezeCommand, OverrideFreeze, Release, RemoveNode};
pub use processes::{Cleanup, ListProcesses, Processes, ProcessesCommand, StopProcess};

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    Drover answered with a failure, or a step of the command failed
  2    the command line or an input file is wrong; nothing was sent
  3    no coordinator (or, for chat, no gateway) could be reached
  4    --wait: what was waited for did not come in time
  130  ended by Ctrl-C";

const EXAMPLES: &str = "\
Examples:
  drover dev                                   a whole fleet on this machine, to try things
  drover apply -f tiny.toml --wait             run a model and wait until it answers
  drover get instances                         what runs where
  drover chat tiny \"Hello\"                     one prompt through the gateway";

/// Runs llama.cpp models across hosts.
///
/// Talks to Drover's coordinators: says which models must serve, and shows where and how they do.
#[derive(Debug, Parser)]
#[command(name = "drover", version, after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"), disable_help_subcommand = true)]
#[command(arg_required_else_help = true, max_term_width = 110)]
pub struct Arguments {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connection and output")]
pub struct Global {
    /// Coordinators to ask, tried in turn
    #[arg(long, global = true, env = "DROVER_COORDINATORS", value_delimiter = ',', value_name = "HOST:PORT,...")]
    #[arg(default_value = "127.0.0.1:7400")]
    pub coordinators: Vec<String>,
    /// Gateway that chat sends its prompt to
    #[arg(long, global = true, env = "DROVER_GATEWAY", value_name = "HOST:PORT", default_value = "127.0.0.1:7401")]
    pub gateway: String,
    /// File that holds the fleet's join secret
    #[arg(long, global = true, env = "DROVER_JOIN_SECRET_FILE", value_name = "FILE")]
    pub join_secret_file: Option<PathBuf>,
    /// Send the join secret unencrypted beyond this machine (only in a trusted network)
    #[arg(long, global = true, env = "DROVER_ALLOW_PLAINTEXT", value_parser = clap::builder::BoolishValueParser::new())]
    #[arg(action = clap::ArgAction::SetTrue)]
    pub allow_plaintext: bool,
    /// Form of the output: tables for people, or JSON (JSON lines for streams)
    #[arg(short, long, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: Format,
    /// Say more, such as the id of the trace that a change begins
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a deployment, or change the one of that name
    #[command(after_help = "\
Example:
  drover apply -f tiny.toml --wait

where tiny.toml says:
  name = \"tiny\"
  model_path = \"tiny.gguf\"    # below a model root of the nodes
  replicas = 2")]
    Apply(Apply),
    /// Show deployments, instances or nodes
    #[command(after_help = "\
Examples:
  drover get deployments
  drover get instances --deployment tiny
  drover get node a --output json")]
    Get(Get),
    /// Set the number of instances of a deployment
    #[command(after_help = "Example:\n  drover scale tiny 5 --wait")]
    Scale(Scale),
    /// Drain and stop all instances of a deployment, then remove it
    #[command(after_help = "Example:\n  drover delete tiny --wait")]
    Delete(Delete),
    /// Show the log of an instance's llama-server
    #[command(after_help = "\
Example:
  drover logs tiny-x2k9vd --tail 20 --follow

`drover get instances` shows the ids.")]
    Logs(Logs),
    /// Show what happened
    #[command(after_help = "\
Examples:
  drover events
  drover events --follow --object deployment/tiny
  drover events --object instance/tiny-x2k9vd
  drover events --object node/gpu-1         what was started and stopped there, of instances that are gone too
  drover events --object node/              all about nodes")]
    Events(Events),
    /// Show, clean up or stop the llama-server processes of the hosts, whoever started them
    #[command(after_help = "\
Examples:
  drover processes list
  drover processes cleanup --node a          what would be ended: a dry run
  drover processes cleanup --node a --yes
  drover processes stop tiny-x2k9vd
  drover processes stop --name tiny
  drover processes stop --node a --all")]
    Processes(Processes),
    /// Look for what must not be
    #[command(after_help = "Example:\n  drover check duplicates")]
    Check(Check),
    /// Show whether nothing is replaced because too many nodes are lost at once, or say that it is to go on
    #[command(after_help = "\
Examples:
  drover freeze
  drover freeze override --for 600 --reason \"rack 3 is really gone\"
  drover freeze end-override

Above a share of lost nodes (55 % of those seen in the last hour) what is wrong is more likely the network between them and
the coordinators, and their servers run on: nothing that was owned is claimed elsewhere then. It goes on when nodes come back,
when they have been lost for an hour, when they are removed (`drover remove-node`), or for as long as an override stands.")]
    Freeze(Freeze),
    /// Take an instance from the node that holds it, by force, so that another node may have it
    #[command(after_help = "\
Examples:
  drover release tiny-x2k9vd --reason \"it hangs\"
  drover release tiny-x2k9vd --token 1.4711     only if this claim still stands

For one that gets nowhere there: what makes no progress, or fails again and again, is given up by itself in the end. Nothing is
stopped: what runs there goes on, and ends when another node's server is ready in its place. That node is not offered it again
for a while. `drover get instance ID --output json` shows the token, `drover events --object instance/ID` who did what.")]
    Release(Release),
    /// Wait no longer for an agent that has left and meant to be back: what its node owns is claimed elsewhere
    #[command(after_help = "\
Example:
  drover end-absence gpu-7 --reason \"the upgrade went wrong\"

For an agent that ended in order with `return_within_ms` in its configuration: its session is kept so long (`drover get nodes`
says \"away\"). Afterwards its session runs out as that of a lost host does. Nothing is stopped, and an agent that is back before
goes on as if nothing had happened.")]
    EndAbsence(EndAbsence),
    /// Forget a node that is gone for good: it counts as lost no more, and its name is free
    #[command(after_help = "Example:\n  drover remove-node gpu-7 --reason \"sent back\"")]
    RemoveNode(RemoveNode),
    /// Send one prompt to a model through the gateway and print the answer as it comes
    #[command(after_help = "\
Examples:
  drover chat tiny \"Write a haiku\" --max-tokens 40
  echo \"Write a haiku\" | drover chat tiny -")]
    Chat(Chat),
    /// Run a whole fleet on this machine: etcd, a coordinator, agents and a model, until Ctrl-C
    #[command(after_help = "\
Examples:
  drover dev
  drover dev --nodes 3 --replicas 6 --grpc-port 7400 --http-port 7401
  drover dev --model ~/models/qwen3-8b-q4_k_m.gguf --replicas 1
  drover dev --once                         try the whole path and end

Ctrl-C (or SIGTERM) ends everything, with exit code 0 once the fleet was ready; a second one hurries.

Environment:
  DROVER_LLAMA_SERVER  the llama-server to run, when it is not in PATH
  DROVER_ETCD          the etcd to run, when it is not in PATH")]
    Dev(Dev),
    /// Show the version of this program and of the protocol that it speaks
    #[command(after_help = "Example:\n  drover version --output json")]
    Version,
    /// Write completions for a shell to standard output
    #[command(after_help = "Example:\n  drover completions bash > ~/.local/share/bash-completion/completions/drover")]
    Completions(Completions),
}

/// How long to wait for a change to take effect.
#[derive(Debug, Args)]
pub struct Wait {
    /// Wait until the change has taken effect, showing progress; or say why it does not
    #[arg(long)]
    pub wait: bool,
    /// Longest wait, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
}

impl Wait {
    /// Longest wait.
    #[must_use]
    pub fn limit(&self) -> std::time::Duration {
        std::time::Duration::from_secs(self.timeout)
    }
}

/// Options of `apply`.
#[derive(Debug, Args)]
pub struct Apply {
    /// File with the deployment as TOML; "-" reads standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// Refuse unless the stored deployment has this generation (0: unless there is none)
    #[arg(long, value_name = "N")]
    pub generation: Option<u64>,
    /// Waiting.
    #[command(flatten)]
    pub wait: Wait,
}

/// What `get` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// What must run.
    #[value(alias = "deployment")]
    Deployments,
    /// The llama-servers of the deployments.
    #[value(alias = "instance")]
    Instances,
    /// The hosts.
    #[value(alias = "node")]
    Nodes,
}

/// Options of `get`.
#[derive(Debug, Args)]
pub struct Get {
    /// What to show
    #[arg(value_enum)]
    pub kind: Kind,
    /// Only the one of this name (or id)
    pub name: Option<String>,
    /// Only instances of this deployment
    #[arg(long, value_name = "NAME")]
    pub deployment: Option<String>,
    /// Only instances on this node
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
}

/// Options of `scale`.
#[derive(Debug, Args)]
pub struct Scale {
    /// Name of the deployment
    pub name: String,
    /// Instances wanted; 0 stops them all and keeps the deployment
    #[arg(allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(0..=i64::from(limits::REPLICAS_MAX)))]
    pub replicas: i32,
    /// Refuse unless the stored deployment has this generation
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub generation: Option<u64>,
    /// Waiting.
    #[command(flatten)]
    pub wait: Wait,
}

/// Options of `delete`.
#[derive(Debug, Args)]
pub struct Delete {
    /// Name of the deployment
    pub name: String,
    /// Refuse unless the stored deployment has this generation
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub generation: Option<u64>,
    /// Waiting.
    #[command(flatten)]
    pub wait: Wait,
}

/// Options of `logs`.
#[derive(Debug, Args)]
pub struct Logs {
    /// Id of the instance
    pub instance: String,
    /// Go on with new lines as they are written
    #[arg(short, long)]
    pub follow: bool,
    /// Number of last lines to begin with
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(i32).range(1..=10_000))]
    pub tail: i32,
}

/// Options of `events`.
#[derive(Debug, Args)]
pub struct Events {
    /// Go on with new events as they happen
    #[arg(short, long)]
    pub follow: bool,
    /// Only events about this object ("deployment/tiny") or kind ("node/")
    #[arg(long, value_name = "OBJECT")]
    pub object: Option<String>,
}

/// Options of `chat`.
#[derive(Debug, Args)]
pub struct Chat {
    /// Model that is to answer
    pub model: String,
    /// The prompt; "-" reads standard input
    pub prompt: String,
    /// Most tokens of the answer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// 0 always takes the likeliest token; higher is more varied
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Makes an answer repeatable
    #[arg(long, value_name = "N")]
    pub seed: Option<u32>,
    /// Longest wait for the next piece of the answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
}

/// Options of `completions`.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn every_command_has_help_with_an_example() {
        let command = Arguments::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands() {
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains(&format!("drover {}", sub.get_name())), "{} has no example", sub.get_name());
        }
    }

    #[test]
    fn the_exit_codes_are_documented() {
        let help = Arguments::command().render_help().to_string();
        for code in ["0  ", "1  ", "2  ", "3  ", "4  ", "130"] {
            assert!(help.contains(&format!("\n  {code}")), "{help}");
        }
    }

    #[test]
    fn global_options_stand_anywhere() {
        for line in
            ["drover --coordinators a:1,b:2 get nodes -o json", "drover get nodes --coordinators a:1,b:2 -o json"]
        {
            let arguments = parse(line).unwrap();
            assert_eq!(arguments.global.coordinators, ["a:1", "b:2"]);
            assert_eq!(arguments.global.output, Format::Json);
        }
    }

    #[test]
    fn numbers_out_of_range_are_refused_as_usage_errors() {
        for line in [
            "drover scale tiny -1",
            "drover scale tiny 1001",
            "drover scale tiny two",
            "drover scale tiny 1 --generation 0",
            "drover logs tiny-x --tail 0",
            "drover apply -f x --timeout 0",
            "drover dev --nodes 0",
            "drover get pods",
            "drover processes stop",
            "drover processes stop --pid 7",
            "drover processes stop tiny-x --node a --pid 7",
            "drover processes stop --node a --pid 0",
            "drover processes stop --node a",
            "drover processes stop --all",
            "drover processes stop --node a --pid 7 --all",
            "drover processes stop tiny-x --all",
            "drover processes stop tiny-x --name tiny",
            "drover processes stop --name tiny --node a --all",
            "drover processes stop --name tiny --replace",
            "drover freeze override",
            "drover freeze override --for 0",
            "drover freeze override --for 3601",
            "drover remove-node",
            "drover end-absence",
            "drover release",
            "drover release tiny-x --token 7",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
        for line in [
            "drover scale tiny 0",
            "drover processes stop tiny-x --replace",
            "drover processes stop --name tiny --force",
            "drover processes stop --node a --all --yes",
            "drover processes stop --node a --pid 7",
            "drover release tiny-x --token 1.7",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
    }

    #[test]
    fn kinds_are_understood_in_the_singular_too() {
        for (word, kind) in [("node", Kind::Nodes), ("instances", Kind::Instances), ("deployment", Kind::Deployments)] {
            let Command::Get(get) = parse(&format!("drover get {word} x")).unwrap().command else { panic!() };
            assert_eq!((get.kind, get.name.as_deref()), (kind, Some("x")));
        }
    }
}
