//! Streams in flight end by themselves within the drain timeout; one that takes longer is cut and can tell that it was; force
//! waits for none, whatever the stop is doing.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{DeploymentSpec, EndProcessesCommand, InstanceState, ProcessName, node_command::Command};
use drover_shim::identity;
use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
};
use support::{Node, is_alive, tiny, wait_for};

const ID: &str = "tiny-234567";

/// A node with a ready instance and a stream that its reader has stopped to read: it ends when its reader wants it to.
async fn streaming(drain_ms: i64, grace_ms: i64) -> (Node, i64, impl Iterator<Item = std::io::Result<String>>) {
    let node = Node::start().await;
    // An answer too large for the buffers on its way.
    let spec = DeploymentSpec {
        context_tokens: Some(8192),
        drain_timeout_ms: Some(drain_ms),
        stop_grace_ms: Some(grace_ms),
        ..tiny()
    };
    node.coordinator.offer(ID, spec);
    let ready = node.reported(ID, InstanceState::Ready).await;
    let addresses: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(node.path("ready.json")).unwrap()).unwrap();
    let mut stream = TcpStream::connect(addresses["proxy"].as_str().unwrap()).unwrap();
    let body = r#"{"prompt": "once", "stream": true, "max_tokens": 6000, "logprobs": 5, "temperature": 0, "ignore_eos": true}"#;
    write!(
        stream,
        "POST /i/{ID}/v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut lines = BufReader::new(stream).lines();
    assert!(lines.next().unwrap().unwrap().contains("200"));
    lines.find(|line| line.as_ref().is_ok_and(|line| line.starts_with("data: "))).expect("a first chunk").unwrap();
    (node, ready.pid, lines)
}

/// How a stream ends: whole; or by an error, or before its last chunk.
fn is_whole(lines: impl Iterator<Item = std::io::Result<String>>) -> bool {
    let lines: Vec<String> = lines.map_while(Result::ok).collect();
    lines.iter().any(|line| line == "data: [DONE]") && lines.iter().rev().find(|l| !l.is_empty()).unwrap() == "0"
}

fn force(node: &Node, pid: i64) {
    let start_ticks = identity::stat(i32::try_from(pid).unwrap()).unwrap().start_ticks;
    let processes = vec![ProcessName { pid, start_ticks }];
    node.coordinator.command(Command::EndProcesses(EndProcessesCommand { processes, force: true, owned: true }));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_read_in_time_is_whole() {
    let (node, _, lines) = streaming(60_000, 10_000).await;
    node.coordinator.stop(ID);
    node.reported(ID, InstanceState::Draining).await;
    assert!(is_whole(lines));
    assert_eq!(node.reported(ID, InstanceState::Stopped).await.exit_code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_not_is_cut_at_the_end_of_the_drain() {
    let (node, pid, lines) = streaming(1_000, 1_000).await;
    node.coordinator.stop(ID);
    node.reported(ID, InstanceState::Stopped).await;
    assert!(!is_alive(pid) && node.log().contains("still in flight at the end of drain_timeout_ms = 1000"));
    assert!(!is_whole(lines), "a cut stream looks like one that has ended");
    node.nothing_left(ID, "a cut stream").await;
}

/// With a drain and a grace that no test would wait for.
#[tokio::test(flavor = "multi_thread")]
async fn force_ends_a_drain_that_goes_on() {
    let (node, pid, lines) = streaming(3_600_000, 3_600_000).await;
    node.coordinator.stop(ID);
    node.reported(ID, InstanceState::Draining).await;
    force(&node, pid);
    node.reported(ID, InstanceState::Stopped).await;
    assert!(!is_alive(pid) && !is_whole(lines));
    let told = node.coordinator.state().command_answers.last().cloned();
    let told = match told {
        Some(answer) => answer,
        None => wait_for("the answer", || node.coordinator.state().command_answers.last().cloned()).await,
    };
    assert!(told.results[0].message.contains("without waiting for requests"), "{told:?}");
    assert!(node.events(ID, "BackOff").is_empty(), "it was no crash");
    node.nothing_left(ID, "forced").await;
}

/// It comes before the set of claims that says so: the end is no crash all the same.
#[tokio::test(flavor = "multi_thread")]
async fn force_ends_a_ready_one_at_once() {
    let (node, pid, lines) = streaming(3_600_000, 3_600_000).await;
    force(&node, pid);
    node.coordinator.stop(ID);
    node.reported(ID, InstanceState::Stopped).await;
    assert!(!is_alive(pid) && !is_whole(lines));
    assert!(node.events(ID, "BackOff").is_empty(), "it was no crash");
}

#[tokio::test(flavor = "multi_thread")]
async fn force_shortens_the_grace_of_one_that_does_not_hear() {
    let node = Node::misbehaving("deaf").await;
    node.coordinator.offer(ID, DeploymentSpec { stop_grace_ms: Some(3_600_000), ..tiny() });
    let ready = node.reported(ID, InstanceState::Ready).await;
    node.coordinator.stop(ID);
    node.reported(ID, InstanceState::Draining).await;
    wait_for("SIGTERM", || node.log().contains("Stopping").then_some(())).await;
    force(&node, ready.pid);
    assert_eq!(node.reported(ID, InstanceState::Stopped).await.exit_signal, Some(9));
}
