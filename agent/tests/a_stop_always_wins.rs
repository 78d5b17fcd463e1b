//! Whatever an instance is doing, a stop ends it, and nothing of it is left.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{DeploymentSpec, InstanceState};
use nix::sys::signal::Signal;
use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
};
use support::{Node, is_alive, signal, tiny, wait_for};

const ID: &str = "tiny-234567";

async fn nothing_is_left(node: &Node, instance: &str) {
    let (directory, socket) = (node.directory(instance), node.path("state/run").join(format!("{instance}.sock")));
    wait_for("the files to go", || (!directory.path().exists() && !socket.exists()).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_ready_server() {
    let node = Node::start().await;
    let ready = node.run("tiny-234567").await;
    node.coordinator.stop("tiny-234567");
    let stopped = node.reported("tiny-234567", InstanceState::Stopped).await;
    assert_eq!((stopped.exit_code, stopped.pid), (Some(0), 0));
    assert!(!is_alive(ready.pid));
    nothing_is_left(&node, "tiny-234567").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_server_that_ignores_sigterm() {
    let node = Node::start().await;
    node.coordinator.offer("tiny-234567", DeploymentSpec { stop_grace_ms: Some(300), ..tiny() });
    let ready = node.reported("tiny-234567", InstanceState::Ready).await;
    // A stopped process takes no SIGTERM until it is continued.
    signal(ready.pid, Signal::SIGSTOP);
    node.coordinator.stop("tiny-234567");
    let stopped = node.reported("tiny-234567", InstanceState::Stopped).await;
    assert_eq!(stopped.exit_signal, Some(9));
    nothing_is_left(&node, "tiny-234567").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_start_in_flight() {
    let node = Node::start().await;
    for n in 0..20 {
        let instance =
            format!("tiny-2345{}{}", ["6", "7"][n % 2], ["b", "c", "d", "f", "g", "h", "j", "k", "m", "n"][n / 2]);
        node.coordinator.offer(&instance, tiny());
        wait_for("the claim", || node.coordinator.state().owned.contains_key(&instance).then_some(())).await;
        node.coordinator.stop(&instance);
        node.reported(&instance, InstanceState::Stopped).await;
        nothing_is_left(&node, &instance).await;
    }
    let servers = std::fs::read_dir(node.path("state/instances")).unwrap().count();
    assert_eq!(servers, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_launch_that_is_under_way() {
    for step in ["start.locked", "start.recorded", "start.confirmed"] {
        let node = Node::armed("", Some((step, "pause"))).await;
        node.coordinator.offer(ID, tiny());
        let shim = node.paused().await;
        node.coordinator.stop(ID);
        node.reported(ID, InstanceState::Draining).await;
        signal(i64::from(shim), Signal::SIGCONT);
        node.reported(ID, InstanceState::Stopped).await;
        node.nothing_left(ID, step).await;
        let ready = node.coordinator.state().reports.iter().any(|r| r.state() == InstanceState::Ready);
        assert!(!ready, "{step}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_server_that_loads() {
    let node = Node::misbehaving("loading").await;
    node.coordinator.offer(ID, tiny());
    let loading = node.reported(ID, InstanceState::Loading).await;
    node.coordinator.stop(ID);
    let stopped = node.reported(ID, InstanceState::Stopped).await;
    assert_eq!((stopped.exit_signal, stopped.restarts), (Some(15), 0));
    assert!(!is_alive(loading.pid) && node.events(ID, "BackOff").is_empty());
    node.nothing_left(ID, "loading").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_restart_that_is_waited_for() {
    // So long that only the stop can end the wait.
    let mut node = Node::idle("").await;
    node.config = support::misbehave("at-once", &node.path("mark")).replace("first_ms = 10", "first_ms = 30000");
    node.program = support::misbehaving();
    node.start_agent().await;
    node.coordinator.offer(ID, tiny());
    node.reported(ID, InstanceState::Backoff).await;
    node.coordinator.stop(ID);
    node.reported(ID, InstanceState::Stopped).await;
    node.nothing_left(ID, "backoff").await;
    assert_eq!(node.events(ID, "BackOff").len(), 1);
}

/// It is wanted again, and then not, while it still takes its time to end.
#[tokio::test(flavor = "multi_thread")]
async fn over_a_start_that_came_while_it_was_being_killed() {
    let node = Node::misbehaving("deaf").await;
    let wanted = |wanted| node.coordinator.change(|state| state.owned.get_mut(ID).unwrap().wanted = wanted);
    node.coordinator.offer(ID, DeploymentSpec { stop_grace_ms: Some(1_000), ..tiny() });
    let first = node.reported(ID, InstanceState::Ready).await;
    for last in [true, false] {
        let before = node.coordinator.last_report(ID).unwrap().pid;
        wanted(false);
        node.reported(ID, InstanceState::Draining).await;
        wanted(true);
        if last {
            // The last word counts: the old one ends, and another follows.
            let again = node.report("another", ID, |r| r.state() == InstanceState::Ready && r.pid != before).await;
            assert!(!is_alive(first.pid) && again.exit_signal == Some(9));
        } else {
            wanted(false);
        }
    }
    let stopped = node.reported(ID, InstanceState::Stopped).await;
    assert_eq!((stopped.exit_signal, stopped.restarts), (Some(9), 1));
    node.nothing_left(ID, "killed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_rapid_order_the_last_word_counts() {
    // It takes half a second to end: nothing of this does.
    let node = Node::misbehaving("deaf").await;
    let wanted = |wanted| node.coordinator.change(|state| state.owned.get_mut(ID).unwrap().wanted = wanted);
    node.coordinator.offer(ID, DeploymentSpec { stop_grace_ms: Some(500), ..tiny() });
    node.reported(ID, InstanceState::Ready).await;
    for _ in 0..20 {
        wanted(false);
        wanted(true);
        tokio::task::yield_now().await;
    }
    let end = |r: &drover_proto::v1::StatusReport| r.state() == InstanceState::Ready && is_alive(r.pid);
    node.report("it to run", ID, end).await;
    for _ in 0..20 {
        wanted(true);
        wanted(false);
    }
    node.reported(ID, InstanceState::Stopped).await;
    node.nothing_left(ID, "rapid").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_an_agent_that_was_killed_meanwhile() {
    let mut node = Node::start().await;
    let ready = node.run("tiny-234567").await;
    node.kill_agent();
    node.coordinator.stop("tiny-234567");
    node.start_agent().await;
    node.reported("tiny-234567", InstanceState::Stopped).await;
    assert!(!is_alive(ready.pid));
    nothing_is_left(&node, "tiny-234567").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn but_requests_in_flight_are_answered_first() {
    let node = Node::start().await;
    // An answer too large for the buffers on its way: it stays in flight until it is read here.
    node.coordinator.offer("tiny-234567", DeploymentSpec { context_tokens: Some(8192), ..tiny() });
    let ready = node.reported("tiny-234567", InstanceState::Ready).await;
    let addresses: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(node.path("ready.json")).unwrap()).unwrap();
    let mut stream = TcpStream::connect(addresses["proxy"].as_str().unwrap()).unwrap();
    let body = r#"{"prompt": "once", "stream": true, "max_tokens": 2500, "logprobs": 5, "temperature": 0, "ignore_eos": true}"#;
    write!(
        stream,
        "POST /i/tiny-234567/v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
    assert!(lines.next().unwrap().contains("200"));
    lines.find(|line| line.starts_with("data: ")).expect("a first chunk");
    node.coordinator.stop("tiny-234567");
    node.reported("tiny-234567", InstanceState::Draining).await;
    assert!(is_alive(ready.pid), "it is not asked to end while a request is in flight");
    assert!(lines.any(|line| line == "data: [DONE]"), "the stream was cut");
    node.reported("tiny-234567", InstanceState::Stopped).await;
}
