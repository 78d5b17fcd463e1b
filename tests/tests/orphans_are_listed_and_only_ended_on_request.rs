//! A llama-server that no agent keeps is listed and counted, and ended only when asked for; instances are never cleaned up.

use anyhow::{Context as _, ensure};
use drover_proto::{
    status::{reason, reason_of},
    v1::{
        CleanupProcessesRequest, CleanupProcessesResponse, HostProcess, Instance, ListNodesRequest,
        ListProcessesRequest, ProcessAction, ProcessOwner, StopProcessRequest, WatchEventsRequest,
    },
};
use drover_tests::{
    alone,
    by_hand::Foreign,
    cluster::{Cluster, Plan, SOON},
    programs::eventually,
};
use std::time::{Duration, Instant};

/// Must never be seen in an answer.
const KEY: &str = "canary-key-of-a-foreign-server";

#[test]
fn orphans_are_listed_and_only_ended_on_request() -> anyhow::Result<()> {
    alone::run("orphans_are_listed_and_only_ended_on_request", whole())
}

async fn whole() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(Plan { coordinators: 2, agents: 1, ..Plan::default() }).await?;
    let instances = cluster.deploy(cluster.spec("tiny", 1)).await?;
    let owned = instances[0].pid;
    let whole = capacity(&cluster).await?;
    let mut foreign = Foreign::start(&cluster, "first", KEY)?;
    let pid = foreign.pid();

    is_listed_and_counted(&cluster, pid, owned, whole).await?;
    a_dry_run_leaves_it(&cluster, &mut foreign, owned).await?;
    cleanup_ends_it_alone(&cluster, &mut foreign, owned).await?;
    eventually("its memory is given back", SOON, async || {
        let now = capacity(&cluster).await?;
        ensure!(now >= whole, "{now} of {whole}");
        Ok(())
    })
    .await?;
    a_stale_one_is_ended_unasked(&cluster).await?;
    a_pid_is_stopped_by_the_command(&cluster).await?;
    let stopped = an_instance_is_stopped_and_replaced(&cluster, &instances[0], false).await?;
    an_instance_is_stopped_and_replaced(&cluster, &stopped, true).await?;
    a_node_that_is_away_is_said_to_be(&mut cluster).await?;

    cluster.start_agent(0)?;
    cluster.agent_ready(0).await?;
    cluster.connected(1).await?;
    cluster.delete("tiny").await?;
    cluster.end().await
}

async fn capacity(cluster: &Cluster) -> anyhow::Result<i64> {
    let nodes = cluster.client(0).await?.list_nodes(ListNodesRequest::default()).await?.into_inner().nodes;
    Ok(nodes[0].capacity.as_ref().context("no capacity")?.memory_bytes)
}

/// As a coordinator sees them; one of the two does not hold the node's session.
async fn processes(cluster: &Cluster, coordinator: usize) -> anyhow::Result<Vec<HostProcess>> {
    let request = ListProcessesRequest { node: "a".to_owned(), page_size: 1000, ..Default::default() };
    let listed = cluster.client(coordinator).await?.list_processes(request).await?.into_inner();
    ensure!(listed.unreachable.is_empty(), "{listed:?}");
    Ok(listed.processes)
}

async fn is_listed_and_counted(cluster: &Cluster, pid: i64, owned: i64, whole: i64) -> anyhow::Result<()> {
    for coordinator in 0..2 {
        let listed = eventually("the foreign server has loaded and is listed", SOON, async || {
            let listed = processes(cluster, coordinator).await?;
            let found = listed.iter().find(|p| p.pid == pid).with_context(|| format!("{listed:?}"))?;
            ensure!(found.rss_bytes > 8 << 20, "{found:?}");
            Ok(listed)
        })
        .await?;
        let foreign = listed.iter().find(|p| p.pid == pid).context("gone")?;
        assert_eq!((foreign.owner(), foreign.instance.as_str()), (ProcessOwner::Foreign, ""), "{foreign:?}");
        assert_eq!(foreign.model_path, cluster.model().display().to_string());
        assert!(!foreign.command_line.contains(KEY) && foreign.command_line.contains("--api-key ***"), "{foreign:?}");
        assert!((0..600_000).contains(&foreign.age_ms) && foreign.start_ticks > 0, "{foreign:?}");
        let ours = listed.iter().find(|p| p.pid == owned).context("the instance's server is not listed")?;
        assert_eq!(ours.owner(), ProcessOwner::Owned, "{ours:?}");
        assert!(ours.instance.starts_with("tiny-") && ours.token.is_some(), "{ours:?}");
    }
    eventually("its memory is taken off the node's", SOON, async || {
        let now = capacity(cluster).await?;
        ensure!(whole - now >= 8 << 20, "{now} of {whole}");
        Ok(())
    })
    .await
}

