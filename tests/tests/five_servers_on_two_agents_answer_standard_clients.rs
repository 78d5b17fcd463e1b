//! Two coordinators, two agents and five llama-servers answer the openai package and a generated Python client.

use drover_proto::v1::DeploymentSpec;
use drover_tests::cluster::{Cluster, Plan};
use std::{collections::BTreeSet, path::Path, process::Command};

async fn python(script: &str, arguments: &[&str]) {
    let python = std::env::var("DROVER_TEST_PYTHON").expect("DROVER_TEST_PYTHON is set by tests/run");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python").join(script);
    let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
    let output = tokio::task::spawn_blocking(move || Command::new(python).arg(script).args(arguments).output());
    let output = output.await.unwrap().unwrap();
    let text = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    assert!(output.status.success(), "{text}");
    eprintln!("{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_servers_on_two_agents_answer_standard_clients() -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan { coordinators: 2, agents: 2, ..Plan::default() }).await?;
    let chat = cluster.deploy(cluster.spec("chat", 4)).await?;
    let vectors = DeploymentSpec {
        model: "vectors".to_owned(),
        embeddings: true,
        arguments: vec!["--pooling".to_owned(), "mean".to_owned()],
        ..cluster.spec("embed", 1)
    };
    let embed = cluster.deploy(vectors).await?;
    let nodes: BTreeSet<_> = chat.iter().map(|i| i.node.as_str()).collect();
    assert_eq!(nodes, BTreeSet::from(["a", "b"]), "both agents serve");
    assert_eq!(chat.len() + embed.len(), 5);
    assert_eq!(drover_tests::programs::servers_with(&cluster.mark()).len(), 5);

    let secret = cluster.folder().join("secret");
    let protos = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto");
    // Each client through another coordinator: both gateways and both APIs serve the whole fleet.
    for coordinator in &cluster.coordinators {
        python("openai_client.py", &[&format!("http://{}/v1", coordinator.http), "chat", "vectors"]).await;
    }
    python("fleet_client.py", &[protos.to_str().unwrap(), &cluster.coordinators[1].grpc, secret.to_str().unwrap()])
        .await;

    cluster.delete("chat").await?;
    cluster.delete("embed").await?;
    assert_eq!(drover_tests::programs::servers_with(&cluster.mark()), []);
    cluster.end().await
}
