//! An agent is stopped (SIGSTOP) for longer than its session lives: its servers have no owner then, and go on answering, until
//! their agent is back or another node's server is ready in their place.

use anyhow::{Context as _, ensure};
use drover_proto::v1::{GetInstanceRequest, Instance};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    load::Load,
    programs::{eventually, servers_with},
};
use nix::sys::signal::Signal;

fn plan(agents: usize) -> Plan {
    let coordinator_toml = "session_ttl_ms = 3000\nheartbeat_interval_ms = 500\n".to_owned();
    Plan { agents, coordinator_toml, ..Plan::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn until_its_agent_is_back() -> anyhow::Result<()> {
    let cluster = Cluster::start(plan(1)).await?;
    let before = cluster.deploy(cluster.spec("tiny", 1)).await?.remove(0);
    let load = Load::start(&cluster.coordinators[0].http, &["tiny"], 1, 2).await?;
    signal(&cluster, "a", Signal::SIGSTOP)?;
    let unowned = eventually("the server has no owner and is known to answer", SOON, async || {
        let now = instance(&cluster, &before.id).await?;
        ensure!(now.node.is_empty() && now.unowned_node == "a", "{now:?}");
        Ok(now)
    })
    .await?;
    assert!(unowned.message.contains("answers without an owner"), "{unowned:?}");
    let table = cluster.drover(0, &["get", "instances"])?.1;
    assert!(table.contains("answers without an owner"), "{table}");
    let asked = load.tally().requests;
    eventually("requests are answered all the while", SOON, async || {
        ensure!(load.tally().requests >= asked + 10, "{:?}", load.tally());
        Ok(())
    })
    .await?;
    signal(&cluster, "a", Signal::SIGCONT)?;
    let after = cluster.ready("tiny", 1).await?.remove(0);
    assert!(after.pid == before.pid && after.token > before.token, "claimed again in place: {after:?}");
    assert!(after.unowned_node.is_empty(), "{after:?}");
    let tally = load.end().await;
    assert!(tally.told.is_empty() && tally.wrong.is_empty(), "{tally:#?}");
    cluster.delete("tiny").await?;
    cluster.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn until_another_node_has_a_ready_one() -> anyhow::Result<()> {
    let cluster = Cluster::start(plan(2)).await?;
    let before = cluster.deploy(cluster.spec("tiny", 1)).await?.remove(0);
    let load = Load::start(&cluster.coordinators[0].http, &["tiny"], 1, 2).await?;
    signal(&cluster, &before.node, Signal::SIGSTOP)?;
    let after = eventually("the instance is ready on the other node", SOON, async || {
        let now = cluster.ready("tiny", 1).await?.remove(0);
        ensure!(now.node != before.node, "{now:?}");
        Ok(now)
    })
    .await?;
    signal(&cluster, &before.node, Signal::SIGCONT)?;
    eventually("the server that was replaced has ended", SOON, async || {
        let servers = servers_with(&cluster.mark());
        ensure!(servers.len() == 1 && i64::from(servers[0].pid) == after.pid, "{servers:?}");
        Ok(())
    })
    .await?;
    let tally = load.end().await;
    assert!(tally.told.is_empty() && tally.wrong.is_empty(), "{tally:#?}");
    cluster.delete("tiny").await?;
    cluster.end().await
}

fn signal(cluster: &Cluster, node: &str, signal: Signal) -> anyhow::Result<()> {
    let agent = cluster.agents.iter().find(|agent| agent.node == node).context("no such agent")?;
    agent.running.as_ref().context("the agent is down")?.signal(signal)
}

async fn instance(cluster: &Cluster, id: &str) -> anyhow::Result<Instance> {
    let request = GetInstanceRequest { id: id.to_owned() };
    cluster.client(0).await?.get_instance(request).await?.into_inner().instance.context("no instance")
}
