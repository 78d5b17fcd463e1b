//! Benchmarks of the real programs, run by `tests/run bench NAME`, which fail only when something did not work; runs with
//! faults, by `tests/run faults NAME`, which fail when a server ends that should live; and the soak, run by
//! `tests/run soak`, which fails when something grows, fails or is left.

mod bench;
mod soak;

use clap::{Parser, Subcommand};
use drover_tests::faults::{self, outage::How};
use std::{process::ExitCode, time::Duration};

/// Benchmarks, faults and long runs of Drover on real parts.
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
    /// Injects faults, and judges what became of the servers.
    Faults {
        #[command(subcommand)]
        name: Fault,
    },
    /// A fleet under steady churn for a long time: what grows, what is left, which requests failed.
    Soak(soak::Args),
}

#[derive(Debug, Subcommand)]
enum Fault {
    /// etcd is away: serving goes on, nothing is moved, and everything is as before when it is back.
    #[command(after_help = "Example:\n  tests/run faults outage --how stop --seconds 600")]
    Outage {
        /// How long, in seconds.
        #[arg(long, default_value_t = 600)]
        seconds: u64,
        /// Killed and started again on its data, or halted and let go on.
        #[arg(long, value_enum, default_value_t = How::Stop)]
        how: How,
    },
    /// An agent is halted for longer than its session lives.
    #[command(after_help = "Example:\n  tests/run faults pause --seconds 30")]
    Pause {
        /// How long, in seconds.
        #[arg(long, default_value_t = 30)]
        seconds: u64,
    },
    /// All coordinators end at once: in order, killed for longer than sessions live, and in the middle of work.
    #[command(after_help = "Example:\n  tests/run faults restart")]
    Restart,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// From the start of a killed agent's successor to all servers taken back, beside asking each by hand what it serves.
    #[command(after_help = "Example:\n  tests/run bench adopt --runs 5")]
    Adopt {
        /// Servers on the host.
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i32).range(1..=200))]
        servers: i32,
        /// Runs; the median counts.
        #[arg(long, default_value_t = 3)]
        runs: usize,
        /// Print the figures as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Claims of nodes, beside bare transactions of etcd of the same shape.
    #[command(after_help = "Example:\n  tests/run bench claims --runs 5")]
    Claims {
        /// Numbers of nodes that claim at the same time.
        #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 64], value_parser = clap::value_parser!(u16).range(1..=128))]
        claimers: Vec<u16>,
        /// Runs of each kind; the rates are their medians, the latencies those of all calls.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Print the figures as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Private memory and processor time of agent, proxy and shims beside idle servers.
    #[command(after_help = "Example:\n  tests/run bench overhead --seconds 120")]
    Overhead {
        /// Servers on the host.
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i32).range(1..=200))]
        servers: i32,
        /// How long is measured, in seconds.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Print the figures as JSON.
        #[arg(long)]
        json: bool,
    },
    /// From apply to ready beside the same servers started by hand until /health is 200, with the processor time of each part.
    Start {
        /// Numbers of replicas.
        #[arg(long, value_delimiter = ',', default_values_t = [1, 20, 50], value_parser = clap::value_parser!(i32).range(1..=200))]
        replicas: Vec<i32>,
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
        What::Bench { name: Bench::Adopt { servers, runs, json } } => {
            bench::adopt::run(servers, runs.max(1), json).await?;
        }
        What::Bench { name: Bench::Claims { claimers, runs, json } } => {
            bench::claims::run(claimers.into_iter().map(usize::from).collect(), runs.max(1), json).await?;
        }
        What::Bench { name: Bench::Overhead { servers, seconds, json } } => {
            bench::overhead::run(servers, seconds.max(1), json).await?;
        }
        What::Bench { name: Bench::Start { replicas, runs, json } } => {
            bench::start::run(replicas, runs.max(1), json).await?;
        }
        What::Faults { name: Fault::Outage { seconds, how } } => {
            faults::outage::run(how, Duration::from_secs(seconds)).await?;
        }
        What::Faults { name: Fault::Pause { seconds } } => faults::pause::run(Duration::from_secs(seconds)).await?,
        What::Faults { name: Fault::Restart } => faults::restart::run().await?,
        What::Soak(args) => return Ok(if soak::run(args).await? { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
    }
    Ok(ExitCode::SUCCESS)
}
