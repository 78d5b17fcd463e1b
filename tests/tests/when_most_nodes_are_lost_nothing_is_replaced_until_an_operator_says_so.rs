//! Two of three agents are cut off (SIGSTOP): more likely the network is at fault than two hosts, so nothing that they own is
//! started elsewhere; when they are back, all is as before. Once an operator says that they are gone, it is.

use anyhow::{Context as _, ensure};
use drover_proto::v1::{Instance, InstanceState, ListInstancesRequest, WatchEventsRequest};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    programs::{eventually, servers_with},
};
use nix::sys::signal::Signal;
use std::{collections::BTreeMap, time::Duration};

const TTL: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_most_nodes_are_lost_nothing_is_replaced_until_an_operator_says_so() -> anyhow::Result<()> {
    let coordinator_toml = format!("session_ttl_ms = {}\nheartbeat_interval_ms = 500\n", TTL.as_millis());
    let cluster = Cluster::start(Plan { agents: 3, coordinator_toml, ..Plan::default() }).await?;
    let before = cluster.deploy(cluster.spec("tiny", 3)).await?;
    let pids = |instances: &[Instance]| instances.iter().map(|i| (i.id.clone(), i.pid)).collect::<BTreeMap<_, _>>();
    let owners: std::collections::BTreeSet<&str> = before.iter().map(|i| i.node.as_str()).collect();
    assert_eq!(owners.len(), 3, "one on each: {before:#?}");

    signal(&cluster, Signal::SIGSTOP)?;
    told(&cluster, "Frozen", 1).await?;
    eventually("the lost ones have no owner", SOON, async || owned(&cluster, 1).await).await?;
    // Far longer than it takes to replace what one node has lost.
    tokio::time::sleep(2 * TTL).await;
    owned(&cluster, 1).await?;
    assert_eq!(servers_with(&cluster.mark()).len(), 3, "nothing was started in their place");
    let said = cluster.drover(0, &["freeze"])?.1;
    assert!(said.starts_with("FROZEN: 2 of 3 nodes"), "{said}");
    assert!(cluster.deployment("tiny").await?.message.contains("2 of 3 nodes seen in the last hour are lost"));
    signal(&cluster, Signal::SIGCONT)?;
    let again = cluster.ready("tiny", 3).await?;
    assert_eq!(pids(&again), pids(&before), "the same servers");
    told(&cluster, "Thawed", 1).await?;

    signal(&cluster, Signal::SIGSTOP)?;
    told(&cluster, "Frozen", 2).await?;
    let refused = cluster.drover(0, &["remove-node", "c"])?;
    assert!(refused.0 == Some(1) && refused.2.contains("node c has a session"), "{refused:?}");
    let (code, said, told_beside) =
        cluster.drover(0, &["freeze", "override", "--for", "60", "--reason", "they are gone"])?;
    assert!(code == Some(0) && said.contains("they are gone"), "{said}{told_beside}");
    eventually("all is ready on the node that is left", SOON, async || {
        let instances = instances(&cluster).await?;
        ensure!(instances.iter().all(|i| i.state() == InstanceState::Ready && i.node == "c"), "{instances:#?}");
        Ok(())
    })
    .await?;
    signal(&cluster, Signal::SIGCONT)?;
    eventually("what was replaced has ended", SOON, async || {
        let servers = servers_with(&cluster.mark());
        ensure!(servers.len() == 3, "{servers:#?}");
        Ok(())
    })
    .await?;
    cluster.delete("tiny").await?;
    cluster.end().await
}

/// To the agents of nodes a and b.
fn signal(cluster: &Cluster, signal: Signal) -> anyhow::Result<()> {
    cluster.agents[..2].iter().try_for_each(|agent| agent.running.as_ref().context("it is down")?.signal(signal))
}

async fn instances(cluster: &Cluster) -> anyhow::Result<Vec<Instance>> {
    let request = ListInstancesRequest { deployment: "tiny".to_owned(), ..Default::default() };
    Ok(cluster.client(0).await?.list_instances(request).await?.into_inner().instances)
}

/// So many of the three instances have an owner.
async fn owned(cluster: &Cluster, count: usize) -> anyhow::Result<()> {
    let instances = instances(cluster).await?;
    ensure!(instances.iter().filter(|i| !i.node.is_empty()).count() == count && instances.len() == 3, "{instances:#?}");
    Ok(())
}

/// Waits for the so-manieth event of the fleet with this reason.
async fn told(cluster: &Cluster, reason: &str, count: usize) -> anyhow::Result<()> {
    eventually(&format!("{reason} is told"), SOON, async || {
        let request = WatchEventsRequest { object: "fleet".to_owned(), after_revision: 0, follow: false };
        let mut events = cluster.client(0).await?.watch_events(request).await?.into_inner();
        let mut reasons = Vec::new();
        while let Some(answer) = events.message().await? {
            reasons.extend(answer.event.map(|event| event.reason));
        }
        ensure!(reasons.iter().filter(|r| *r == reason).count() >= count, "{reasons:?}");
        Ok(())
    })
    .await
}
