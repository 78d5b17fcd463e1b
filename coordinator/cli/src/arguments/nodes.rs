//! The command lines of `drover freeze`, `drover release`, `drover end-absence` and `drover remove-node`.

use clap::{Args, Subcommand};
use drover_proto::v1::Token;

/// Options of `freeze`.
#[derive(Debug, Args)]
pub struct Freeze {
    /// What to do; nothing: show.
    #[command(subcommand)]
    pub command: Option<FreezeCommand>,
}

/// What `freeze` does.
#[derive(Debug, Subcommand)]
pub enum FreezeCommand {
    /// Let what lost nodes ran be claimed elsewhere for a while, whatever share of the nodes is lost
    #[command(after_help = "Example:\n  drover freeze override --for 600 --reason \"rack 3 is really gone\"")]
    Override(OverrideFreeze),
    /// Take an override back
    #[command(after_help = "Example:\n  drover freeze end-override")]
    EndOverride,
}

/// Options of `freeze override`.
#[derive(Debug, Args)]
pub struct OverrideFreeze {
    /// For how long, in seconds
    #[arg(long = "for", value_name = "SECONDS", value_parser = clap::value_parser!(i64).range(1..=3600))]
    pub for_s: i64,
    /// Why; recorded with the event
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// Options of `release`.
#[derive(Debug, Args)]
pub struct Release {
    /// Id of the instance
    pub instance: String,
    /// Only the claim with this token
    #[arg(long, value_name = "GENERATION.REVISION")]
    pub token: Option<Token>,
    /// Why; recorded with the event
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// Options of `end-absence`.
#[derive(Debug, Args)]
pub struct EndAbsence {
    /// Name of the node
    pub node: String,
    /// Why; recorded with the event
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}

/// Options of `remove-node`.
#[derive(Debug, Args)]
pub struct RemoveNode {
    /// Name of the node, which must not be connected
    pub name: String,
    /// Why; recorded with the event
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
}
