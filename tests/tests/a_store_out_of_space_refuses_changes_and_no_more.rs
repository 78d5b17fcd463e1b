//! etcd is out of space for longer than any lease lives: requests are answered, no session ends and no server moves; a change is
//! refused with an error that says why, and the metric for the alarm is up. Freed and disarmed, all goes on by itself.

use anyhow::{Context as _, ensure};
use drover_proto::v1::ApplyDeploymentRequest;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    faults::Watched,
    gateway::Gateway,
    load::ask,
    programs::eventually,
};
use std::time::Duration;
use tokio::time::{Instant, sleep};
use tonic::Code;

const TTL: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn and_goes_on_by_itself() -> anyhow::Result<()> {
    let plan = Plan {
        agents: 2,
        etcd_arguments: vec!["--quota-backend-bytes", "4194304"],
        coordinator_toml: format!("session_ttl_ms = {}\nheartbeat_interval_ms = 1500\n", TTL.as_millis()),
        ..Plan::default()
    };
    let fleet = Watched::new(Cluster::start(plan).await?)?;
    fleet.cluster.deploy(fleet.cluster.spec("tiny", 2)).await?;
    let before = fleet.standing().await?;
    let gateway = Gateway::new(&fleet.cluster.coordinators[0].http);
    let out_of_space = async || {
        let (_, page) = gateway.text("/metrics").await?;
        let line = page.lines().find(|line| line.starts_with("drover_store_out_of_space "));
        anyhow::Ok(line.context("no such metric")?.ends_with(" 1"))
    };
    ensure!(!out_of_space().await?);

    fill(&fleet.cluster)?;
    eventually("the alarm", SOON, async || {
        ensure!(out_of_space().await?, "the metric is down");
        Ok(())
    })
    .await?;
    let begun = Instant::now();
    let apply = ApplyDeploymentRequest { spec: Some(fleet.cluster.spec("later", 1)), generation: 0 };
    while begun.elapsed() < TTL * 2 {
        let refused = fleet.cluster.client(0).await?.apply_deployment(apply.clone()).await;
        let refused = refused.err().context("a change was taken")?;
        ensure!(refused.code() == Code::ResourceExhausted && refused.message().contains("out of space"), "{refused:?}");
        ask(&gateway, "tiny").await.context("serving goes on")?;
        sleep(Duration::from_millis(500)).await;
    }

    let etcd = &fleet.cluster.etcd;
    etcd.ctl(&["del", "/filler/", "--prefix"])?;
    let status = etcd.ctl(&["endpoint", "status", "--write-out=fields"])?;
    let revision = status.lines().find_map(|line| line.strip_prefix("\"Revision\" : ")).context(status.clone())?;
    etcd.ctl(&["compact", revision.trim()])?;
    etcd.ctl(&["defrag"])?;
    etcd.ctl(&["alarm", "disarm"])?;
    eventually("the end of the alarm", SOON, async || {
        ensure!(!out_of_space().await?, "the metric is up");
        Ok(())
    })
    .await?;
    fleet.cluster.deploy(fleet.cluster.spec("later", 1)).await?;
    fleet.stands("nothing was moved", SOON, |now| before.iter().all(|(id, b)| now.get(id) == Some(b))).await?;
    let told = fleet.cluster.events("fleet").await?;
    ensure!(told.iter().any(|event| event.reason == "StoreHasSpace"), "{told:#?}");
    for node in ["node/a", "node/b"] {
        let events = fleet.cluster.events(node).await?;
        ensure!(events.iter().filter(|e| e.reason == "Joined").count() == 1, "{node} lost its session: {events:#?}");
    }
    fleet.verdict()?;
    fleet.end(&["later", "tiny"]).await
}

/// Writes until etcd refuses it.
fn fill(cluster: &Cluster) -> anyhow::Result<()> {
    let value = "x".repeat(100 << 10);
    for n in 0..400 {
        if let Err(refused) = cluster.etcd.ctl(&["put", &format!("/filler/{n}"), &value]) {
            ensure!(format!("{refused:#}").contains("database space exceeded"), "{refused:#}");
            return Ok(());
        }
    }
    anyhow::bail!("etcd took 40 MiB")
}
