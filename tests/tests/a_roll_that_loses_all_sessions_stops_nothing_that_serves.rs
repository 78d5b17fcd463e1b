//! In the middle of a roll all agents are cut off for longer than their sessions live, so that no instance has a claim: what
//! served before serves on, in the same processes, and the roll ends as any other.

use anyhow::ensure;
use drover_proto::v1::{ApplyDeploymentRequest, DeploymentSpec, Instance, InstanceState, ListInstancesRequest};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    programs::{eventually, servers_with},
};
use nix::sys::signal::Signal;
use std::{collections::BTreeSet, time::Duration};

const TTL: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_roll_that_loses_all_sessions_stops_nothing_that_serves() -> anyhow::Result<()> {
    let coordinator_toml = format!("session_ttl_ms = {}\nheartbeat_interval_ms = 500\n", TTL.as_millis());
    let cluster = Cluster::start(Plan { agents: 2, coordinator_toml, ..Plan::default() }).await?;
    let before = cluster.deploy(cluster.spec("tiny", 2)).await?;
    let pids: BTreeSet<i64> = before.iter().map(|i| i.pid).collect();

    // No server of the new revision ever becomes ready: no node takes a model that is none.
    std::fs::write(cluster.folder().join("models/broken.gguf"), "no model")?;
    let broken = DeploymentSpec { model_path: "broken.gguf".to_owned(), ..cluster.spec("tiny", 2) };
    eventually("the new revision is accepted", SOON, async || apply(&cluster, broken.clone()).await).await?;
    eventually("instances of the new revision are offered", SOON, async || {
        let instances = instances(&cluster).await?;
        let rolling = instances.iter().filter(|i| i.revision == 2).count();
        ensure!(rolling == 2 && serving(&instances) == pids, "{instances:#?}");
        Ok(())
    })
    .await?;

    signal(&cluster, Signal::SIGSTOP)?;
    eventually("no instance has an owner", SOON, async || {
        let instances = instances(&cluster).await?;
        ensure!(instances.iter().all(|i| i.node.is_empty()), "{instances:#?}");
        Ok(())
    })
    .await?;
    // Time for several plans of a leader that sees it so.
    tokio::time::sleep(TTL).await;
    let meanwhile = instances(&cluster).await?;
    assert!(meanwhile.iter().all(|i| i.wanted), "{meanwhile:#?}");
    signal(&cluster, Signal::SIGCONT)?;
    let again = eventually("all that served before is claimed again", SOON, async || {
        let instances = instances(&cluster).await?;
        ensure!(serving(&instances) == pids, "{instances:#?}");
        let higher = |now: &Instance| before.iter().any(|was| was.id == now.id && now.token > was.token);
        ensure!(instances.iter().filter(|now| higher(now)).count() == 2, "{instances:#?}");
        Ok(instances)
    })
    .await?;
    assert!(again.iter().all(|i| i.wanted), "{again:#?}");
    let alive: BTreeSet<i64> = servers_with(&cluster.mark()).iter().map(|f| i64::from(f.pid)).collect();
    assert!(pids.is_subset(&alive), "{pids:?} of {alive:?}");

    apply(&cluster, DeploymentSpec { slots: Some(1), ..cluster.spec("tiny", 2) }).await?;
    let rolled = cluster.ready("tiny", 2).await?;
    assert!(rolled.iter().all(|i| i.revision == 3), "{rolled:#?}");
    cluster.delete("tiny").await?;
    cluster.end().await
}

async fn apply(cluster: &Cluster, spec: DeploymentSpec) -> anyhow::Result<()> {
    let generation = cluster.deployment("tiny").await?.generation;
    cluster.client(0).await?.apply_deployment(ApplyDeploymentRequest { spec: Some(spec), generation }).await?;
    Ok(())
}

async fn instances(cluster: &Cluster) -> anyhow::Result<Vec<Instance>> {
    let request = ListInstancesRequest { deployment: "tiny".to_owned(), ..Default::default() };
    Ok(cluster.client(0).await?.list_instances(request).await?.into_inner().instances)
}

fn signal(cluster: &Cluster, signal: Signal) -> anyhow::Result<()> {
    cluster.agents.iter().filter_map(|agent| agent.running.as_ref()).try_for_each(|agent| agent.signal(signal))
}

fn serving(instances: &[Instance]) -> BTreeSet<i64> {
    instances.iter().filter(|i| i.state() == InstanceState::Ready).map(|i| i.pid).collect()
}
