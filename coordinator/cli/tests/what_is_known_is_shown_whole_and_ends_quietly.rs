//! `get`, `events` and `logs`: all pages, whole documents, and readers that leave.

mod fake;

use drover_proto::v1::{Instance, InstanceState, Node};
use fake::{Fake, drover, parts, run};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};

const SOON: Duration = Duration::from_secs(30);

#[tokio::test]
async fn lists_are_read_over_all_their_pages() {
    let fake = Fake::default();
    let address = fake.serve().await;
    fake.0.lock().unwrap().nodes =
        (0..5).map(|n| Node { name: format!("n{n}"), connected: n != 4, ..Default::default() }).collect();
    fake.0.lock().unwrap().instances = (0..3)
        .map(|n| Instance { id: format!("i{n}"), state: InstanceState::Ready.into(), ..Default::default() })
        .collect();

    let (code, out, err) = parts(&run(&address, &["get", "nodes"]).await);
    let names: Vec<_> = out.lines().map(|l| l.split_whitespace().next().unwrap()).collect();
    assert_eq!((code, names.as_slice()), (0, ["NAME", "n0", "n1", "n2", "n3", "n4"].as_slice()), "{err}");
    assert!(out.lines().last().unwrap().contains("gone") && !out.contains('\u{1b}'), "{out}");

    let (_, out, _) = parts(&run(&address, &["get", "instances", "-o", "json"]).await);
    let document: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(document["instances"].as_array().unwrap().len(), 3);
    assert_eq!(document["instances"][2]["state"], "INSTANCE_STATE_READY");

    let (_, out, _) = parts(&run(&address, &["get", "node", "n3", "-o", "json"]).await);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&out).unwrap()["name"], "n3");
    for words in [["get", "node", "n9"], ["get", "deployment", "n9"], ["get", "instance", "n9"]] {
        let (code, out, err) = parts(&run(&address, &words).await);
        assert_eq!((code, out.as_str()), (1, ""), "{err}");
        assert!(err.contains("n9"), "{err}");
    }
    let (code, out, err) = parts(&run(&address, &["get", "deployments"]).await);
    assert_eq!((code, out.as_str()), (0, ""));
    assert!(err.contains("no deployments"), "{err}");
}

#[tokio::test]
async fn events_and_logs_are_lines_and_json_lines() {
    let address = Fake::default().serve().await;
    let (code, out, err) = parts(&run(&address, &["events", "-o", "json"]).await);
    assert_eq!((code, out.lines().count()), (0, 3), "{err}");
    for line in out.lines() {
        assert_eq!(serde_json::from_str::<serde_json::Value>(line).unwrap()["reason"], "Told");
    }
    let (code, out, _) = parts(&run(&address, &["logs", "tiny-x", "--tail", "2"]).await);
    assert_eq!((code, out.as_str()), (0, "line 0\nline 1\n"));
    let (code, _, err) = parts(&run(&address, &["logs", "gone"]).await);
    assert_eq!((code, err.as_str()), (1, "drover: node a can't be reached: look at it (NODE_UNREACHABLE)\n"));
}

#[tokio::test]
async fn a_reader_that_leaves_ends_a_stream_quietly() {
    let address = Fake::default().serve().await;
    // The second stream has nothing to say after its three events.
    for words in [["events", "--follow"].as_slice(), &["events", "--follow", "--object", "quiet"]] {
        let mut child = drover(&address, words).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.next_line().await.unwrap().unwrap().contains("Told"));
        drop(lines);
        let output = tokio::time::timeout(SOON, child.wait_with_output()).await.unwrap().unwrap();
        assert_eq!(parts(&output), (0, String::new(), String::new()), "{words:?}");
    }
}

#[tokio::test]
async fn ctrl_c_ends_a_stream_with_130() {
    let address = Fake::default().serve().await;
    let mut child = drover(&address, &["events", "--follow"]).spawn().unwrap();
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).await.unwrap();
    let pid = nix::unistd::Pid::from_raw(child.id().unwrap().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    // Read on, or it would wait for us with its output.
    let rest = async {
        let mut sink = Vec::new();
        reader.read_to_end(&mut sink).await.unwrap();
        child.wait_with_output().await.unwrap()
    };
    let output = tokio::time::timeout(SOON, rest).await.unwrap();
    let (code, _, err) = parts(&output);
    assert_eq!((code, err.as_str()), (130, ""));
}