async fn clean_up(
    cluster: &Cluster,
    coordinator: usize,
    dry: Option<bool>,
) -> anyhow::Result<CleanupProcessesResponse> {
    let request = CleanupProcessesRequest {
        node: "a".to_owned(),
        dry_run: dry,
        force: false,
        reason: "left by a test".to_owned(),
    };
    Ok(cluster.client(coordinator).await?.cleanup_processes(request).await?.into_inner())
}

async fn a_dry_run_leaves_it(cluster: &Cluster, foreign: &mut Foreign, owned: i64) -> anyhow::Result<()> {
    let pid = foreign.pid();
    for dry in [None, Some(true)] {
        // Other tests' strays may be there for a moment.
        let answer = eventually("the dry run names the foreign server alone", SOON, async || {
            let answer = clean_up(cluster, 1, dry).await?;
            ensure!(answer.results.len() == 1, "{answer:?}");
            Ok(answer)
        })
        .await?;
        let result = &answer.results[0];
        assert!(answer.dry_run && result.action() == ProcessAction::WouldEnd, "{answer:?}");
        assert_eq!(result.process.as_ref().map(|p| p.pid), Some(pid), "and not {owned}");
    }
    assert!(foreign.lives()?);
    Ok(())
}

async fn cleanup_ends_it_alone(cluster: &Cluster, foreign: &mut Foreign, owned: i64) -> anyhow::Result<()> {
    let pid = foreign.pid();
    let answer = clean_up(cluster, 1, Some(false)).await?;
    let done: Vec<_> = answer.results.iter().map(|r| (r.process.as_ref().map_or(0, |p| p.pid), r.action())).collect();
    assert_eq!(done, [(pid, ProcessAction::Ended)], "{answer:?}");
    assert!(!foreign.lives()?);
    assert_eq!(clean_up(cluster, 0, Some(false)).await?.results, [], "nothing is left to clean up");
    let ours = processes(cluster, 0).await?;
    assert!(ours.iter().any(|p| p.pid == owned && p.owner() == ProcessOwner::Owned), "{ours:?}");
    told(cluster, "node/a", "ProcessEnded", &[&format!("pid {pid} (foreign)"), "an operator at", "left by a test"])
        .await
}

/// Waits for an event that says all of this.
async fn told(cluster: &Cluster, object: &str, reason: &str, words: &[&str]) -> anyhow::Result<()> {
    eventually(&format!("{object} has an event {reason}"), SOON, async || {
        let request = WatchEventsRequest { object: object.to_owned(), after_revision: 0, follow: false };
        let mut events = cluster.client(0).await?.watch_events(request).await?.into_inner();
        let mut seen = Vec::new();
        while let Some(answer) = events.message().await? {
            seen.extend(answer.event);
        }
        let fits = |e: &&drover_proto::v1::Event| e.reason == reason && words.iter().all(|w| e.message.contains(w));
        ensure!(seen.iter().any(|e| fits(&e)), "{seen:#?}");
        Ok(())
    })
    .await
}

/// One that listens where only this agent's servers do, and that no record of it names.
async fn a_stale_one_is_ended_unasked(cluster: &Cluster) -> anyhow::Result<()> {
    let mut stale = Foreign::start(cluster, "agent-a/run/tiny-222222", KEY)?;
    let pid = stale.pid();
    eventually("it is listed as stale", SOON, async || {
        let listed = processes(cluster, 0).await?;
        let found = listed.iter().find(|p| p.pid == pid).with_context(|| format!("{listed:?}"))?;
        ensure!(found.owner() == ProcessOwner::Stale, "{found:?}");
        Ok(())
    })
    .await?;
    assert_eq!(stale.signal().await?, None, "SIGTERM was enough, which it answers with an exit");
    told(cluster, "node/a", "StaleProcess", &[&format!("pid {pid} "), "ended by SIGTERM"]).await
}

