//! `start`: from `apply` until the replicas are ready, beside the same llama-servers started by hand; and where the
//! processor time goes.
//!
//! Bare: the servers are spawned at once, each with the very command line that the agent used for its instance (taken from
//! /proc) but for the socket, and asked for /health until each has answered 200. Runs of both kinds alternate. Of each run
//! two times count: until the last replica is ready, and until the median one is, which a node serves the sooner for
//! launching a few at a time.

use super::cpu::{self, Usage};
use anyhow::{Context as _, ensure};
use drover_proto::v1::{ApplyDeploymentRequest, InstanceState, ListInstancesRequest};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    programs::{eventually, processes_with, servers_with},
};
use futures::future::join_all;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::{Instant, sleep},
};

/// How often the API, or a bare server, is asked whether it is ready.
const POLL: Duration = Duration::from_millis(20);

/// One run.
struct Run {
    /// Until the last is ready.
    last: Duration,
    /// Until the median one is.
    median: Duration,
    /// Processor time meanwhile, by part.
    used: Usage,
}

/// The runs of one kind, as medians.
struct Figures {
    last_ms: f64,
    median_ms: f64,
    used_ms: BTreeMap<&'static str, f64>,
}

/// Runs the benchmark and prints its figures.
pub async fn run(replicas: Vec<i32>, runs: usize, json: bool) -> anyhow::Result<()> {
    // Two agents share this machine: each launches what would be the default on its half of it.
    let cores = std::thread::available_parallelism()?;
    let agent_toml = format!("launches_at_once = {cores}\n");
    let cluster = Cluster::start(Plan { agents: 2, agent_toml, ..Plan::default() }).await?;
    let mut figures = Vec::new();
    for replicas in replicas {
        let (mut bare, mut drover) = (Vec::new(), Vec::new());
        // The first run of each kind warms the page cache and is not counted.
        for run in 0..=runs {
            eprintln!("{replicas} replicas: run {run} of {runs}{}", if run == 0 { " (not counted)" } else { "" });
            let (through, commands) = through_drover(&cluster, replicas).await?;
            let by_hand = by_hand(cluster.folder(), commands).await?;
            if run > 0 {
                drover.push(through);
                bare.push(by_hand);
            }
        }
        figures.push((replicas, Figures::of(&bare), Figures::of(&drover)));
    }
    cluster.end().await?;
    if json {
        let rows = figures.iter().map(|(replicas, bare, drover)| {
            serde_json::json!({ "replicas": replicas, "by_hand": bare.json(), "drover": drover.json() })
        });
        println!("{}", serde_json::Value::from_iter(rows));
        return Ok(());
    }
    for (replicas, bare, drover) in figures {
        show(replicas, runs, &bare, &drover);
    }
    Ok(())
}

impl Figures {
    fn of(runs: &[Run]) -> Self {
        let of = |value: &dyn Fn(&Run) -> Duration| ms(median(&mut runs.iter().map(value).collect::<Vec<_>>()));
        let used = |part: &'static str| (part, of(&|run| run.used.get(part).copied().unwrap_or_default()));
        Self { last_ms: of(&|run| run.last), median_ms: of(&|run| run.median), used_ms: cpu::PARTS.map(used).into() }
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({ "last_ms": self.last_ms, "median_ms": self.median_ms, "cpu_ms": self.used_ms })
    }
}

