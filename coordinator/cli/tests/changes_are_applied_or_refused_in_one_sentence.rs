//! `apply`, `scale` and `delete` against a coordinator that starts nothing: what is sent, said and answered.

#![allow(clippy::unwrap_used, reason = "a test")]

mod fake;

use drover_proto::v1::{Event, Instance, InstanceState, Severity, Token};
use fake::{Fake, parts, run};
use std::path::PathBuf;

fn file(dir: &tempfile::TempDir, text: &str) -> String {
    let path: PathBuf = dir.path().join("tiny.toml");
    std::fs::File::create(&path).and_then(|mut f| std::io::Write::write_all(&mut f, text.as_bytes())).unwrap();
    path.display().to_string()
}

#[tokio::test]
async fn an_apply_is_based_on_the_generation_that_is_stored_or_the_one_demanded() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let address = fake.serve().await;
    let tiny = file(&dir, "name = \"tiny\"\nmodel_path = \"tiny.gguf\"\nreplicas = 2\n");

    let (code, out, err) = parts(&run(&address, &["apply", "-f", &tiny, "-v"]).await);
    assert_eq!((code, out.as_str()), (0, "deployment tiny is created (generation 1)\n"), "{err}");
    let trace = fake.0.lock().unwrap().traces[0].clone();
    let trace_id = trace.split('-').nth(1).unwrap();
    assert!(trace.starts_with("00-") && trace.ends_with("-01") && trace_id.len() == 32, "{trace}");
    assert_eq!(err, format!("trace {trace_id}\n"));

    let (code, out, _) = parts(&run(&address, &["apply", "-f", &tiny, "--output", "json"]).await);
    let document: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &document["deployment"]["generation"]), (0, &2.into()));
    assert_eq!(document["deployment"]["spec"]["replicas"], 2);
    assert_eq!(fake.0.lock().unwrap().traces[1].split('-').nth(1), document["trace_id"].as_str());

    let (code, out, err) = parts(&run(&address, &["apply", "-f", &tiny, "--generation", "1"]).await);
    assert_eq!((code, out.as_str()), (1, ""));
    assert_eq!(err, "drover: generation 1 is not the stored one, 2: read it again (GENERATION_MISMATCH)\n");
}

#[tokio::test]
async fn what_is_wrong_is_told_with_its_place_and_changes_nothing() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let address = fake.serve().await;

    let (code, _, err) = parts(&run(&address, &["apply", "-f", &file(&dir, "name = 'tiny'\nreplcas = 2\n")]).await);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("tiny.toml: line 2: unknown field \"replcas\""), "{err}");
    assert!(fake.0.lock().unwrap().traces.is_empty(), "a file that is wrong is not sent");

    let (code, _, err) = parts(&run(&address, &["apply", "-f", &file(&dir, "name = 'tiny'\nreplicas = 0\n")]).await);
    assert_eq!((code, err.as_str()), (1, "drover: replicas: 0 is below 1: use ScaleDeployment (INVALID_FIELD)\n"));
    let (code, _, err) = parts(&run(&address, &["scale", "nobody", "2"]).await);
    assert_eq!((code, err.as_str()), (1, "drover: there is no \"nobody\" (NOT_FOUND)\n"));
    assert!(fake.0.lock().unwrap().deployments.is_empty());
}

#[tokio::test]
async fn a_wait_ends_when_ready_when_it_can_not_be_and_at_its_deadline() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let address = fake.serve().await;
    let tiny = file(&dir, "name = 'tiny'\nmodel_path = 'tiny.gguf'\n");
    let mut instance = Instance {
        id: "tiny-x".into(),
        deployment: "tiny".into(),
        revision: 1,
        wanted: true,
        state: InstanceState::Pending.into(),
        message: "no node has room".into(),
        ..Default::default()
    };
    fake.0.lock().unwrap().instances = vec![instance.clone()];
    let (code, out, err) = parts(&run(&address, &["apply", "-f", &tiny, "--wait", "--timeout", "1"]).await);
    assert_eq!((code, out.as_str()), (4, "deployment tiny is created (generation 1)\n"), "{err}");
    let why = "drover: tiny was not ready within 1 s: 0 of 1 ready; tiny-x PENDING (no node has room)\n";
    assert!(err.ends_with(why), "{err}");

    (instance.state, instance.message) = (InstanceState::Failed.into(), "exit code 1".into());
    fake.0.lock().unwrap().instances = vec![instance.clone()];
    let (code, _, err) = parts(&run(&address, &["scale", "tiny", "1", "--wait"]).await);
    assert_eq!(code, 1, "{err}");
    assert!(err.ends_with("drover: tiny does not become ready: tiny-x FAILED (exit code 1)\n"), "{err}");

    instance.state = InstanceState::Ready.into();
    fake.0.lock().unwrap().instances = vec![instance];
    let (code, out, err) = parts(&run(&address, &["scale", "tiny", "1", "--wait"]).await);
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("deployment tiny is scaled to 1 (generation 3)\n"), "{out}");

    let (code, out, err) = parts(&run(&address, &["delete", "tiny", "--wait"]).await);
    assert_eq!((code, out.as_str()), (0, "deployment tiny is being deleted\ndeployment tiny is gone\n"), "{err}");
}

