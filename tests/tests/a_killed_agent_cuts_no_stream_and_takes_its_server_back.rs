//! SIGKILL of the agent while a stream runs: the client gets the whole text, and the server keeps its pid and its token.

use anyhow::ensure;
use drover_proto::v1::WatchEventsRequest;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    gateway::Gateway,
    programs::eventually,
};
use serde_json::json;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_agent_cuts_no_stream_and_takes_its_server_back() -> anyhow::Result<()> {
    // The agent is back only after the stream; on a busy machine that takes longer than a session lives by default.
    let plan = Plan { coordinator_toml: "session_ttl_ms = 120000\n".to_owned(), ..Plan::default() };
    let mut cluster = Cluster::start(plan).await?;
    let mut spec = cluster.spec("tiny", 1);
    spec.context_tokens = Some(8192);
    let before = cluster.deploy(spec).await?.remove(0);
    let gateway = Gateway::new(&cluster.coordinators[0].http);
    let request = json!({
        "model": "tiny", "stream": true, "max_tokens": 4000, "temperature": 0, "seed": 1,
        "messages": [{ "role": "user", "content": "Tell a long story." }],
    });
    let undisturbed = gateway.stream_chat(&request, |_| {}).await?;
    ensure!(undisturbed.len() >= 4000, "{} characters are too few to disturb", undisturbed.len());

    let mut killed_at = None;
    let mut agent = cluster.agents[0].running.take();
    let disturbed = gateway
        .stream_chat(&request, |text| {
            if text.len() > 200
                && let Some(mut agent) = agent.take()
            {
                agent.kill().expect("the agent is killed");
                killed_at = Some(text.len());
            }
        })
        .await?;
    let killed_at = killed_at.expect("the agent was killed while the stream ran");
    assert!(killed_at < 3000, "killed after {killed_at} characters: too late to matter");
    assert_eq!(disturbed, undisturbed);

    cluster.start_agent(0)?;
    cluster.agent_ready(0).await?;
    let mut client = cluster.client(0).await?;
    eventually("the session was resumed", SOON, async || {
        let request = WatchEventsRequest { object: "node/a".to_owned(), after_revision: 0, follow: false };
        let mut events = client.watch_events(request).await?.into_inner();
        while let Some(answer) = events.message().await? {
            if answer.event.is_some_and(|e| e.reason == "Resumed") {
                return Ok(());
            }
        }
        anyhow::bail!("no event says so")
    })
    .await?;
    let after = cluster.ready("tiny", 1).await?.remove(0);
    assert_eq!((&after.id, after.pid, after.token), (&before.id, before.pid, before.token));
    assert_eq!(gateway.stream_chat(&request, |_| {}).await?, undisturbed);
    cluster.delete("tiny").await?;
    cluster.end().await
}
