//! Each kind of bad input gets one clear error and changes nothing: API, gateway, command, configuration files.

use bytes::Bytes;
use drover_proto::{
    status::{self, reason},
    v1::{
        ApplyDeploymentRequest, DeploymentSpec, GetInstanceRequest, ListDeploymentsRequest, ScaleDeploymentRequest,
        StreamLogsRequest, WatchEventsRequest,
    },
};
use drover_tests::{
    cluster::{Cluster, Plan, SECRET},
    gateway::Gateway,
    programs::program,
};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use std::{fs, process::Command};
use tonic::Code;
use tonic_types::StatusExt as _;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_with_field_value_and_way_out() -> anyhow::Result<()> {
    let plan = Plan { coordinator_toml: "[gateway]\nbody_bytes_max = 100000\n".to_owned(), ..Plan::default() };
    let cluster = Cluster::start(plan).await?;
    cluster.deploy(cluster.spec("good", 1)).await?;
    deployments(&cluster).await?;
    other_calls(&cluster).await?;
    gateway(&cluster).await?;
    command(&cluster)?;
    configuration(&cluster)?;
    let listed = cluster.client(0).await?.list_deployments(ListDeploymentsRequest::default()).await?.into_inner();
    let names: Vec<_> =
        listed.deployments.iter().map(|d| (d.spec.as_ref().unwrap().name.as_str(), d.generation)).collect();
    assert_eq!(names, [("good", 1)], "nothing was changed");
    let logs =
        cluster.coordinators[0].running.as_ref().unwrap().log() + &cluster.agents[0].running.as_ref().unwrap().log();
    assert!(!logs.contains(SECRET), "the secret stands in a log");
    cluster.delete("good").await?;
    cluster.end().await
}

async fn deployments(cluster: &Cluster) -> anyhow::Result<()> {
    fs::write(cluster.folder().join("outside.gguf"), "x")?;
    let outside = cluster.folder().join("outside.gguf").display().to_string();
    let absent = cluster.folder().join("models/absent.gguf").display().to_string();
    let spec = || cluster.spec("new", 1);
    let cases: Vec<(&str, &str, &str, DeploymentSpec)> = vec![
        ("spec.name", "Bad_Name", "a-z", DeploymentSpec { name: "Bad_Name".to_owned(), ..spec() }),
        ("spec.replicas", "0", "scale", DeploymentSpec { replicas: Some(0), ..spec() }),
        ("spec.replicas", "-3", "1 to 1000", DeploymentSpec { replicas: Some(-3), ..spec() }),
        ("spec.context_tokens", "-1", "default", DeploymentSpec { context_tokens: Some(-1), ..spec() }),
        ("spec.slots", "0", "1 to", DeploymentSpec { slots: Some(0), ..spec() }),
        ("spec.memory_bytes", "-1", "1 to", DeploymentSpec { memory_bytes: Some(-1), ..spec() }),
        ("spec.model_path", &outside, "root", DeploymentSpec { model_path: outside.clone(), ..spec() }),
        ("spec.model_path", &absent, "put the file there", DeploymentSpec { model_path: absent.clone(), ..spec() }),
        (
            "spec.model_path",
            "../outside.gguf",
            "..",
            DeploymentSpec { model_path: "../outside.gguf".to_owned(), ..spec() },
        ),
        (
            "spec.arguments",
            "--rpc",
            "allow",
            DeploymentSpec { arguments: vec!["--rpc".to_owned(), "evil:1".to_owned()], ..spec() },
        ),
    ];
    let mut client = cluster.client(0).await?;
    for (field, value, way_out, spec) in cases {
        let refusal =
            client.apply_deployment(ApplyDeploymentRequest { spec: Some(spec), generation: 0 }).await.unwrap_err();
        assert_eq!(refusal.code(), Code::InvalidArgument, "{field}: {refusal}");
        assert_eq!(status::reason_of(&refusal).as_deref(), Some(reason::INVALID_FIELD));
        let violations = refusal.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations.len(), 1, "{violations:?}");
        assert_eq!(violations[0].field, field);
        let what = &violations[0].description;
        assert!(what.contains(value) && what.contains(way_out), "{field}: {what}");
    }
    let refusal = client.apply_deployment(ApplyDeploymentRequest::default()).await.unwrap_err();
    assert!(refusal.code() == Code::InvalidArgument && refusal.message().contains("spec"), "{refusal}");

    let changed = DeploymentSpec { slots: Some(1), ..cluster.spec("good", 1) };
    let apply = |generation| ApplyDeploymentRequest { spec: Some(changed.clone()), generation };
    let old = client.apply_deployment(apply(7)).await.unwrap_err();
    assert_eq!((old.code(), status::reason_of(&old).as_deref()), (Code::Aborted, Some(reason::GENERATION_MISMATCH)));
    assert!(old.message().contains("generation 1") && old.message().contains('7'), "{old}");
    let none = client.apply_deployment(apply(0)).await.unwrap_err();
    assert_eq!((none.code(), status::reason_of(&none).as_deref()), (Code::AlreadyExists, Some(reason::ALREADY_EXISTS)));
    Ok(())
}

