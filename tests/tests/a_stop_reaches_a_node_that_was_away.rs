//! What is stopped by hand while its node's agent is away is said to be so, and ends when the agent is back.

use anyhow::{Context as _, ensure};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    programs::{eventually, servers_with},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_reaches_a_node_that_was_away() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(Plan { coordinators: 1, agents: 2, ..Plan::default() }).await?;
    let instances = cluster.deploy(cluster.spec("tiny", 2)).await?;
    ensure!(instances[0].node != instances[1].node, "they are spread: {instances:?}");
    let away = instances.iter().find(|i| i.node == "b").context("none is on b")?;
    cluster.agents[1].running.take().context("the agent is down")?.kill()?;

    let (code, out, err) = cluster.drover(0, &["processes", "stop", "--name", "tiny", "--force", "-o", "json"])?;
    assert!(code == Some(1) && err.contains("b was left out"), "{out}{err}");
    let answer: serde_json::Value = serde_json::from_str(&out)?;
    assert_eq!(answer["unreachable"].as_array().map(Vec::len), Some(1), "{answer:#}");
    let results = answer["results"].as_array().context("no results")?;
    let of = |node: &str| results.iter().find(|r| r["process"]["node"] == node).context("no result");
    assert_eq!(of("b")?["action"], "PROCESS_ACTION_DRAINING", "{answer:#}");
    assert!(
        of("b")?["message"].as_str().is_some_and(|m| m.contains("b is away: it ends when that is back")),
        "{answer:#}"
    );
    eventually("only the server of the node that is away lives", SOON, async || {
        let left = servers_with(&cluster.mark());
        ensure!(left.len() == 1 && i64::from(left[0].pid) == away.pid, "{left:?}");
        Ok(())
    })
    .await?;

    cluster.start_agent(1)?;
    cluster.agent_ready(1).await?;
    cluster.ready("tiny", 0).await?;
    eventually("it has ended too", SOON, async || {
        ensure!(servers_with(&cluster.mark()).is_empty(), "it lives");
        Ok(())
    })
    .await?;
    cluster.delete("tiny").await?;
    cluster.end().await
}
