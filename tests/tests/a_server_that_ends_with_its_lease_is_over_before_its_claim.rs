//! `on_lease_lost = "stop"` with every part real: the agent is halted (SIGSTOP), and the server that is to end with its lease
//! has ended before etcd takes the claim; the one beside it, which is to be kept, lives on and is claimed again.

use anyhow::{Context as _, ensure};
use drover_proto::v1::{DeploymentSpec, OnLeaseLost};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    faults::Watched,
    programs::eventually,
};
use std::{path::Path, time::UNIX_EPOCH};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_ends_with_its_lease_is_over_before_its_claim() -> anyhow::Result<()> {
    let coordinator_toml = "session_ttl_ms = 6000\nheartbeat_interval_ms = 1000\n".to_owned();
    let fleet = Watched::new(Cluster::start(Plan { coordinators: 2, coordinator_toml, ..Plan::default() }).await?)?;
    let ends = DeploymentSpec { on_lease_lost: OnLeaseLost::Stop.into(), ..fleet.cluster.spec("ends", 1) };
    let ends = fleet.cluster.deploy(ends).await?.remove(0);
    let kept = fleet.cluster.deploy(fleet.cluster.spec("kept", 1)).await?.remove(0);
    // It is told of as what it is: a server that the test has brought to its end.
    fleet.servers.end_on_purpose(u32::try_from(ends.pid)?);

    fleet.cluster.pause_agent(0).await?;
    let process = format!("/proc/{}", ends.pid);
    let over_ms = eventually("the server ends with its lease", SOON, async || {
        ensure!(!Path::new(&process).exists(), "it lives");
        Ok(i64::try_from(UNIX_EPOCH.elapsed()?.as_millis())?)
    })
    .await?;
    let claim = format!("claims/{}", ends.id);
    let gone = eventually("its claim goes with the lease", SOON, async || {
        fleet.judge.of(&claim).into_iter().find(|change| change.deleted).context("it stands")
    })
    .await?;
    ensure!(over_ms < gone.at_ms, "it was over at {over_ms}, its claim was gone at {}", gone.at_ms);
    ensure!(Path::new(&format!("/proc/{}", kept.pid)).exists(), "what is to be kept has ended");

    fleet.cluster.resume_agent(0)?;
    fleet
        .stands("one is started anew, the other claimed again in its place", SOON, |now| {
            let (new, same) = (now.get(&ends.id), now.get(&kept.id));
            new.is_some_and(|new| new.pid != ends.pid && Some(new.token) > ends.token)
                && same.is_some_and(|same| same.pid == kept.pid && Some(same.token) > kept.token)
        })
        .await?;
    fleet.verdict()?;
    fleet.end(&["ends", "kept"]).await
}