async fn other_calls(cluster: &Cluster) -> anyhow::Result<()> {
    let mut client = cluster.client(0).await?;
    let scale = |name: &str, replicas| ScaleDeploymentRequest { name: name.to_owned(), replicas, generation: 0 };
    assert_eq!(client.scale_deployment(scale("absent", Some(1))).await.unwrap_err().code(), Code::NotFound);
    let refusal = client.scale_deployment(scale("good", Some(-1))).await.unwrap_err();
    assert!(refusal.message().contains("replicas: -1"), "{refusal}");
    let refusal = client.scale_deployment(scale("good", None)).await.unwrap_err();
    assert!(refusal.message().contains("replicas: is missing"), "{refusal}");
    let refusal =
        client.list_deployments(ListDeploymentsRequest { page_size: -1, ..Default::default() }).await.unwrap_err();
    assert!(refusal.message().contains("page_size: -1"), "{refusal}");
    let refusal = client.get_instance(GetInstanceRequest { id: "no/id".to_owned() }).await.unwrap_err();
    assert_eq!(refusal.code(), Code::InvalidArgument);
    let refusal = client.get_instance(GetInstanceRequest { id: "good-222222".to_owned() }).await.unwrap_err();
    assert_eq!(refusal.code(), Code::NotFound);
    let request = WatchEventsRequest { object: "pod/x".to_owned(), ..Default::default() };
    assert!(client.watch_events(request).await.unwrap_err().message().contains("pod/x"));
    let request = StreamLogsRequest { instance: "good-222222".to_owned(), tail_lines: -1, follow: false };
    assert!(client.stream_logs(request).await.unwrap_err().message().contains("tail_lines: -1"));
    Ok(())
}

async fn gateway(cluster: &Cluster) -> anyhow::Result<()> {
    let gateway = Gateway::new(&cluster.coordinators[0].http);
    let check = async |path: &str, body: Bytes, code: u16, texts: &[&str]| -> anyhow::Result<()> {
        let answer = gateway.post_raw(path, &[], body).await?;
        assert_eq!(answer.status().as_u16(), code, "{path}");
        assert!(answer.headers().contains_key("x-request-id"));
        let bytes = answer.into_body().collect().await?.to_bytes();
        let error: Value = serde_json::from_slice(&bytes)?;
        let error = &error["error"];
        assert!(error["message"].is_string() && error["type"].is_string(), "OpenAI's shape: {error}");
        for text in texts {
            assert!(error.to_string().contains(text), "{text}: {error}");
        }
        Ok(())
    };
    let chat = "/v1/chat/completions";
    let body = |value: Value| Bytes::from(value.to_string());
    check(chat, Bytes::from("{\"model\": "), 400, &["JSON"]).await?;
    check(chat, body(json!({ "messages": [] })), 400, &["model"]).await?;
    check(chat, body(json!({ "model": 7 })), 400, &["model"]).await?;
    check(chat, body(json!({ "model": "absent" })), 404, &["absent", "good", "model_not_found"]).await?;
    let embeddings = body(json!({ "model": "good", "input": "x" }));
    check("/v1/embeddings", embeddings, 400, &["unsupported_for_model", "/v1/chat/completions"]).await?;
    let large = body(json!({ "model": "good", "prompt": "x".repeat(200_000) }));
    check("/v1/completions", large, 413, &["100000"]).await?;
    check("/v1/absent", body(json!({})), 404, &["/v1/absent"]).await
}

fn command(cluster: &Cluster) -> anyhow::Result<()> {
    let file = cluster.folder().join("bad.toml");
    fs::write(&file, "name = 'new'\nmodel_path = 'tiny.gguf'\nreplcas = 2\n")?;
    let secret = cluster.folder().join("secret");
    let apply = |file: &std::path::Path| {
        Command::new(program("drover"))
            .args(["--coordinators", &cluster.coordinators[0].grpc, "--join-secret-file"])
            .arg(&secret)
            .args(["apply", "-f"])
            .arg(file)
            .output()
    };
    let output = apply(&file)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("bad.toml") && text.contains("line 3") && text.contains("replcas"), "{text}");
    fs::write(&file, "name = 'new'\nmodel_path = 'tiny.gguf'\nreplicas = -2\n")?;
    let output = apply(&file)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("spec.replicas") && text.contains("-2"), "{text}");
    assert!(!text.contains("Status {"), "no dump: {text}");
    Ok(())
}

fn configuration(cluster: &Cluster) -> anyhow::Result<()> {
    let file = cluster.folder().join("config.toml");
    for (binary, text, line, key) in [
        ("drover-coordinator", "store = 'memory'\nstroe = 1\n", "line 2", "stroe"),
        ("drover-agent", "node = 'x'\n\nmodel_root = '/'\n", "line 3", "model_root"),
    ] {
        fs::write(&file, text)?;
        let output = Command::new(program(binary)).arg("--config").arg(&file).output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{binary} started");
        assert!(text.contains("config.toml") && text.contains(line) && text.contains(key), "{binary}: {text}");
    }
    fs::write(&file, "store = 'memory'\ngrpc_listen = '0.0.0.0:0'\n")?;
    let output = Command::new(program("drover-coordinator")).arg("--config").arg(&file).output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("grpc_listen") && text.contains("join_secret_file"), "{text}");
    Ok(())
}
