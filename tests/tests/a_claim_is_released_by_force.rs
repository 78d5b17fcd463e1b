//! An operator takes a claim from the node that holds it: what serves goes on until another one is ready in its place, the
//! error names the holder when it is not the one that was meant, and who did it is recorded.

use anyhow::{Context as _, ensure};
use drover_proto::v1::InstanceState;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    judge::Judge,
    programs::{eventually, servers_with},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_is_released_by_force() -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan { agents: 2, ..Plan::default() }).await?;
    let judge = Judge::start(&cluster.etcd.endpoints()[0])?;
    let before = cluster.deploy(cluster.spec("tiny", 1)).await?.remove(0);
    let token = before.token.context("a token")?;

    let (code, _, said) = cluster.drover(0, &["release", &before.id, "--token", "1.1"])?;
    let holder = format!("is {token} of {}, held for ", before.node);
    assert!(code == Some(1) && said.contains(&holder) && said.contains("look at it again"), "{said}");

    let token_text = token.to_string();
    let words = ["release", &before.id, "--token", &token_text, "--reason", "a test", "--output", "json"];
    let (code, out, said) = cluster.drover(0, &words)?;
    ensure!(code == Some(0), "{said}");
    let told: serde_json::Value = serde_json::from_str(&out)?;
    assert_eq!((told["node"].as_str(), told["state"].as_str()), (Some(&*before.node), Some("INSTANCE_STATE_READY")));

    let after = eventually("the other node serves it", SOON, async || {
        let instance = cluster.instances().await?.remove(0);
        // All the while there is an answer: by the old server, without an owner, or by the new one.
        let serves = instance.state() == InstanceState::Ready || instance.unowned_node == before.node;
        assert!(serves, "{instance:?}");
        ensure!(instance.state() == InstanceState::Ready && instance.node != before.node, "{instance:?}");
        Ok(instance)
    })
    .await?;
    assert!(after.id == before.id && after.token > before.token && after.pid != before.pid, "{after:?}");
    eventually("the old server has ended", SOON, async || {
        let servers = servers_with(&cluster.mark());
        ensure!(servers.len() == 1, "{servers:#?}");
        Ok(())
    })
    .await?;
    let events = cluster.events(&format!("instance/{}", before.id)).await?;
    let released = events.iter().find(|e| e.reason == "ClaimReleased").context("it is recorded")?;
    let (holder, because) = (format!("claim {token} of {}", before.node), ", because: a test; it was ready");
    assert!(
        released.message.contains(&holder) && released.message.contains("released by an operator at"),
        "{released:?}"
    );
    assert!(released.message.contains(because), "{released:?}");
    let verdict = judge.claims();
    assert_eq!(verdict.second_owners, 0, "{verdict:?}");
    cluster.delete("tiny").await?;
    cluster.end().await
}
