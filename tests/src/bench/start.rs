//! `start`: from `apply` to the last replica ready, beside the same llama-servers started by hand.
//!
//! Bare: the servers are spawned at once, each with the very command line that the agent used for its instance (taken from
//! /proc) but for the socket, and asked for /health until each has answered 200. Runs of both kinds alternate.

use anyhow::{Context as _, ensure};
use drover_proto::v1::ApplyDeploymentRequest;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    programs::{eventually, servers_with},
};
use std::{
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::Instant,
};

/// Runs the benchmark and prints its figures.
pub async fn run(runs: usize, json: bool) -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan { agents: 2, ..Plan::default() }).await?;
    let mut figures = Vec::new();
    for replicas in [1, 20] {
        let (mut bare, mut drover) = (Vec::new(), Vec::new());
        // The first run of each kind warms the page cache and is not counted.
        for run in 0..=runs {
            eprintln!("{replicas} replicas: run {run} of {runs}{}", if run == 0 { " (not counted)" } else { "" });
            let (took, commands) = through_drover(&cluster, replicas).await?;
            let by_hand = by_hand(&cluster, commands).await?;
            if run > 0 {
                drover.push(took);
                bare.push(by_hand);
            }
        }
        figures.push((replicas, median(&mut bare), median(&mut drover)));
    }
    cluster.end().await?;
    if json {
        let rows = figures.iter().map(|(replicas, bare, drover)| {
            serde_json::json!({
                "replicas": replicas, "bare_ms": ms(*bare), "drover_ms": ms(*drover),
                "ratio": ms(*drover) / ms(*bare), "difference_ms": ms(*drover) - ms(*bare),
            })
        });
        println!("{}", serde_json::Value::from_iter(rows));
        return Ok(());
    }
    println!("replicas   by hand ms   apply to ready ms   ratio   difference ms   (medians of {runs} runs)");
    for (replicas, bare, drover) in figures {
        let (bare, drover) = (ms(bare), ms(drover));
        println!("{replicas:>8}   {bare:>10.0}   {drover:>17.0}   {:>5.2}   {:>13.0}", drover / bare, drover - bare);
    }
    Ok(())
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn median(values: &mut [Duration]) -> Duration {
    values.sort();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// From the call to the API saying that all are ready; returns the servers' command lines too.
async fn through_drover(cluster: &Cluster, replicas: i32) -> anyhow::Result<(Duration, Vec<Vec<String>>)> {
    let mut spec = cluster.spec("bench", replicas);
    spec.context_tokens = Some(512);
    spec.slots = Some(1);
    let mut client = cluster.client(0).await?;
    let begun = Instant::now();
    client.apply_deployment(ApplyDeploymentRequest { spec: Some(spec), generation: 0 }).await?;
    cluster.ready("bench", replicas).await?;
    let took = begun.elapsed();
    let commands = servers_with(&cluster.mark())
        .into_iter()
        .map(|found| {
            let bytes = std::fs::read(format!("/proc/{}/cmdline", found.pid))?;
            let words = bytes.split(|b| *b == 0).filter(|w| !w.is_empty());
            Ok(words.map(|w| String::from_utf8_lossy(w).into_owned()).collect())
        })
        .collect::<anyhow::Result<Vec<Vec<String>>>>()?;
    ensure!(commands.len() == usize::try_from(replicas)?, "{} servers run, {replicas} were asked for", commands.len());
    cluster.delete("bench").await?;
    Ok((took, commands))
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
async fn by_hand(cluster: &Cluster, commands: Vec<Vec<String>>) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let mut servers = Servers(Vec::new());
    for (n, words) in commands.into_iter().enumerate() {
        let (program, mut arguments) =
            words.split_first().map(|(p, a)| (p.clone(), a.to_vec())).context("no command")?;
        let socket = cluster.folder().join(format!("bare-{n}.sock"));
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
    for (_, socket) in &servers.0 {
        eventually("a server started by hand is healthy", SOON * 2, async || {
            let mut stream = UnixStream::connect(socket).await?;
            stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await?;
            ensure!(answer.starts_with(b"HTTP/1.1 200"), "not yet");
            Ok(())
        })
        .await?;
    }
    Ok(begun.elapsed())
}
