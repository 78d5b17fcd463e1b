//! `scale` and `delete` let a running stream finish, then stop the server; with it go its keys.

use drover_proto::v1::ScaleDeploymentRequest;
use drover_tests::{
    cluster::{Cluster, Plan},
    gateway::Gateway,
    programs::servers_with,
};
use serde_json::json;

/// All keys of the store, without the bounded rings of events that outlive a deployment.
fn keys(cluster: &Cluster) -> Vec<String> {
    let outlives = |k: &String| k.starts_with("events/fleet/") || k.starts_with("events/node/");
    cluster.etcd.keys().unwrap().into_iter().filter(|k| !outlives(k)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scaling_down_and_deleting_drain_first() -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan { agents: 2, ..Plan::default() }).await?;
    let base = keys(&cluster);
    let mut spec = cluster.spec("tiny", 3);
    spec.context_tokens = Some(8192);
    cluster.deploy(spec).await?;
    let mut client = cluster.client(0).await?;
    let scale = |replicas| ScaleDeploymentRequest { name: "tiny".to_owned(), replicas: Some(replicas), generation: 0 };
    client.scale_deployment(scale(1)).await?;
    cluster.ready("tiny", 1).await?;
    assert_eq!(servers_with(&cluster.mark()).len(), 1);

    let gateway = Gateway::new(&cluster.coordinators[0].http);
    let request = json!({
        "model": "tiny", "stream": true, "max_tokens": 6000, "temperature": 0, "seed": 1,
        "messages": [{ "role": "user", "content": "Tell a long story." }],
    });
    let (begun, beginning) = tokio::sync::oneshot::channel();
    let stream = tokio::spawn(async move {
        let mut begun = Some(begun);
        gateway
            .stream_chat(&request, |_| {
                if let Some(begun) = begun.take() {
                    let _ = begun.send(());
                }
            })
            .await
    });
    beginning.await?;
    cluster.delete("tiny").await?;
    let text = stream.await??;
    assert!(text.len() >= 6000, "the stream was cut after {} characters", text.len());
    assert_eq!(servers_with(&cluster.mark()), []);
    assert_eq!(keys(&cluster), base, "the store is as before");
    cluster.end().await
}
