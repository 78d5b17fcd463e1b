//! The claim race: 100 sessions on distinct nodes claim one instance through two coordinators, and exactly one wins.
//!
//! The judge is a watch on etcd by etcdctl, which links none of the product: a claim that is written while one stands is a
//! second owner. Half of the nodes claim by the offer; the other half re-claim, where nothing but the comparison of the
//! claim's own key stands between two owners. Half of either claim by the call that takes several at once. With that
//! comparison taken out the judge must see it.

use anyhow::ensure;
use drover_proto::v1::ApplyDeploymentRequest;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    judge::{Claims, Judge},
    node::Node,
    programs::eventually,
};
use futures::future::{join_all, try_join_all};

const NODES: usize = 100;
const ROUNDS: usize = 50;

/// Runs the race; returns the winners of each round as the claimers were told, and the judge's verdict.
async fn race(nodes: usize, rounds: usize, environment: Vec<(String, String)>) -> anyhow::Result<(Vec<usize>, Claims)> {
    let plan = Plan {
        coordinators: 2,
        agents: 0,
        coordinator_toml: "offer_candidates = 200\noffer_deadline_ms = 60000\nsession_ttl_ms = 60000\n".to_owned(),
        coordinator_environment: environment,
        ..Plan::default()
    };
    let cluster = Cluster::start(plan).await?;
    let judge = Judge::start(&cluster.etcd.endpoints()[0])?;
    let mut members = try_join_all((0..nodes).map(|n| Node::join(&cluster, n))).await?;
    let mut operator = cluster.client(0).await?;
    let mut winners = Vec::new();
    for round in 0..rounds {
        let name = format!("race{round}");
        let spec = Some(cluster.spec(&name, 1));
        operator.apply_deployment(ApplyDeploymentRequest { spec, generation: 0 }).await?;
        // Everybody holds the offer before anybody claims.
        let offers = try_join_all(members.iter_mut().map(|m| m.offer(&name))).await?;
        let claims = members.iter_mut().zip(&offers).enumerate();
        let won = join_all(claims.map(|(n, (m, offer))| m.claim(offer, n % 4 >= 2, (n / 4) % 2 == 1))).await;
        winners.push(won.into_iter().collect::<anyhow::Result<Vec<bool>>>()?.into_iter().filter(|w| *w).count());
    }
    // The judge reads on its own: wait until it has seen every round.
    eventually("the judge has seen every claim", SOON, async || {
        let verdict = judge.claims();
        ensure!(verdict.written.len() == rounds, "{} of {rounds}", verdict.written.len());
        Ok(())
    })
    .await?;
    let verdict = judge.claims();
    drop(members);
    cluster.end().await?;
    Ok((winners, verdict))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_nodes_claim_one_instance_and_one_wins() -> anyhow::Result<()> {
    let (winners, verdict) = race(NODES, ROUNDS, vec![]).await?;
    assert_eq!(winners, vec![1; ROUNDS], "winners of each round, as the claimers were told");
    assert_eq!(verdict.second_owners, 0, "{verdict:?}");
    assert!(verdict.written.values().all(|n| *n == 1), "{verdict:?}");
    eprintln!(
        "{ROUNDS} rounds of {NODES} claimers: one winner each, {} claims seen by etcd's watch",
        verdict.written.len()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_comparison_of_the_claim_the_judge_sees_second_owners() -> anyhow::Result<()> {
    let mutant = vec![("DROVER_MUTANT".to_owned(), "claim-without-create-compare".to_owned())];
    let (winners, verdict) = race(20, 3, mutant).await?;
    assert!(verdict.second_owners > 0, "the rule was broken and nobody noticed: {verdict:?}");
    assert!(winners.iter().any(|w| *w > 1), "{winners:?}");
    Ok(())
}
