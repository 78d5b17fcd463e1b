//! SIGTERM of the agent: servers and proxy go on, and come back to it, within the session's time and after it.

use drover_proto::v1::InstanceState;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    gateway::Gateway,
    programs::{eventually, servers_with},
};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn within_the_sessions_time_and_after_it() -> anyhow::Result<()> {
    let plan = Plan {
        coordinator_toml: "session_ttl_ms = 4000\nheartbeat_interval_ms = 1000\n".to_owned(),
        ..Plan::default()
    };
    let mut cluster = Cluster::start(plan).await?;
    let before = cluster.deploy(cluster.spec("tiny", 1)).await?.remove(0);
    let gateway = Gateway::new(&cluster.coordinators[0].http);
    let request = json!({ "model": "tiny", "prompt": "x", "max_tokens": 4 });

    let mut agent = cluster.agents[0].running.take().expect("it runs");
    let status = agent.terminate(SOON).await?;
    assert!(status.success(), "{status}");
    assert_eq!(servers_with(&cluster.mark()).len(), 1, "the server goes on");
    assert_eq!(gateway.post("/v1/completions", &request).await?.0, 200, "and answers");
    cluster.start_agent(0)?;
    cluster.agent_ready(0).await?;
    let resumed = cluster.ready("tiny", 1).await?.remove(0);
    assert_eq!((resumed.pid, resumed.token), (before.pid, before.token), "same session, same token");

    // Now longer than the lease: the claim is gone, the server is not.
    let mut agent = cluster.agents[0].running.take().expect("it runs");
    agent.terminate(SOON).await?;
    eventually("the claim is gone with its lease", SOON, async || {
        let instance = cluster.deployment("tiny").await?;
        anyhow::ensure!(instance.claimed_replicas == 0, "{instance:?}");
        Ok(())
    })
    .await?;
    assert_eq!(servers_with(&cluster.mark()).len(), 1);
    cluster.start_agent(0)?;
    cluster.agent_ready(0).await?;
    let reclaimed = cluster.ready("tiny", 1).await?.remove(0);
    assert_eq!((&reclaimed.id, reclaimed.pid), (&before.id, before.pid), "the same server, re-claimed");
    assert!(reclaimed.token > before.token, "under a higher token");
    assert_eq!(reclaimed.state(), InstanceState::Ready);
    assert_eq!(gateway.post("/v1/completions", &request).await?.0, 200);
    cluster.delete("tiny").await?;
    cluster.end().await
}
