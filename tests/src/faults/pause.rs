//! An agent that is halted (SIGSTOP) for longer than its session lives: what others could take over is taken over and its old
//! server ends only then; all others go on, and are claimed again in their place.

use super::{Standing, Watched};
use crate::{
    cluster::{Cluster, Plan, SOON},
    programs::eventually,
};
use anyhow::ensure;
use drover_proto::v1::{DeploymentSpec, InstanceState};
use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};
use tokio::time::sleep;

const TTL: Duration = Duration::from_secs(10);
/// How late etcd ends a lease, and a machine with other work sees it.
const SLACK: Duration = Duration::from_secs(3);

/// Runs it: shorter than the session's time first, then for so long.
///
/// # Errors
/// Says what was not as it must be.
pub async fn run(lasts: Duration) -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan { agents: 2, ..Plan::default() }).await?;
    let fleet = Watched::new(cluster)?;
    fleet.cluster.deploy(fleet.cluster.spec("roaming", 4)).await?;
    fleet.cluster.deploy(pinned(&fleet.cluster)).await?;
    let before = fleet.standing().await?;

    // For a moment: nothing changes at all.
    fleet.cluster.pause_agent(0).await?;
    sleep(TTL / 2).await;
    fleet.cluster.resume_agent(0)?;
    sleep(TTL / 2).await;
    fleet.stands("nothing has changed", SOON, |now| *now == before).await?;

    fleet.cluster.pause_agent(0).await?;
    let begun = Instant::now();
    let of = |node: &str, name: &str| -> BTreeMap<String, Standing> {
        let owned = before.iter().filter(|(id, s)| s.node == node && id.starts_with(name));
        owned.map(|(id, s)| (id.clone(), s.clone())).collect()
    };
    let (moving, pinned, others) = (of("a", "roaming-"), of("a", "pinned-"), of("b", "roaming-"));
    ensure!(moving.len() == 2 && pinned.len() == 2 && others.len() == 2, "{before:#?}");
    eventually("what others can take over is taken over", TTL * 2 + SLACK, async || {
        let now = fleet.cluster.instances().await?;
        for id in moving.keys() {
            let taken = now.iter().any(|i| i.id == *id && i.node == "b" && i.state() == InstanceState::Ready);
            ensure!(taken, "{now:#?}");
        }
        Ok(())
    })
    .await?;
    eprintln!("taken over after {:.1} s", begun.elapsed().as_secs_f32());
    for (id, standing) in &before {
        let lives = fleet.servers.living().iter().any(|s| i64::from(s.pid) == standing.pid);
        ensure!(lives, "the server of {id}, pid {}, has ended while its agent was halted", standing.pid);
    }
    sleep(lasts.saturating_sub(begun.elapsed())).await;
    fleet.cluster.resume_agent(0)?;
    let after = fleet
        .stands("what is pinned is claimed again in its place", TTL + SOON, |now| {
            now.len() == before.len()
                && pinned.iter().all(|(id, b)| now.get(id).is_some_and(|n| n.pid == b.pid && n.token > b.token))
        })
        .await?;
    ensure!(others.iter().all(|(id, b)| after[id] == *b), "{after:#?}, before: {before:#?}");
    ensure!(moving.iter().all(|(id, b)| after[id].node == "b" && after[id].token > b.token), "{after:#?}");
    eventually("what was taken over has ended at its old place", SOON, async || {
        let living = fleet.servers.living();
        ensure!(living.len() == before.len(), "{living:?}");
        Ok(())
    })
    .await?;
    fleet.verdict()?;
    fleet.end(&["pinned", "roaming"]).await
}

/// What can run on node a alone.
fn pinned(cluster: &Cluster) -> DeploymentSpec {
    let node_labels = HashMap::from([("host".to_owned(), "a".to_owned())]);
    DeploymentSpec { node_labels, ..cluster.spec("pinned", 2) }
}
