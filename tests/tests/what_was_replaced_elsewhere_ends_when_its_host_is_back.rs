//! A host is lost and its instance is claimed elsewhere; when the host is back, its old server ends and its room is free.

use drover_proto::v1::ListNodesRequest;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    gateway::Gateway,
    programs::{eventually, servers_with},
};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_replaced_elsewhere_ends_when_its_host_is_back() -> anyhow::Result<()> {
    let plan = Plan {
        agents: 2,
        coordinator_toml: "session_ttl_ms = 3000\nheartbeat_interval_ms = 500\n".to_owned(),
        ..Plan::default()
    };
    let mut cluster = Cluster::start(plan).await?;
    let before = cluster.deploy(cluster.spec("tiny", 1)).await?.remove(0);
    let lost = cluster.agents.iter().position(|a| a.node == before.node).expect("one of the agents owns it");
    cluster.agents[lost].running.take().expect("it runs").kill()?;
    let after = eventually("the instance is claimed by the other node", SOON, async || {
        let now = cluster.ready("tiny", 1).await?.remove(0);
        anyhow::ensure!(now.node != before.node, "{now:?}");
        Ok(now)
    })
    .await?;
    assert!(after.id == before.id && after.token > before.token, "{after:?}");
    assert_eq!(servers_with(&cluster.mark()).len(), 2, "the lost host's server goes on for now");

    // Whether it runs twice only its host can say, which nobody can ask now.
    let (code, _, told) = cluster.drover(0, &["check", "duplicates"])?;
    assert!(code == Some(1) && told.contains(&format!("not looked at: {}", before.node)), "{code:?}: {told}");

    cluster.start_agent(lost)?;
    cluster.agent_ready(lost).await?;
    eventually("the superseded server has ended", SOON, async || {
        let servers = servers_with(&cluster.mark());
        anyhow::ensure!(servers.len() == 1 && i64::from(servers[0].pid) == after.pid, "{servers:?}");
        Ok(())
    })
    .await?;
    let (code, _, told) = cluster.drover(0, &["check", "duplicates"])?;
    assert!(code == Some(0) && told.contains("no instance has more than one"), "{code:?}: {told}");
    let mut client = cluster.client(0).await?;
    eventually("its room is free again", SOON, async || {
        let nodes = client.list_nodes(ListNodesRequest::default()).await?.into_inner().nodes;
        let node = nodes.iter().find(|n| n.name == before.node).expect("it is known");
        anyhow::ensure!(node.connected && node.reserved_bytes == 0, "{node:?}");
        Ok(())
    })
    .await?;
    let now = cluster.ready("tiny", 1).await?.remove(0);
    assert_eq!((now.pid, now.token), (after.pid, after.token), "the new owner was left alone");
    let gateway = Gateway::new(&cluster.coordinators[0].http);
    let request = json!({ "model": "tiny", "prompt": "x", "max_tokens": 4 });
    assert_eq!(gateway.post("/v1/completions", &request).await?.0, 200);
    cluster.delete("tiny").await?;
    cluster.end().await
}
