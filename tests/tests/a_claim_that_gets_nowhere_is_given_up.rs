//! Work that is claimed and gets nowhere does not wait for ever: the claim is given up, another node serves it, and who had
//! it is avoided for a while. An agent that claims and then does nothing; one whose servers get stuck while they load.

use anyhow::{Context as _, ensure};
use drover_proto::v1::{ApplyDeploymentRequest, DeploymentSpec, Event, InstanceState};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    node::Node,
    programs::{eventually, program, servers_with},
};

/// The shortest deadlines that a coordinator takes.
const QUICK: &str = "progress_deadline_ms = 10000\ngive_up_after_ms = 1000\n";

/// What an object's events say of a claim that was given up.
async fn given_up(cluster: &Cluster, object: &str) -> anyhow::Result<Event> {
    eventually("it is told that the claim was given up", SOON, async || {
        cluster.events(object).await?.into_iter().find(|e| e.reason == "GivenUp").context("no such event")
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_an_agent_that_does_nothing_after_its_claim() -> anyhow::Result<()> {
    let coordinator_toml = format!("{QUICK}offer_candidates = 1\n");
    let cluster = Cluster::start(Plan { coordinator_toml, ..Plan::default() }).await?;
    // It has the most room, so that it is asked first.
    let mut idle = Node::join(&cluster, 0).await?;
    cluster.connected(2).await?;
    let spec = Some(cluster.spec("tiny", 1));
    cluster.client(0).await?.apply_deployment(ApplyDeploymentRequest { spec, generation: 0 }).await?;
    let offer = idle.offer("tiny").await?;
    let id = offer.0.clone();
    let token = idle.claim_one(idle.item(&offer)).await?;

    let ready = cluster.ready("tiny", 1).await?;
    assert_eq!((ready[0].id.as_str(), ready[0].node.as_str()), (id.as_str(), "a"));
    assert!(ready[0].token > Some(token), "{ready:#?}");
    for object in [format!("instance/{id}"), "node/n000".to_owned()] {
        let told = given_up(&cluster, &object).await?;
        let said = |what: &str| told.message.contains(what);
        assert!(said(&format!("claim {token} of n000, ")) && said(" s old"), "{told:?}");
        assert!(said("claimed, without progress for 1") && said("offered to a; n000 is avoided for it"), "{told:?}");
    }
    // What it says under its token is nothing, and it is not asked again.
    assert!(
        !idle.recorded(&id, token, InstanceState::Ready).await?,
        "a report under the token of a claim that is gone"
    );
    assert!(!idle.claim(&offer, true, false).await?, "another owns it");
    assert!(!idle.is_offered());
    drop(idle);
    cluster.delete("tiny").await?;
    cluster.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_an_agent_whose_server_is_stuck_while_it_loads() -> anyhow::Result<()> {
    let stuck = program("examples/misbehaving-server");
    ensure!(stuck.is_file(), "{} is not built: run tests/run", stuck.display());
    let plan = Plan {
        agents: 2,
        coordinator_toml: QUICK.to_owned(),
        agent_toml: "[llama_server_environment]\nMISBEHAVE = 'stuck'\n".to_owned(),
        llama_server_of: Some((0, stuck)),
        ..Plan::default()
    };
    let cluster = Cluster::start(plan).await?;
    // One on each, as they are spread.
    let quick = DeploymentSpec { load_timeout_ms: Some(1000), stop_grace_ms: Some(200), ..cluster.spec("tiny", 2) };
    let ready = cluster.deploy(quick).await?;
    assert!(ready.iter().all(|i| i.node == "b"), "{ready:#?}");
    let told = given_up(&cluster, "node/a").await?;
    let id = told.message.split(':').next().unwrap_or_default().to_owned();
    assert!(ready.iter().any(|i| i.id == id), "{told:?}");
    assert!(told.message.contains("not ready for ") && told.message.contains("no progress for 1 s"), "{told:?}");
    assert!(told.message.contains("offered to b; a is avoided for it for 60 s"), "{told:?}");
    eventually("nothing of it is left on a", SOON, async || {
        let servers = servers_with(&cluster.mark());
        ensure!(servers.len() == 2, "{servers:#?}");
        Ok(())
    })
    .await?;
    cluster.delete("tiny").await?;
    cluster.end().await
}