/// With `drover processes stop --node a --pid P`, which also ends one that ignores SIGTERM.
async fn a_pid_is_stopped_by_the_command(cluster: &Cluster) -> anyhow::Result<()> {
    let mut foreign = Foreign::start(cluster, "second", KEY)?;
    let pid = foreign.pid();
    eventually("it is listed", SOON, async || {
        ensure!(processes(cluster, 0).await?.iter().any(|p| p.pid == pid), "not yet");
        Ok(())
    })
    .await?;
    // A stopped process takes no SIGTERM: only SIGKILL ends it.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(pid)?), nix::sys::signal::Signal::SIGSTOP)?;
    let (code, out, err) = cluster.drover(1, &["processes", "list", "--node", "a"])?;
    assert!(code == Some(0) && out.contains("FOREIGN") && out.contains("OWNED") && !out.contains(KEY), "{out}{err}");
    let words = ["processes", "stop", "--node", "a", "--pid", &pid.to_string(), "--force"];
    let (code, out, err) = cluster.drover(1, &words)?;
    assert!(code == Some(1) && out.contains("WOULD END") && err.contains("--yes"), "{out}{err}");
    assert!(foreign.lives()?, "nobody has confirmed it");
    let (code, out, err) = cluster.drover(1, &[&words[..], &["--yes", "-o", "json"]].concat())?;
    assert_eq!(code, Some(0), "{out}{err}");
    let answer: serde_json::Value = serde_json::from_str(&out)?;
    assert_eq!(answer["results"][0]["action"], "PROCESS_ACTION_ENDED", "{answer}");
    assert_eq!(foreign.signal().await?, Some(9));
    let (code, out, err) = cluster.drover(1, &["processes", "stop", "--node", "a", "--pid", &pid.to_string()])?;
    assert!(code == Some(1) && err.contains("no llama-server with pid"), "{out}{err}");
    let (code, _, err) = cluster.drover(1, &["processes", "cleanup", "--node", "a"])?;
    assert!(code == Some(0) && err.contains("nothing to clean up"), "{err}");
    Ok(())
}

/// Gives the instance in its place.
async fn an_instance_is_stopped_and_replaced(
    cluster: &Cluster,
    instance: &Instance,
    force: bool,
) -> anyhow::Result<Instance> {
    let reason = "it is slow".to_owned();
    let request =
        StopProcessRequest { instance: instance.id.clone(), force, replace: true, reason, ..Default::default() };
    let result = cluster.client(1).await?.stop_process(request).await?.into_inner().result.context("no result")?;
    let fine = if force { ProcessAction::Ended } else { ProcessAction::Draining };
    assert!(result.action() == fine || result.action() == ProcessAction::Draining, "{result:?}");
    assert_eq!(result.process.as_ref().map(|p| p.instance.as_str()), Some(instance.id.as_str()), "{result:?}");
    let next = eventually("another instance is in its place", SOON * 2, async || {
        let now = cluster.ready("tiny", 1).await?;
        ensure!(now[0].id != instance.id, "{now:?}");
        Ok(now[0].clone())
    })
    .await?;
    ensure!(!processes(cluster, 0).await?.iter().any(|p| p.pid == instance.pid), "the old one lives");
    told(cluster, "deployment/tiny", "StoppedByHand", &[&instance.id, "an operator at", "because: it is slow"]).await?;
    Ok(next)
}

async fn a_node_that_is_away_is_said_to_be(cluster: &mut Cluster) -> anyhow::Result<()> {
    let running = cluster.agents[0].running.as_mut().context("the agent is down")?;
    running.kill()?;
    cluster.agents[0].running = None;
    // At first its session stands, and it is the silence that tells; then its lease has run out.
    for _ in 0..2 {
        let asked = Instant::now();
        let request = ListProcessesRequest { node: "a".to_owned(), ..Default::default() };
        let Err(status) = cluster.client(1).await?.list_processes(request).await else {
            anyhow::bail!("a node without an agent has answered")
        };
        assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
        assert_eq!(reason_of(&status).as_deref(), Some(reason::NODE_UNREACHABLE), "{status:?}");
        assert!(status.message().contains("node a"), "{status:?}");
        cluster.connected(0).await?;
    }
    let all = cluster.client(1).await?.list_processes(ListProcessesRequest::default()).await?.into_inner();
    assert!(all.processes.is_empty() && all.unreachable.len() == 1, "{all:?}");
    assert!(all.unreachable[0].message.contains("is away"), "{all:?}");
    let nobody = ListProcessesRequest { node: "nobody".to_owned(), ..Default::default() };
    let status = cluster.client(1).await?.list_processes(nobody).await.expect_err("there is no such node");
    assert_eq!(reason_of(&status).as_deref(), Some(reason::NOT_FOUND), "{status:?}");
    Ok(())
}
