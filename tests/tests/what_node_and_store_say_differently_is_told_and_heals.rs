//! The store is edited behind everybody's back, and so is an agent's state: the next comparison tells both sides, and what is
//! right comes back without a server being touched.

use anyhow::{Context as _, ensure};
use drover_proto::v1::InstanceState;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    faults::Watched,
    programs::eventually,
};
use std::time::Duration;

/// A comparison comes twice a minute, and soon after one that found something.
const COMPARED: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_node_and_store_say_differently_is_told_and_heals() -> anyhow::Result<()> {
    let fleet = Watched::new(Cluster::start(Plan::default()).await?)?;
    fleet.cluster.deploy(fleet.cluster.spec("tiny", 3)).await?;
    let before = fleet.standing().await?;
    let ids: Vec<String> = before.keys().cloned().collect();
    let (lost, wrong, unclaimed) = (&ids[0], &ids[1], &ids[2]);

    // Its state is lost; another's is that of somebody else; a run is on record that nobody has; a claim is gone.
    let key = |kind: &str, id: &str| format!("/drover/{kind}/{id}");
    fleet.cluster.etcd.ctl(&["del", &key("status", lost)])?;
    fleet.cluster.etcd.ctl(&["del", &key("status", wrong)])?;
    let record = fleet.cluster.etcd.keys()?.into_iter().find(|k| k.starts_with(&format!("runs/{lost}/")));
    let record = record.context("a run is on record")?;
    fleet.cluster.etcd.ctl(&["del", &key("claims", unclaimed)])?;

    for (id, kind) in [(lost, "Status"), (wrong, "Status")] {
        eventually(&format!("{id}: {kind} is told with both sides"), COMPARED, async || {
            let events = fleet.cluster.events(&format!("instance/{id}")).await?;
            let told = events.iter().find(|e| e.reason == "Differs" && e.message.contains(kind));
            let told = told.with_context(|| format!("{events:#?}"))?;
            let pid = format!("pid {}", before[id].pid);
            ensure!(told.message.contains(&pid) && told.message.contains("the store: no state"), "{told:?}");
            ensure!(events.iter().any(|e| e.reason == "Agrees"), "{events:#?}");
            Ok(())
        })
        .await
        .with_context(|| fleet.cluster.logs())?;
    }
    let after = fleet
        .stands("all is as it was, and the claim that was lost is made again", SOON, |now| {
            now.len() == 3
                && [lost, wrong].iter().all(|id| now.get(*id) == before.get(*id))
                && now
                    .get(unclaimed)
                    .is_some_and(|n| n.pid == before[unclaimed].pid && n.token > before[unclaimed].token)
        })
        .await?;
    ensure!(fleet.cluster.etcd.keys()?.contains(&record), "the record of a run that lives was removed");
    let instances = fleet.cluster.instances().await?;
    ensure!(instances.iter().all(|i| i.state() == InstanceState::Ready), "{instances:#?}");
    ensure!(after.len() == 3);
    fleet.servers.verdict()?;
    // The claim that was taken away by hand is what no part of the fleet does.
    let broken = fleet.broken();
    let named = format!("(claims/{unclaimed})");
    ensure!(matches!(&broken[..], [one] if one.starts_with("ClaimVanished") && one.contains(&named)), "{broken:#?}");
    fleet.end(&["tiny"]).await
}