fn show(replicas: i32, runs: usize, bare: &Figures, drover: &Figures) {
    println!("{replicas} replicas (medians of {runs} runs)   by hand ms   through drover ms   ratio   difference ms");
    for (what, bare, drover) in [
        ("the last one is ready after", bare.last_ms, drover.last_ms),
        ("the median one is ready after", bare.median_ms, drover.median_ms),
    ] {
        println!("  {what:<32} {bare:>12.0} {drover:>19.0} {:>7.2} {:>15.0}", drover / bare, drover - bare);
    }
    for part in cpu::PARTS {
        let (bare, drover) = (bare.used_ms[part], drover.used_ms[part]);
        println!("  {:<32} {bare:>12.1} {drover:>19.1}", format!("processor time of {part}"));
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn median(values: &mut [Duration]) -> Duration {
    values.sort();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// From the call to the API saying that all are ready; returns the servers' command lines too.
async fn through_drover(cluster: &Cluster, replicas: i32) -> anyhow::Result<(Run, Vec<Vec<String>>)> {
    let mut spec = cluster.spec("bench", replicas);
    spec.context_tokens = Some(512);
    spec.slots = Some(1);
    let mut client = cluster.client(0).await?;
    let before = cpu::of(cluster);
    let begun = Instant::now();
    client.apply_deployment(ApplyDeploymentRequest { spec: Some(spec), generation: 0 }).await?;
    let wanted = usize::try_from(replicas)?;
    let mut ready = BTreeMap::new();
    while ready.len() < wanted {
        let request = ListInstancesRequest { deployment: "bench".to_owned(), page_size: 1000, ..Default::default() };
        let listed = client.list_instances(request).await?.into_inner().instances;
        for instance in listed.iter().filter(|i| i.state() == InstanceState::Ready) {
            ready.entry(instance.id.clone()).or_insert_with(|| begun.elapsed());
        }
        ensure!(begun.elapsed() < SOON * 2, "{} of {wanted} are ready: {listed:#?}\n{}", ready.len(), cluster.logs());
        if ready.len() < wanted {
            sleep(POLL).await;
        }
    }
    let last = begun.elapsed();
    let used = cpu::between(&before, &cpu::of(cluster));
    let commands = servers_with(&cluster.mark())
        .into_iter()
        .map(|found| {
            let bytes = std::fs::read(format!("/proc/{}/cmdline", found.pid))?;
            let words = bytes.split(|b| *b == 0).filter(|w| !w.is_empty());
            Ok(words.map(|w| String::from_utf8_lossy(w).into_owned()).collect())
        })
        .collect::<anyhow::Result<Vec<Vec<String>>>>()?;
    ensure!(commands.len() == wanted, "{} servers run, {replicas} were asked for", commands.len());
    cluster.delete("bench").await?;
    // What still ends would take its time from the next run.
    eventually("no shim is left", SOON, async || {
        let left = processes_with(&cluster.mark()).into_iter().filter(|found| found.command.contains("/drover-shim "));
        ensure!(left.count() == 0, "some are");
        Ok(())
    })
    .await?;
    Ok((Run { last, median: median(&mut ready.into_values().collect::<Vec<_>>()), used }, commands))
}

/// Servers that are killed when dropped.
struct Servers(Vec<(Child, PathBuf)>);

impl Drop for Servers {
    fn drop(&mut self) {
        for (child, socket) in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// From the first spawn to the last /health with 200.
async fn by_hand(folder: &Path, commands: Vec<Vec<String>>) -> anyhow::Result<Run> {
    let own = cpu::of_process(std::process::id().try_into()?);
    let begun = Instant::now();
    let mut servers = Servers(Vec::new());
    for (n, words) in commands.into_iter().enumerate() {
        let (program, mut arguments) =
            words.split_first().map(|(p, a)| (p.clone(), a.to_vec())).context("no command")?;
        let socket = folder.join(format!("bare-{n}.sock"));
        let host = arguments.iter().position(|a| a == "--host").context("no --host in the command line")?;
        arguments[host + 1] = socket.display().to_string();
        let child = Command::new(program)
            .args(arguments)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        servers.0.push((child, socket));
    }
    let healthy = servers.0.iter().map(|(_, socket)| async {
        while !is_healthy(socket).await {
            ensure!(begun.elapsed() < SOON * 2, "{} is not healthy", socket.display());
            sleep(POLL).await;
        }
        Ok(begun.elapsed())
    });
    let mut healthy = join_all(healthy).await.into_iter().collect::<anyhow::Result<Vec<Duration>>>()?;
    let last = begun.elapsed();
    let used = servers.0.iter().map(|(child, _)| i32::try_from(child.id()).map(cpu::of_process));
    let used = used.sum::<Result<Duration, _>>()?;
    let bench = cpu::of_process(std::process::id().try_into()?).saturating_sub(own);
    Ok(Run { last, median: median(&mut healthy), used: Usage::from([("servers", used), ("bench", bench)]) })
}

async fn is_healthy(socket: &Path) -> bool {
    let ask = async {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        std::io::Result::Ok(answer.starts_with(b"HTTP/1.1 200"))
    };
    ask.await.unwrap_or(false)
}
