//! An agent that ends and says when it will be back finds its session, claims and tokens unchanged, within the session's time
//! and long after it; one that does not come back loses them when its time is over.

use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    programs::eventually,
};
use std::time::{Duration, Instant};

const TTL: Duration = Duration::from_secs(2);

async fn cluster(return_within: Duration) -> anyhow::Result<Cluster> {
    let plan = Plan {
        coordinator_toml: format!("session_ttl_ms = {}\nheartbeat_interval_ms = 500\n", TTL.as_millis()),
        agent_toml: format!("return_within_ms = {}\n", return_within.as_millis()),
        ..Plan::default()
    };
    Cluster::start(plan).await
}

async fn leave(cluster: &mut Cluster) -> anyhow::Result<()> {
    let mut agent = cluster.agents[0].running.take().expect("it runs");
    let status = agent.terminate(SOON).await?;
    assert!(status.success(), "{status}");
    Ok(())
}

async fn come_back(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.start_agent(0)?;
    cluster.agent_ready(0).await
}

async fn claim_gone(cluster: &Cluster) -> anyhow::Result<()> {
    eventually("the claim is gone with its lease", SOON, async || {
        let deployment = cluster.deployment("tiny").await?;
        anyhow::ensure!(deployment.claimed_replicas == 0, "{deployment:?}");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_it_comes_back_and_only_once() -> anyhow::Result<()> {
    // Longer than this test may take.
    let mut cluster = cluster(Duration::from_secs(600)).await?;
    let before = cluster.deploy(cluster.spec("tiny", 1)).await?.remove(0);
    for absence in [Duration::ZERO, TTL * 3] {
        leave(&mut cluster).await?;
        let left = Instant::now();
        eventually("its absence", SOON, async || {
            let deployment = cluster.deployment("tiny").await?;
            assert_eq!(deployment.claimed_replicas, 1, "its claim is gone after {:?}: {deployment:?}", left.elapsed());
            anyhow::ensure!(left.elapsed() >= absence, "{:?}", left.elapsed());
            Ok(())
        })
        .await?;
        come_back(&mut cluster).await?;
        let after = cluster.ready("tiny", 1).await?.remove(0);
        assert_eq!((after.pid, after.token), (before.pid, before.token), "after {absence:?}");
    }
    // What it has said holds for one absence: killed after its return, it is lost like any other.
    cluster.agents[0].running.take().expect("it runs").kill()?;
    claim_gone(&cluster).await?;
    come_back(&mut cluster).await?;
    let reclaimed = cluster.ready("tiny", 1).await?.remove(0);
    assert!(reclaimed.pid == before.pid && reclaimed.token > before.token);
    cluster.delete("tiny").await?;
    cluster.end().await
}

/// An operator need not wait for its time to be over, which no test could.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn but_not_when_an_operator_ends_its_absence() -> anyhow::Result<()> {
    let mut cluster = cluster(Duration::from_secs(600)).await?;
    let before = cluster.deploy(cluster.spec("tiny", 1)).await?.remove(0);
    let (code, _, said) = cluster.drover(0, &["end-absence", "a"])?;
    assert!(code == Some(1) && said.contains("is not absent on purpose: it is connected"), "{code:?}: {said}");
    leave(&mut cluster).await?;
    let (code, shown, said) = cluster.drover(0, &["get", "nodes"])?;
    assert!(code == Some(0) && shown.contains("away") && shown.contains("means to be back until"), "{shown}{said}");
    let (code, out, said) = cluster.drover(0, &["end-absence", "a", "--reason", "a test"])?;
    assert!(code == Some(0) && out.contains("is waited for no longer"), "{out}{said}");
    claim_gone(&cluster).await?;
    come_back(&mut cluster).await?;
    let reclaimed = cluster.ready("tiny", 1).await?.remove(0);
    assert!(reclaimed.pid == before.pid && reclaimed.token > before.token, "the same server, claimed again");
    cluster.delete("tiny").await?;
    cluster.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn but_not_when_it_stays_away() -> anyhow::Result<()> {
    let mut cluster = cluster(TTL * 2).await?;
    cluster.deploy(cluster.spec("tiny", 1)).await?;
    leave(&mut cluster).await?;
    claim_gone(&cluster).await?;
    come_back(&mut cluster).await?;
    cluster.ready("tiny", 1).await?;
    cluster.delete("tiny").await?;
    cluster.end().await
}
