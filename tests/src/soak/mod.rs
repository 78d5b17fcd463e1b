//! `soak`: a real fleet under steady churn for a long time; what grows, what is left, and which requests failed.
//!
//! Owns the order of things: a steady deployment first, then churn ([`churn`]) and requests ([`clients`]) with samples of
//! every process ([`series`]) all the while, then the end of the churn and a look at what is left of it ([`left`]). Agent
//! "a" and the coordinators run through, and with them what is judged; agent "b" is killed and restarted. After a warm-up
//! of a third the growth of each program that lived through the rest is fitted ([`fit`]).

mod churn;
mod clients;
mod fit;
mod left;
mod report;
mod series;

use anyhow::Context as _;
use churn::Churn;
use clients::Clients;
use drover_tests::cluster::{Cluster, Plan, SOON};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use report::Report;
use series::Series;
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// The deployment that nothing is done to: none of its requests may fail.
const STEADY: &str = "steady";
const STEADY_REPLICAS: i32 = 4;
/// Most faults that are kept word for word.
const FAULTS_MAX: usize = 40;
/// Time for connections to close and rings to be collected once all churn is over.
const SETTLE: Duration = Duration::from_secs(60);

/// How a soak is to be.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Example:\n  tests/run soak --minutes 30 --seed 7 --output json")]
pub struct Args {
    /// Minutes of churn; the first third warms up and is not judged.
    #[arg(long, default_value_t = 30.0, value_parser = minutes)]
    minutes: f64,
    /// Seed of what is done and when; it is printed. Default: a new one.
    #[arg(long)]
    seed: Option<u64>,
    /// Growth of a program's memory that is tolerated, in KB a minute.
    #[arg(long, default_value_t = 16.0)]
    tolerance_kb: f64,
    /// How the figures are printed.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// A table.
    Text,
    /// One JSON object.
    Json,
}

fn minutes(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| format!("\"{text}\" is no number"))?;
    if (0.5..=10_000.0).contains(&value) { Ok(value) } else { Err(format!("{value} is not from 0.5 to 10000")) }
}

/// What must not happen, as it happens. Cheap to clone.
#[derive(Debug, Clone, Default)]
struct Faults(Arc<Mutex<(u64, Vec<String>)>>);

impl Faults {
    fn add(&self, what: impl Into<String>) {
        let what = what.into();
        eprintln!("FAULT: {what}");
        let mut faults = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        faults.0 += 1;
        if faults.1.len() < FAULTS_MAX {
            faults.1.push(what);
        }
    }

    fn all(&self) -> (u64, Vec<String>) {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

/// Runs the soak and prints its figures; false when something grew, failed or was left.
pub async fn run(args: Args) -> anyhow::Result<bool> {
    let seed = args.seed.unwrap_or_else(rand::random);
    let length = Duration::from_secs_f64(args.minutes * 60.0);
    eprintln!("soak of {} minutes, seed {seed}", args.minutes);
    let faults = Faults::default();
    let mut cluster = Cluster::start(Plan { coordinators: 2, agents: 2, ..Plan::default() }).await?;
    cluster.deploy(cluster.spec(STEADY, STEADY_REPLICAS)).await?;
    let base = left::Left::of(&cluster)?;

    let gateways: Vec<String> = cluster.coordinators.iter().map(|c| c.http.clone()).collect();
    let clients = Clients::start(&gateways, seed, &faults);
    let mut churn = Churn::new(&cluster, seed, clients.models(), &faults).await?;
    let mut series = Series::new(&cluster, length, &clients);
    let until = Instant::now() + length;
    {
        let counts = churn.counts();
        let (folder, node) = (cluster.mark(), 1);
        // All three end at the same moment.
        tokio::join!(
            churn.work(until, &folder),
            restarts(&mut cluster, node, until, StdRng::seed_from_u64(seed ^ 1), &counts, &faults),
            series.sample(until, &counts),
        );
    }
    let requests = clients.stop().await;
    eprintln!("the churn is over: everything of it is deleted");
    churn.finish().await;
    let operations = churn.counts().all();
    let end = left::settled(&cluster, &base, SETTLE).await?;
    for what in end.beyond(&base) {
        faults.add(format!("left behind: {what}"));
    }
    let rows = series.rows();
    if let Err(error) = cluster.end().await {
        faults.add(format!("{error:#}"));
    }
    let report = Report {
        seed,
        minutes: args.minutes,
        tolerance_kb: args.tolerance_kb,
        operations,
        requests,
        rows,
        base,
        end,
        faults: faults.all(),
    };
    match args.output {
        Output::Text => print!("{}", report.text()),
        Output::Json => println!("{}", report.json()),
    }
    Ok(report.passed())
}

/// Ends one agent now and then, by SIGKILL or in order, for a moment or for longer than its session lives.
async fn restarts(
    cluster: &mut Cluster,
    agent: usize,
    until: Instant,
    mut random: StdRng,
    counts: &churn::Counts,
    faults: &Faults,
) {
    loop {
        let pause = Duration::from_millis(random.random_range(15_000..45_000));
        if Instant::now() + pause + SOON > until {
            tokio::time::sleep_until(until).await;
            return;
        }
        sleep(pause).await;
        let killed = random.random_bool(0.5);
        // A session lives for 10 s.
        let away = if random.random_bool(0.15) { 13_000 } else { random.random_range(0..3_000) };
        counts.add(match (killed, away > 10_000) {
            (true, false) => "agent killed",
            (false, false) => "agent restarted",
            (_, true) => "agent away past its session",
        });
        if let Err(error) = restart(cluster, agent, killed, Duration::from_millis(away)).await {
            faults.add(format!("restart of agent {agent}: {error:#}"));
        }
    }
}

async fn restart(cluster: &mut Cluster, agent: usize, killed: bool, away: Duration) -> anyhow::Result<()> {
    let mut running = cluster.agents[agent].running.take().context("the agent is down")?;
    if killed {
        running.kill()?;
    } else {
        let status = running.terminate(SOON).await?;
        anyhow::ensure!(status.success(), "it ended with {status}");
    }
    sleep(away).await;
    cluster.start_agent(agent)?;
    cluster.agent_ready(agent).await
}
