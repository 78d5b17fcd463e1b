//! What happened to instances, when, by whom, why and with which exit code or signal is told once, by instance and by node,
//! and by node when the instance is gone.

use anyhow::{Context as _, ensure};
use drover_proto::v1::{Event, Instance, ScaleDeploymentRequest, StopProcessRequest};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    programs::{eventually, processes_with, program},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::process::Command;

const NODE: &str = "node/a";

/// By the command, as an operator asks.
fn history(cluster: &Cluster, object: &str) -> anyhow::Result<Vec<Event>> {
    let mut command = Command::new(program("drover"));
    command.args(["--coordinators", &cluster.coordinators[0].grpc, "--join-secret-file"]);
    let output =
        command.arg(cluster.folder().join("secret")).args(["events", "--object", object, "-o", "json"]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let read = |line: &str| {
        let value: serde_json::Value = serde_json::from_str(line)?;
        let field = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
        anyhow::Ok(Event {
            reason: field("reason"),
            message: field("message"),
            source: field("source"),
            ..Event::default()
        })
    };
    text.lines().filter(|line| !line.trim().is_empty()).map(read).collect()
}

/// Where an event is told.
#[derive(Clone, Copy, PartialEq)]
enum Of {
    Both,
    /// A change of keeper is no history of the node: what it says of itself tells that.
    Instance,
    /// The instance is gone.
    Node,
}

/// Waits for an event and sees that it is the only one of its kind that says this.
async fn told(cluster: &Cluster, instance: &str, reason: &str, words: &[&str], of: Of) -> anyhow::Result<()> {
    let of_instance = format!("instance/{instance}");
    let rings =
        [(of != Of::Instance).then_some((NODE, true)), (of != Of::Node).then_some((of_instance.as_str(), false))];
    for (object, named) in rings.into_iter().flatten() {
        eventually(&format!("{object} has one {reason} that says {words:?}"), SOON, async || {
            let all = history(cluster, object)?;
            let fits = |e: &&Event| {
                e.reason == reason
                    && (!named || e.message.starts_with(instance))
                    && words.iter().all(|word| e.message.contains(word))
            };
            let count = all.iter().filter(fits).count();
            ensure!(count == 1, "{count} of {all:#?}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

fn signal(pid: i64, signal: Signal) -> anyhow::Result<()> {
    Ok(kill(Pid::from_raw(i32::try_from(pid)?), signal)?)
}

/// The process of this fleet whose command line has both.
fn running(cluster: &Cluster, program: &str, what: &str) -> anyhow::Result<i64> {
    let all = processes_with(&cluster.mark());
    let found = all.iter().find(|p| p.command.contains(program) && p.command.contains(what));
    Ok(i64::from(found.with_context(|| format!("no {program}{what} among {all:#?}"))?.pid))
}

async fn another_process(cluster: &Cluster, before: &Instance) -> anyhow::Result<Instance> {
    eventually("it runs again", SOON, async || {
        let now = cluster.ready("tiny", 2).await?.into_iter().find(|i| i.id == before.id).context("gone")?;
        ensure!(now.pid != before.pid, "the same process");
        Ok(now)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_instance_and_by_node() -> anyhow::Result<()> {
    let plan = Plan {
        coordinator_toml: "session_ttl_ms = 4000\nheartbeat_interval_ms = 1000\n".to_owned(),
        ..Plan::default()
    };
    let mut cluster = Cluster::start(plan).await?;
    let started = cluster.deploy(cluster.spec("tiny", 2)).await?;
    for instance in &started {
        let (pid, token) = (format!("pid {}", instance.pid), instance.token.context("no token")?.to_string());
        told(&cluster, &instance.id, "Claimed", &["by a with token", &token], Of::Both).await?;
        told(&cluster, &instance.id, "Ready", &["on a, token", &token, &pid], Of::Both).await?;
    }

    // A crash, and a restart that follows.
    let first = &started[0];
    signal(first.pid, Signal::SIGKILL)?;
    let restarted = another_process(&cluster, first).await?;
    let pid = format!("pid {}, token", first.pid);
    told(&cluster, &first.id, "BackOff", &[&pid, "was Ready", "signal 9", "it is started again in"], Of::Both).await?;
    told(&cluster, &first.id, "Ready", &[&format!("pid {}", restarted.pid)], Of::Both).await?;

    // Its shim dies, and nobody is left who knows how the server ends.
    let shim = running(&cluster, "drover-shim ", &first.id)?;
    signal(shim, Signal::SIGKILL)?;
    signal(restarted.pid, Signal::SIGKILL)?;
    let restarted = another_process(&cluster, &restarted).await?;
    told(&cluster, &first.id, "BackOff", &["ended (how is not known)"], Of::Both).await?;

    // The proxy.
    let before = running(&cluster, "drover-agent proxy ", "")?;
    signal(before, Signal::SIGKILL)?;
    eventually("the proxy's event", SOON, async || {
        let all = history(&cluster, NODE)?;
        let count =
            all.iter().filter(|e| e.reason == "ProxyRestarted" && e.message.contains(&before.to_string())).count();
        ensure!(count == 1, "{all:#?}");
        Ok(())
    })
    .await?;

    // Another agent, in time and after its session.
    cluster.agents[0].running.as_mut().context("it runs")?.kill()?;
    cluster.start_agent(0)?;
    cluster.agent_ready(0).await?;
    told(&cluster, &first.id, "Adopted", &[&format!("pid {}", restarted.pid)], Of::Instance).await?;
    cluster.agents[0].running.take().context("it runs")?.terminate(SOON).await?;
    eventually("the claims are gone with their lease", SOON, async || {
        let deployment = cluster.deployment("tiny").await?;
        ensure!(deployment.claimed_replicas == 0, "{deployment:?}");
        Ok(())
    })
    .await?;
    cluster.start_agent(0)?;
    cluster.agent_ready(0).await?;
    let again = cluster.ready("tiny", 2).await?;
    for instance in &again {
        let token = instance.token.context("no token")?.to_string();
        told(&cluster, &instance.id, "ReClaimed", &["by a with token", &token], Of::Instance).await?;
    }

    // By hand, and by scaling down: what is gone is told by its node.
    let second = &again[1];
    let reason = "it is slow".to_owned();
    let request =
        StopProcessRequest { instance: second.id.clone(), reason, replace: true, ..StopProcessRequest::default() };
    cluster.client(0).await?.stop_process(request).await?;
    eventually("another is in its place", SOON, async || {
        ensure!(cluster.ready("tiny", 2).await?.iter().all(|i| i.id != second.id), "it is still there");
        Ok(())
    })
    .await?;
    told(&cluster, &second.id, "StoppedByHand", &["an operator at", "because: it is slow"], Of::Node).await?;
    told(&cluster, &second.id, "Stopped", &["exit code 0"], Of::Node).await?;
    let before = cluster.ready("tiny", 2).await?;
    let scale = ScaleDeploymentRequest { name: "tiny".to_owned(), replicas: Some(1), generation: 0 };
    cluster.client(0).await?.scale_deployment(scale).await?;
    let left = cluster.ready("tiny", 1).await?.remove(0);
    let gone = before.iter().find(|i| i.id != left.id).context("none is gone")?;
    told(&cluster, &gone.id, "ScaledDown", &["wanted no more"], Of::Node).await?;
    told(&cluster, &gone.id, "Stopped", &["exit code 0"], Of::Node).await?;
    cluster.delete("tiny").await?;
    cluster.end().await
}
