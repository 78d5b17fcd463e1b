//! All coordinators at once: ended in order and started again, killed for longer than sessions live, and killed in the
//! middle of a start and of a drain.

use super::{Watched, processes};
use crate::{
    cluster::{Cluster, Plan, SOON},
    programs::eventually,
};
use anyhow::{Context as _, ensure};
use drover_proto::v1::{
    ApplyDeploymentRequest, DeleteDeploymentRequest, GetDeploymentRequest, InstanceState, ListInstancesRequest,
};
use nix::sys::signal::Signal;
use std::time::Duration;

const COORDINATORS: usize = 3;
const TTL: Duration = Duration::from_secs(10);

/// Runs it.
///
/// # Errors
/// Says what was not as it must be.
pub async fn run() -> anyhow::Result<()> {
    let plan = Plan { coordinators: COORDINATORS, agents: 2, ..Plan::default() };
    let mut fleet = Watched::new(Cluster::start(plan).await?)?;
    fleet.cluster.deploy(fleet.cluster.spec("tiny", 6)).await?;
    in_order(&mut fleet).await.context("all coordinators were restarted in order")?;
    for_long(&mut fleet).await.context("all coordinators were killed for longer than sessions live")?;
    while_starting(&mut fleet).await.context("all coordinators were killed while servers were started")?;
    while_draining(&mut fleet).await.context("all coordinators were killed while servers were drained")?;
    fleet.verdict()?;
    let beside = fleet.servers.beside();
    ensure!(beside.is_empty(), "servers of one instance lived at the same time: {beside:?}");
    let terms = fleet.judge.of("leader");
    ensure!(terms.iter().all(|term| term.deleted || term.version == 1), "a leader was written over another: {terms:?}");
    fleet.end(&["tiny"]).await
}

/// Sessions, claims and tokens stay.
async fn in_order(fleet: &mut Watched) -> anyhow::Result<()> {
    let before = fleet.standing().await?;
    for coordinator in &fleet.cluster.coordinators {
        coordinator.running.as_ref().context("it runs")?.signal(Signal::SIGTERM)?;
    }
    for n in 0..COORDINATORS {
        fleet.cluster.stop_coordinator(n).await?;
    }
    start_all(&mut fleet.cluster).await?;
    resumed(&fleet.cluster, 1).await?;
    let after = fleet.stands("all stands as before", SOON, |now| *now == before).await?;
    ensure!(after.len() == 6, "{after:?}");
    Ok(())
}

/// Sessions run out: every server is claimed again in its place.
async fn for_long(fleet: &mut Watched) -> anyhow::Result<()> {
    let before = fleet.standing().await?;
    kill_all(&mut fleet.cluster)?;
    eventually("sessions have run out", TTL * 3, async || {
        let keys = fleet.cluster.etcd.keys()?;
        ensure!(!keys.iter().any(|key| key.starts_with("sessions/") || key.starts_with("claims/")), "{keys:?}");
        Ok(())
    })
    .await?;
    start_all(&mut fleet.cluster).await?;
    let after = fleet
        .stands("all are claimed again", SOON, |now| {
            now.len() == before.len() && now.iter().all(|(id, s)| before.get(id).is_some_and(|b| s.token > b.token))
        })
        .await?;
    ensure!(processes(&after) == processes(&before), "{after:#?}, and before: {before:#?}");
    Ok(())
}

/// Some are ready, some are not: all become so, each once.
async fn while_starting(fleet: &mut Watched) -> anyhow::Result<()> {
    let mut client = fleet.cluster.client(0).await?;
    let spec = Some(fleet.cluster.spec("more", 6));
    client.apply_deployment(ApplyDeploymentRequest { spec, generation: 0 }).await?;
    eventually("some of it are ready", SOON, async || {
        let request = ListInstancesRequest { deployment: "more".to_owned(), ..ListInstancesRequest::default() };
        let instances = client.list_instances(request).await?.into_inner().instances;
        ensure!(instances.iter().any(|i| i.state() == InstanceState::Ready), "{instances:?}");
        Ok(())
    })
    .await?;
    kill_all(&mut fleet.cluster)?;
    start_all(&mut fleet.cluster).await?;
    fleet.cluster.ready("more", 6).await?;
    Ok(())
}

/// What was asked for is done.
async fn while_draining(fleet: &mut Watched) -> anyhow::Result<()> {
    let mut client = fleet.cluster.client(0).await?;
    client.delete_deployment(DeleteDeploymentRequest { name: "more".to_owned(), generation: 0 }).await?;
    kill_all(&mut fleet.cluster)?;
    start_all(&mut fleet.cluster).await?;
    eventually("the deployment is gone", SOON * 2, async || {
        let mut client = fleet.cluster.client(0).await?;
        let answer = client.get_deployment(GetDeploymentRequest { name: "more".to_owned() }).await;
        ensure!(answer.as_ref().is_err_and(|status| status.code() == tonic::Code::NotFound), "{answer:?}");
        Ok(())
    })
    .await
}

fn kill_all(cluster: &mut Cluster) -> anyhow::Result<()> {
    (0..COORDINATORS).try_for_each(|n| cluster.kill_coordinator(n))
}

async fn start_all(cluster: &mut Cluster) -> anyhow::Result<()> {
    (0..COORDINATORS).try_for_each(|n| cluster.spawn_coordinator(n))?;
    for n in 0..COORDINATORS {
        cluster.coordinator_ready(n).await?;
    }
    Ok(())
}

/// Waits until every node has resumed its session; none may have opened more than `joined`.
async fn resumed(cluster: &Cluster, joined: usize) -> anyhow::Result<()> {
    for agent in &cluster.agents {
        eventually(&format!("{} has resumed its session", agent.node), SOON, async || {
            let events = cluster.events(&format!("node/{}", agent.node)).await?;
            let count = |reason: &str| events.iter().filter(|event| event.reason == reason).count();
            ensure!(count("Resumed") >= 1 && count("Joined") <= joined, "{events:#?}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}
