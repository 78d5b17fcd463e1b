//! `adopt`: from the start of an agent to all of the host's servers taken back, beside asking each by hand what it serves.
//!
//! The agent is killed before. *Resumed*: the next one comes within the session's time to live; it has taken all back when
//! the API says that they are ready under their tokens and the agent, asked through the API, names each as its own.
//! *Expired*: the session has run out meanwhile; all are taken back when the API says that they are ready under higher
//! tokens. By hand: `/props` of each server, one after the other.

use super::idle;
use anyhow::{Context as _, ensure};
use drover_proto::v1::{InstanceState, Token};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    measure::{self, Kind},
    programs::eventually,
};
use std::{collections::BTreeMap, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::Instant,
};

/// The longest that the start of an agent should take until all are back.
const AIM: Duration = Duration::from_secs(5);

/// Runs the benchmark and prints its figures.
pub async fn run(servers: i32, runs: usize, json: bool) -> anyhow::Result<()> {
    let mut cluster = idle::fleet(servers, Plan::default()).await?;
    let (mut by_hand, mut resumed, mut expired) = (Vec::new(), Vec::new(), Vec::new());
    for run in 1..=runs {
        eprintln!("run {run} of {runs}");
        by_hand.push(ask_each(&cluster).await?);
        resumed.push(resume(&mut cluster).await?);
        expired.push(expire(&mut cluster).await?);
    }
    idle::end(cluster).await?;
    let (by_hand, resumed, expired) = (median(by_hand), median(resumed), median(expired));
    if json {
        println!(
            "{}",
            serde_json::json!({
                "servers": servers, "runs": runs, "by_hand_ms": by_hand, "aim_ms": AIM.as_millis() as u64,
                "resumed_ms": resumed, "resumed_ratio": resumed / by_hand,
                "expired_ms": expired, "expired_ratio": expired / by_hand,
            })
        );
        return Ok(());
    }
    println!("{servers} servers, medians of {runs} runs; aim: {} ms", AIM.as_millis());
    println!("/props of each by hand      {by_hand:>8.0} ms");
    println!("agent's start, resumed      {resumed:>8.0} ms   {:>6.1} times", resumed / by_hand);
    println!("agent's start, expired      {expired:>8.0} ms   {:>6.1} times", expired / by_hand);
    Ok(())
}

/// In milliseconds.
fn median(mut values: Vec<Duration>) -> f64 {
    values.sort();
    values.get(values.len() / 2).copied().unwrap_or_default().as_secs_f64() * 1000.0
}

/// Pid and token of each instance, all of which are ready.
async fn ready(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, (i64, Token)>> {
    let instances = idle::instances(cluster).await?.into_iter();
    instances
        .map(|i| {
            ensure!(i.state() == InstanceState::Ready, "{} is {:?}: {}", i.id, i.state(), i.message);
            let token = i.token.with_context(|| format!("{} is not claimed", i.id))?;
            Ok((i.id, (i.pid, token)))
        })
        .collect()
}

async fn resume(cluster: &mut Cluster) -> anyhow::Result<Duration> {
    let before = ready(cluster).await?;
    cluster.agents[0].running.take().context("the agent is down")?.kill()?;
    let begun = Instant::now();
    cluster.start_agent(0)?;
    let took = eventually("all are taken back", SOON * 2, async || {
        let owned = idle::owned(cluster).await?;
        ensure!(before.values().all(|(pid, _)| owned.contains(pid)), "{} of {} are", owned.len(), before.len());
        ensure!(ready(cluster).await? == before, "pids or tokens have changed");
        Ok(begun.elapsed())
    });
    took.await.with_context(|| cluster.logs())
}

async fn expire(cluster: &mut Cluster) -> anyhow::Result<Duration> {
    let before = ready(cluster).await?;
    cluster.agents[0].running.take().context("the agent is down")?.kill()?;
    eventually("the claims have run out", SOON * 2, async || {
        let claimed = idle::instances(cluster).await?.into_iter().filter(|i| i.token.is_some()).count();
        ensure!(claimed == 0, "{claimed} are claimed still");
        Ok(())
    })
    .await?;
    let begun = Instant::now();
    cluster.start_agent(0)?;
    let took = eventually("all are taken back", SOON * 4, async || {
        let now = ready(cluster).await?;
        for (instance, (pid, token)) in &before {
            let (now_pid, now_token) = now.get(instance).with_context(|| format!("{instance} is gone"))?;
            ensure!(now_pid == pid && now_token > token, "{instance} is not taken back yet");
        }
        Ok(begun.elapsed())
    });
    took.await.with_context(|| cluster.logs())
}

/// `/props` of each server, one after the other.
async fn ask_each(cluster: &Cluster) -> anyhow::Result<Duration> {
    let run = cluster.folder().join(format!("agent-{}/run", cluster.agents[0].node));
    let servers = measure::programs(cluster).into_iter().filter(|p| p.kind == Kind::Server);
    let sockets: Vec<_> = servers.map(|server| run.join(format!("{}.sock", server.name))).collect();
    let begun = Instant::now();
    for socket in sockets {
        let mut stream = UnixStream::connect(&socket).await.with_context(|| format!("{}", socket.display()))?;
        stream.write_all(b"GET /props HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        ensure!(answer.starts_with(b"HTTP/1.1 200"), "{}: {}", socket.display(), String::from_utf8_lossy(&answer));
    }
    Ok(begun.elapsed())
}
