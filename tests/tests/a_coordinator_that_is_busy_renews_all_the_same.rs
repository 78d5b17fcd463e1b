//! A coordinator whose every thread is busy, but for those of its connections: heartbeats are answered and leases renewed for
//! longer than they live, so no session ends, no instance is moved, and all goes on when it has time again.

use anyhow::{Context as _, ensure};
use drover_proto::v1::ListNodesRequest;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    faults::Watched,
    programs::eventually,
};
use std::{fs, time::Duration};
use tokio::time::{Instant, sleep, timeout};

const TTL: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn and_loses_no_session() -> anyhow::Result<()> {
    let place = tempfile::tempdir()?;
    let file = place.path().join("stall");
    let plan = Plan {
        agents: 2,
        coordinator_toml: format!("session_ttl_ms = {}\nheartbeat_interval_ms = 1500\n", TTL.as_millis()),
        coordinator_environment: vec![("DROVER_STALL_FILE".to_owned(), file.display().to_string())],
        ..Plan::default()
    };
    let fleet = Watched::new(Cluster::start(plan).await?)?;
    fleet.cluster.deploy(fleet.cluster.spec("tiny", 2)).await?;
    let before = fleet.standing().await?;
    let sessions =
        || -> anyhow::Result<Vec<String>> { ["a", "b"].iter().map(|node| session(&fleet.cluster, node)).collect() };
    let had = sessions()?;

    fs::write(&file, "")?;
    let answers = async || {
        let mut client = fleet.cluster.client(0).await?;
        timeout(Duration::from_secs(1), client.list_nodes(ListNodesRequest::default()))
            .await
            .context("no answer")??;
        anyhow::Ok(())
    };
    eventually("it answers no call", SOON, async || {
        ensure!(answers().await.is_err(), "it does");
        Ok(())
    })
    .await?;
    let begun = Instant::now();
    while begun.elapsed() < TTL * 2 {
        let now = sessions().with_context(|| fleet.cluster.logs())?;
        ensure!(now == had, "after {:?}: {now:?}, not {had:?}", begun.elapsed());
        sleep(Duration::from_millis(100)).await;
    }
    ensure!(answers().await.is_err(), "it was not busy all the while, so this test proves nothing");
    fs::remove_file(&file)?;

    eventually("it answers again", SOON, answers).await?;
    fleet.stands("nothing was claimed anew", SOON, |now| *now == before).await?;
    for node in ["node/a", "node/b"] {
        let events = fleet.cluster.events(node).await?;
        let sessions = events.iter().filter(|e| ["Joined", "Resumed"].contains(&e.reason.as_str())).count();
        ensure!(sessions == 1, "{node} has lost its stream: {events:#?}");
    }
    fleet.verdict()?;
    fleet.end(&["tiny"]).await
}

/// The lease that a node's session hangs on, and the revision at which it was opened, as the store says.
fn session(cluster: &Cluster, node: &str) -> anyhow::Result<String> {
    let record = cluster.etcd.ctl(&["get", &format!("/drover/sessions/{node}"), "--write-out=fields"])?;
    let of = |name: &str| record.lines().find(|line| line.starts_with(&format!("\"{name}\""))).map(str::to_owned);
    let found = of("Lease").zip(of("CreateRevision")).with_context(|| format!("{node} has no session: {record:?}"))?;
    Ok(format!("{} {}", found.0, found.1))
}
