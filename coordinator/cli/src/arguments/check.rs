//! The command line of `drover check`.

use clap::{Args, Subcommand};

/// Options of `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// What to look for.
    #[command(subcommand)]
    pub command: CheckCommand,
}

/// What `check` looks for.
#[derive(Debug, Subcommand)]
pub enum CheckCommand {
    /// Instances that several llama-servers serve, as the hosts themselves say
    #[command(after_help = "\
Example:
  drover check duplicates --output json

Of each it says which one to keep (the highest token), which others there are, and whether they end by themselves: after a
host was lost and is back, its old servers do so once those that replaced them are ready.

The exit code is 1 when there are any, or when a host could not be looked at.")]
    Duplicates,
}