#[tokio::test]
async fn a_wait_that_ran_out_tells_what_leader_and_nodes_said() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let address = fake.serve().await;
    let event = |object: &str, source: &str, severity: Severity, message: &str| Event {
        object: object.into(),
        source: source.into(),
        reason: "Word".into(),
        severity: severity.into(),
        message: message.into(),
        ..Default::default()
    };
    {
        let mut state = fake.0.lock().unwrap();
        state.instances = vec![Instance {
            id: "tiny-x".into(),
            deployment: "tiny".into(),
            revision: 1,
            wanted: true,
            state: InstanceState::Pending.into(),
            message: "offered to a".into(),
            ..Default::default()
        }];
        state.events = vec![
            event("deployment/tiny", "coordinator/c", Severity::Warning, "no node has the label x=y"),
            event("instance/tiny-x", "node/a", Severity::Warning, "the file is no model"),
            event("instance/tiny-x", "coordinator/c", Severity::Info, "offered to a"),
            event("instance/tiny-y", "node/a", Severity::Warning, "of another one"),
        ];
    }
    let tiny = file(&dir, "name = 'tiny'\nmodel_path = 'tiny.gguf'\n");
    let (code, _, err) = parts(&run(&address, &["apply", "-f", &tiny, "--wait", "--timeout", "1"]).await);
    let why = "drover: tiny was not ready within 1 s: 0 of 1 ready; tiny-x PENDING (offered to a); \
               no node has the label x=y; node/a: the file is no model (Word)\n";
    assert!(code == 4 && err.ends_with(why), "{code}: {err}");
}

#[tokio::test]
async fn a_claim_is_released_and_its_holder_named() {
    let fake = Fake::default();
    let address = fake.serve().await;
    let instance = Instance {
        id: "tiny-x".into(),
        node: "a".into(),
        token: Some(Token { generation: 1, revision: 7 }),
        state: InstanceState::Loading.into(),
        ..Default::default()
    };
    fake.0.lock().unwrap().instances = vec![instance];
    let (code, out, err) =
        parts(&run(&address, &["release", "tiny-x", "--token", "1.7", "--reason", "it hangs"]).await);
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("tiny-x is released: node a had it under token 1.7 (LOADING, held for 5s)"), "{out}");
    let (code, out, err) = parts(&run(&address, &["release", "tiny-x", "--output", "json"]).await);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, json["node"].as_str(), json["state"].as_str()), (0, Some("a"), Some("INSTANCE_STATE_LOADING")));
    assert!(fake.0.lock().unwrap().traces.iter().all(|trace| trace.starts_with("00-")), "{err}");
    let (code, out, err) = parts(&run(&address, &["release", "tiny-y"]).await);
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    assert!(err.contains("nobody holds a claim on tiny-y"), "{err}");
}

#[tokio::test]
async fn an_absence_is_ended_and_what_follows_is_told() {
    let fake = Fake::default();
    let address = fake.serve().await;
    let (code, out, err) = parts(&run(&address, &["end-absence", "away", "--reason", "it went wrong"]).await);
    assert_eq!(code, 0, "{err}");
    assert_eq!(
        out,
        "the agent of away, which meant to be back until 1970-01-01T00:01:00Z, is waited for no longer: its session ends \
         within 10s\n"
    );
    let (code, out, _) = parts(&run(&address, &["end-absence", "away", "--output", "json"]).await);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, json["ends_within_ms"].as_i64()), (0, Some(10_000)), "{out}");
    let (code, out, err) = parts(&run(&address, &["end-absence", "here"]).await);
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    assert!(err.contains("the agent of here is not absent on purpose"), "{err}");
}

#[tokio::test]
async fn nobody_there_is_told_apart_from_a_refusal() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (code, _, err) = parts(&run(&closed, &["get", "nodes"]).await);
    assert_eq!(code, 3);
    assert!(err.starts_with("drover: ") && err.contains(&closed) && err.lines().count() == 1, "{err}");

    let fake = Fake::default();
    let both = format!("{closed},{}", fake.serve().await);
    let (code, _, err) = parts(&run(&both, &["get", "nodes"]).await);
    assert_eq!(code, 0, "the second coordinator answers: {err}");
    let (code, _, err) = parts(&run("nonsense", &["get", "nodes"]).await);
    assert_eq!(code, 2, "{err}");
}
