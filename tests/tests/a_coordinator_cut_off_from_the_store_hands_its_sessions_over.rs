//! Coordinators that can't reach etcd while agents and clients reach them: they say so, their sessions go on at one that
//! can, tokens and servers unchanged, and what they know goes on being routed.

use anyhow::{Context as _, ensure};
use drover_proto::v1::ListInstancesRequest;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    faults::Watched,
    gateway::Gateway,
    link::Link,
    load::{Load, ask},
    programs::{eventually, program},
};
use std::{
    collections::BTreeSet,
    process::Command,
    time::{Duration, Instant},
};

const TTL: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_nothing_passes_between_them() -> anyhow::Result<()> {
    handed_over(2, Link::cut).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_connections_are_refused_and_only_one_of_three_is_left() -> anyhow::Result<()> {
    handed_over(3, Link::refuse).await
}

/// All coordinators lose the store but one, which serves no session of node a.
async fn handed_over(coordinators: usize, lose: fn(&Link)) -> anyhow::Result<()> {
    let plan = Plan {
        coordinators,
        agents: 2,
        links: true,
        coordinator_toml: format!("session_ttl_ms = {}\nheartbeat_interval_ms = 1500\n", TTL.as_millis()),
        ..Plan::default()
    };
    let mut fleet = Watched::new(Cluster::start(plan).await?)?;
    fleet.cluster.deploy(fleet.cluster.spec("tiny", 4)).await?;
    let before = fleet.standing().await?;
    let served = served_by(&fleet.cluster, "a")?;
    let kept = (0..coordinators).find(|n| *n != served).context("there is another")?;
    fleet.cluster.asked = kept;
    let (lost, left) = (&fleet.cluster.coordinators[served], &fleet.cluster.coordinators[kept]);
    let (at_lost, at_left) = (Gateway::new(&lost.http), Gateway::new(&left.http));
    let load = Load::start(&left.http, &["tiny"], 1, 1).await?;

    let links = || fleet.cluster.coordinators.iter().enumerate().filter(|(n, _)| *n != kept);
    links().for_each(|(_, coordinator)| coordinator.link.iter().for_each(lose));
    let begun = Instant::now();
    for node in ["a", "b"] {
        eventually(&format!("{node} goes on elsewhere"), TTL, async || {
            let at = served_by(&fleet.cluster, node)?;
            ensure!(at == kept, "its session is at coordinator {at}");
            Ok(())
        })
        .await
        .with_context(|| fleet.cluster.logs())?;
    }
    eprintln!("all sessions were handed over after {:.1} s", begun.elapsed().as_secs_f32());
    for node in ["node/a", "node/b"] {
        let events = fleet.cluster.events(node).await?;
        let joined = events.iter().filter(|event| event.reason == "Joined").count();
        ensure!(joined == 1, "{node} has lost its session: {events:#?}");
    }
    fleet.stands("nothing was claimed anew", SOON, |now| *now == before).await?;

    let (status, said) = at_lost.get("/readyz").await?;
    ensure!(
        status == 503 && said["reason"].as_str().is_some_and(|why| why.contains("out of reach")),
        "{status} {said}"
    );
    ensure!(at_lost.get("/readyz/gateway").await?.0 == 200 && at_left.get("/readyz").await?.0 == 200);
    ask(&at_lost, "tiny").await.context("what it knows goes on being routed")?;

    // Both nodes claim, though one of them had its claims made by a coordinator that can make none now.
    fleet.cluster.deploy(fleet.cluster.spec("later", 2)).await?;
    let request = ListInstancesRequest { deployment: "later".to_owned(), ..ListInstancesRequest::default() };
    let instances = fleet.cluster.client(kept).await?.list_instances(request).await?.into_inner().instances;
    let nodes: BTreeSet<&str> = instances.iter().map(|i| i.node.as_str()).collect();
    ensure!(nodes == BTreeSet::from(["a", "b"]), "{instances:#?}");
    // A command that begins with one that can't reach the store.
    let addresses = format!("{},{}", fleet.cluster.coordinators[served].grpc, fleet.cluster.coordinators[kept].grpc);
    let mut scale = Command::new(program("drover"));
    scale.args(["--coordinators", &addresses, "--join-secret-file"]).arg(fleet.cluster.folder().join("secret"));
    let output = scale.args(["scale", "later", "1"]).output()?;
    ensure!(output.status.success(), "drover scale: {}", String::from_utf8_lossy(&output.stderr));

    links().for_each(|(_, coordinator)| coordinator.link.iter().for_each(Link::mend));
    eventually("the lost one is ready again", SOON, async || {
        let (status, said) = at_lost.get("/readyz").await?;
        ensure!(status == 200, "{said}");
        Ok(())
    })
    .await?;
    fleet.stands("nothing was claimed anew", SOON, |now| before.iter().all(|(id, b)| now.get(id) == Some(b))).await?;
    let tally = load.end().await;
    ensure!(tally.told.is_empty() && tally.wrong.is_empty() && tally.requests > 0, "{tally:?}");
    fleet.verdict()?;
    fleet.end(&["later", "tiny"]).await
}

/// Index of the coordinator that serves a node's session, as the store says.
fn served_by(cluster: &Cluster, node: &str) -> anyhow::Result<usize> {
    let record = cluster.etcd.ctl(&["get", &format!("/drover/sessions/{node}"), "--print-value-only"])?;
    let found = (0..cluster.coordinators.len()).find(|n| record.contains(&format!("coordinator-{n}")));
    found.with_context(|| format!("{node} has no session: {record:?}"))
}
