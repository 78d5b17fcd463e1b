//! SIGKILL of a host's proxy under load: what breaks says so, no answer is another instance's, and it is mended at once.

use anyhow::{Context as _, ensure};
use drover_proto::v1::{DeleteDeploymentRequest, Instance};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    gateway::Gateway,
    load::{Load, ask, two_models},
    programs::{eventually, processes_with},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;
use std::{fs, time::Instant};

const KILLS: usize = 5;
/// Requests that may fail, one after the other, before one succeeds. The gateway tries each twice, 300 ms apart, so that a
/// proxy that is back within a second costs three at the very most; twice as many are left to a busy machine.
const FAILURES_MAX: usize = 6;

/// The proxies of a fleet's hosts.
fn proxies(cluster: &Cluster) -> Vec<i32> {
    let all = processes_with(&cluster.mark());
    all.into_iter().filter(|found| found.command.contains("drover-agent proxy ")).map(|found| found.pid).collect()
}

fn proxy(cluster: &Cluster) -> anyhow::Result<i32> {
    let all = proxies(cluster);
    ensure!(all.len() == 1, "{all:?} are not one proxy");
    Ok(all[0])
}

fn sigkill(pid: i32) -> anyhow::Result<()> {
    Ok(kill(Pid::from_raw(pid), Signal::SIGKILL)?)
}

/// Open descriptors.
fn open(pid: impl std::fmt::Display) -> anyhow::Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd")).with_context(|| format!("pid {pid}"))?.count())
}

async fn same_servers(cluster: &Cluster, before: &[Instance]) -> anyhow::Result<()> {
    let after = [cluster.ready("tiny", 1).await?, cluster.ready("other", 1).await?].concat();
    let who = |all: &[Instance]| all.iter().map(|i| (i.id.clone(), i.pid, i.token)).collect::<Vec<_>>();
    ensure!(who(&after) == who(before), "{:?} are not {:?}", who(&after), who(before));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn again_and_again_under_load() -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan::default()).await?;
    let servers = two_models(&cluster).await?;
    let address = cluster.coordinators[0].http.clone();
    let gateway = Gateway::new(&address);
    let agent = cluster.agents[0].running.as_ref().context("the agent runs")?.pid();
    let before = (open(agent)?, open(servers[0].pid)?, open(servers[1].pid)?, open(proxy(&cluster)?)?);
    let load = Load::start(&address, &["tiny", "other"], 4, 4).await?;
    let mut mended = Vec::new();
    for _ in 0..KILLS {
        eventually("streams run", SOON, async || {
            ensure!(load.streaming() >= 4, "{} do", load.streaming());
            Ok(())
        })
        .await?;
        let pid = proxy(&cluster)?;
        let (killed, mut failures) = (Instant::now(), 0);
        sigkill(pid)?;
        while let Err(error) = ask(&gateway, "tiny").await {
            failures += 1;
            ensure!(failures <= FAILURES_MAX, "{failures} requests have failed since the proxy was killed: {error:#}");
        }
        mended.push((killed.elapsed(), failures));
        ensure!(proxy(&cluster)? != pid, "another serves");
        let so_far = load.tally();
        eventually("both models answer again under load", SOON, async || {
            let now = load.tally();
            ensure!(now.requests >= so_far.requests + 8 && now.streams >= so_far.streams + 8, "{now:?}");
            Ok(())
        })
        .await?;
    }
    let tally = load.end().await;
    eprintln!(
        "until a request succeeded after each kill, and requests that failed before: {mended:?}; {} streams and {} requests \
         were whole, {} failed and said so",
        tally.streams,
        tally.requests,
        tally.told.len()
    );
    ensure!(tally.wrong.is_empty(), "{} ended without a word or with another's: {:#?}", tally.wrong.len(), tally.wrong);
    ensure!(tally.told.len() >= KILLS, "no stream was hit: {tally:?}");
    same_servers(&cluster, &servers).await?;
    drop(gateway);
    eventually("no descriptor is left over", SOON, async || {
        let after = (open(agent)?, open(servers[0].pid)?, open(servers[1].pid)?, open(proxy(&cluster)?)?);
        ensure!(
            after.0 <= before.0 + 4 && after.1 <= before.1 + 2 && after.2 <= before.2 + 2 && after.3 <= before.3 + 4,
            "{after:?} after {before:?}"
        );
        Ok(())
    })
    .await?;
    cluster.delete("tiny").await?;
    cluster.delete("other").await?;
    cluster.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn together_with_its_agent() -> anyhow::Result<()> {
    // The agent is away for longer than a session lives by default, on a busy machine.
    let plan = Plan { coordinator_toml: "session_ttl_ms = 120000\n".to_owned(), ..Plan::default() };
    let mut cluster = Cluster::start(plan).await?;
    let servers = two_models(&cluster).await?;
    let address = cluster.coordinators[0].http.clone();
    let load = Load::start(&address, &["tiny", "other"], 2, 2).await?;
    eventually("streams run", SOON, async || {
        ensure!(load.streaming() >= 2, "{} do", load.streaming());
        Ok(())
    })
    .await?;
    let pid = proxy(&cluster)?;
    cluster.agents[0].running.as_mut().context("the agent runs")?.kill()?;
    sigkill(pid)?;
    cluster.start_agent(0)?;
    cluster.agent_ready(0).await?;
    let so_far = load.tally();
    eventually("both models answer again", SOON, async || {
        let now = load.tally();
        ensure!(now.requests >= so_far.requests + 8 && now.streams >= so_far.streams + 8, "{now:?}");
        Ok(())
    })
    .await?;
    let tally = load.end().await;
    ensure!(tally.wrong.is_empty(), "{} ended without a word or with another's: {:#?}", tally.wrong.len(), tally.wrong);
    same_servers(&cluster, &servers).await?;
    cluster.delete("tiny").await?;
    cluster.delete("other").await?;
    cluster.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_an_instance_drains() -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan::default()).await?;
    let mut spec = cluster.spec("tiny", 1);
    // Longer than anybody waits here: only what is known of requests in flight ends the drain.
    (spec.context_tokens, spec.drain_timeout_ms) = (Some(32_768), Some(600_000));
    cluster.deploy(spec).await?;
    let gateway = Gateway::new(&cluster.coordinators[0].http);
    let request = json!({
        "model": "tiny", "stream": true, "max_tokens": 16_000, "temperature": 0, "seed": 1,
        "messages": [{ "role": "user", "content": "Tell a long story." }],
    });
    let (begun, beginning) = tokio::sync::oneshot::channel();
    let stream = tokio::spawn(async move {
        let mut begun = Some(begun);
        let begin = |_: &str| {
            if let Some(begun) = begun.take() {
                let _ = begun.send(());
            }
        };
        gateway.stream_chat(&request, begin).await
    });
    beginning.await?;
    let mut client = cluster.client(0).await?;
    client.delete_deployment(DeleteDeploymentRequest { name: "tiny".to_owned(), generation: 0 }).await?;
    eventually("the instance drains", SOON, async || {
        let log = cluster.agents[0].running.as_ref().context("the agent runs")?.log();
        ensure!(log.contains("Draining"), "not yet");
        Ok(())
    })
    .await?;
    sigkill(proxy(&cluster)?)?;
    let error = stream.await?.err().context("the stream was not hit")?.to_string();
    ensure!(error.contains("the stream carries an error"), "{error}");
    cluster.delete("tiny").await?;
    cluster.end().await
}
