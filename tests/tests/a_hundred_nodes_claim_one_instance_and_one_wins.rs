//! The claim race: 100 sessions on distinct nodes claim one instance through two coordinators, and exactly one wins.
//!
//! The judge is a watch on etcd by etcdctl, which links none of the product: a claim that is written while one stands is a
//! second owner. Half of the nodes claim by the offer; the other half re-claim, where nothing but the comparison of the
//! claim's own key stands between two owners. Half of either claim by the call that takes several at once. With that
//! comparison taken out the judge must see it.

use anyhow::{Context as _, bail, ensure};
use drover_proto::{
    status,
    transport::Connection,
    v1::{
        ApplyDeploymentRequest, Capacity, ClaimItem, ClaimManyRequest, ClaimRequest, Heartbeat, Hello, ModelFile,
        ModelInventory, RunSet, SessionRequest, Token, node_service_client::NodeServiceClient, session_request,
        session_response::Message,
    },
};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    judge::{Claims, Judge},
    programs::eventually,
};
use futures::future::{join_all, try_join_all};
use std::time::Duration;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;

const NODES: usize = 100;
const ROUNDS: usize = 50;

/// One node: a real session, claims by hand.
struct Node {
    name: String,
    client: NodeServiceClient<Connection>,
    session_id: String,
    session_revision: i64,
    /// (instance, revision) of each offer that comes.
    offers: mpsc::Receiver<(String, i64)>,
}

impl Node {
    async fn join(cluster: &Cluster, n: usize) -> anyhow::Result<Self> {
        let name = format!("n{n:03}");
        let mut client = NodeServiceClient::new(cluster.connect(n % 2, Some(&name)).await?);
        let (send, requests) = mpsc::channel(16);
        let models = ModelInventory {
            roots: vec!["/models".to_owned()],
            files: vec![ModelFile { path: "/models/tiny.gguf".to_owned(), size_bytes: 1 }],
            truncated: false,
        };
        let hello = Hello {
            protocol_min: 1,
            protocol_max: 1,
            agent_version: "test".to_owned(),
            machine_id: format!("machine-{n}"),
            boot_id: "boot".to_owned(),
            capacity: Some(Capacity { memory_bytes: 1 << 40, cpus: 1, gpus: vec![] }),
            models: Some(models),
            ..Hello::default()
        };
        send.send(SessionRequest { message: Some(session_request::Message::Hello(hello)) }).await?;
        let mut answers = client.session(ReceiverStream::new(requests)).await?.into_inner();
        let Some(Message::Welcome(welcome)) = answers.message().await?.and_then(|m| m.message) else {
            bail!("{name} was not welcomed")
        };
        let inventory = session_request::Message::Runs(RunSet { reconciled: true, ..RunSet::default() });
        send.send(SessionRequest { message: Some(inventory) }).await?;
        let (offered, offers) = mpsc::channel(256);
        let interval = Duration::from_millis(u64::try_from(welcome.heartbeat_interval_ms)?);
        tokio::spawn(async move {
            let mut beat = tokio::time::interval(interval);
            for sequence in 1.. {
                beat.tick().await;
                let message = Some(session_request::Message::Heartbeat(Heartbeat { sequence }));
                if send.send(SessionRequest { message }).await.is_err() {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            while let Ok(Some(answer)) = answers.message().await {
                if let Some(Message::Offer(offer)) = answer.message
                    && offered.send((offer.instance, offer.offer_revision)).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(Self { name, client, session_id: welcome.session_id, session_revision: welcome.session_revision, offers })
    }

    /// Waits for the offer of an instance of `deployment`.
    async fn offer(&mut self, deployment: &str) -> anyhow::Result<(String, i64)> {
        let wanted = async {
            while let Some(offer) = self.offers.recv().await {
                if offer.0.starts_with(&format!("{deployment}-")) {
                    return Ok(offer);
                }
            }
            bail!("the session of {} has ended", self.name)
        };
        timeout(SOON, wanted).await.with_context(|| format!("no offer of {deployment} came to {}", self.name))?
    }

    /// Claims, alone or by the call that takes several; true when it won. Any refusal but a lost race is an error.
    async fn claim(&mut self, instance: &str, offer_revision: i64, again: bool, many: bool) -> anyhow::Result<bool> {
        let item = ClaimItem {
            instance: instance.to_owned(),
            offer_revision: if again { 0 } else { offer_revision },
            nonce: format!("{}-{instance}", self.name),
            memory_bytes: 1,
            recorded_token: again.then_some(Token { generation: 1, revision: 1 }),
            ..ClaimItem::default()
        };
        let (session_id, session_revision) = (self.session_id.clone(), self.session_revision);
        let outcome = if many {
            let request = ClaimManyRequest { session_id, session_revision, halt_generation: 0, claims: vec![item] };
            let answer = self.client.claim_many(request).await?.into_inner();
            let result = answer.results.first().context("no result")?;
            if result.token.is_some() { Ok(answer.session_revision) } else { Err(result.reason.clone()) }
        } else {
            let request = ClaimRequest {
                session_id,
                session_revision,
                instance: item.instance,
                offer_revision: item.offer_revision,
                nonce: item.nonce,
                memory_bytes: item.memory_bytes,
                recorded_token: item.recorded_token,
                halt_generation: 0,
            };
            let answer = self.client.claim(request).await;
            answer.map(|a| a.into_inner().session_revision).map_err(|e| status::reason_of(&e).unwrap_or(e.to_string()))
        };
        match outcome {
            Ok(revision) => {
                self.session_revision = revision;
                Ok(true)
            }
            Err(why) => {
                let lost = [status::reason::ALREADY_CLAIMED, status::reason::OFFER_GONE].contains(&why.as_str());
                ensure!(lost, "{}: {why}", self.name);
                Ok(false)
            }
        }
    }
}

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
        let won =
            join_all(claims.map(|(n, (m, (id, revision)))| m.claim(id, *revision, n % 4 >= 2, (n / 4) % 2 == 1))).await;
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
