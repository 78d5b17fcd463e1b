//! Benchmarks of the real programs, run by `tests/run bench NAME`; prints figures, fails only when something did not work.

mod bench;

use clap::{Parser, Subcommand};

/// Benchmarks of Drover on real parts.
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
async fn main() -> anyhow::Result<()> {
    match Args::parse().what {
        What::Bench { name: Bench::Start { runs, json } } => bench::start::run(runs.max(1), json).await,
    }
}
