//! SIGSTOP of the coordinator that leads and serves sessions: sessions go on elsewhere with the same tokens, another one leads
//! within the lease's time, and when it goes on it changes nothing.

use anyhow::{Context as _, ensure};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    faults::Watched,
    programs::eventually,
};
use std::time::{Duration, Instant};

/// Time to live of the leader's lease; etcd ends leases up to a second late.
const LEADER_TTL: Duration = Duration::from_secs(5);
/// For a machine that has other work: the next leader looks once a second.
const SLACK: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_is_halted_is_replaced_and_changes_nothing_afterwards() -> anyhow::Result<()> {
    let mut fleet = Watched::new(Cluster::start(Plan { coordinators: 2, agents: 2, ..Plan::default() }).await?)?;
    fleet.cluster.deploy(fleet.cluster.spec("tiny", 4)).await?;
    let before = fleet.standing().await?;
    let leader = leader(&fleet.cluster)?;
    let other = 1 - leader;
    fleet.cluster.asked = other;
    let halted = fleet.cluster.coordinators[leader].running.take().context("it runs")?;
    halted.pause().await?;
    let begun = Instant::now();
    eventually("the other one leads", LEADER_TTL + SLACK, async || {
        let now = self::leader(&fleet.cluster)?;
        ensure!(now == other, "coordinator {now} leads");
        Ok(())
    })
    .await?;
    eprintln!("another one leads after {:.1} s", begun.elapsed().as_secs_f32());
    // The work of a leader, with claims of both nodes.
    fleet.cluster.deploy(fleet.cluster.spec("later", 2)).await?;
    for node in ["a", "b"] {
        eventually("its session is at the other one", SOON, async || {
            let record = fleet.cluster.etcd.ctl(&["get", &format!("/drover/sessions/{node}"), "--print-value-only"])?;
            ensure!(record.contains(&format!("coordinator-{other}")), "{node}: {record:?}");
            Ok(())
        })
        .await?;
        let events = fleet.cluster.events(&format!("node/{node}")).await?;
        let joined = events.iter().filter(|event| event.reason == "Joined").count();
        ensure!(joined == 1, "{node} has lost its session: {events:#?}");
    }
    let changed = fleet.judge.changes().len();
    halted.resume()?;
    fleet.cluster.coordinators[leader].running = Some(halted);
    eventually("the halted one is ready again", SOON, async || {
        let gateway = drover_tests::gateway::Gateway::new(&fleet.cluster.coordinators[leader].http);
        let (status, said) = gateway.get("/readyz").await?;
        ensure!(status == 200, "{said}");
        Ok(())
    })
    .await?;
    let source = format!("coordinator/coordinator-{leader}");
    let instances = |key: &str| ["instances/", "claims/", "taken/"].iter().any(|prefix| key.starts_with(prefix));
    let since = fleet.judge.changes().split_off(changed);
    ensure!(!since.iter().any(|change| instances(&change.key)), "{since:#?}");
    ensure!(self::leader(&fleet.cluster)? == other, "{source} leads again");
    fleet.stands("nothing was claimed anew", SOON, |now| before.iter().all(|(id, b)| now.get(id) == Some(b))).await?;
    let terms = fleet.judge.of("leader");
    ensure!(terms.iter().all(|term| term.deleted || term.version == 1), "a leader was written over another: {terms:?}");
    fleet.verdict()?;
    fleet.end(&["later", "tiny"]).await
}

/// Index of the coordinator that leads, as the store says.
fn leader(cluster: &Cluster) -> anyhow::Result<usize> {
    let record = cluster.etcd.ctl(&["get", "/drover/leader", "--print-value-only"])?;
    let found = (0..cluster.coordinators.len()).find(|n| record.contains(&format!("coordinator-{n}")));
    found.with_context(|| format!("nobody leads: {record:?}"))
}
