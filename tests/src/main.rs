//! Benchmarks of the real programs, run by `tests/run bench NAME`, which fail only when something did not work; and the
//! soak, run by `tests/run soak`, which fails when something grows, fails or is left.

mod bench;
mod soak;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Benchmarks and long runs of Drover on real parts.
#[derive(Debug, Parser)]
#[command(after_help = "Example:\n  tests/run bench start")]
struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Measures.
    Bench {
        #[command(subcommand)]
        name: Bench,
    },
    /// A fleet under steady churn for a long time: what grows, what is left, which requests failed.
    Soak(soak::Args),
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// From apply to ready beside the same servers started by hand until /health is 200, for 1 and 20 replicas.
    Start {
        /// Runs of each kind; the median counts.
        #[arg(long, default_value_t = 3)]
        runs: usize,
        /// Print the figures as JSON.
        #[arg(long)]
        json: bool,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    match Args::parse().what {
        What::Bench { name: Bench::Start { runs, json } } => bench::start::run(runs.max(1), json).await?,
        What::Soak(args) => return Ok(if soak::run(args).await? { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
    }
    Ok(ExitCode::SUCCESS)
}
