//! A program that exits at once, exits after it was ready, does not hear SIGTERM, or leaves a child behind.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{DeploymentSpec, InstanceState};
use nix::sys::signal::Signal;
use support::{Node, is_alive, misbehaving, signal, tiny, wait_for};

const ID: &str = "tiny-234567";

async fn node(how: &str) -> Node {
    let mut node = Node::idle("").await;
    node.config = format!(
        "[restarts]\nbackoff_first_ms = 10\nquick_ends_max = 3\n[llama_server_environment]\nMISBEHAVE = '{how}'\nCHILD_FILE = '{}'\n",
        node.path("child").display()
    );
    node.program = misbehaving();
    node.start_agent().await;
    node
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_exits_at_once() {
    let node = node("at-once").await;
    node.coordinator.offer(ID, tiny());
    let failed = node.reported(ID, InstanceState::Failed).await;
    assert!(failed.message.contains("crash loop") && failed.message.contains("exited with code 3"), "{failed:?}");
    assert!(failed.message.contains("misbehaves: at-once"), "its last line is missing: {}", failed.message);
    assert_eq!((failed.exit_code, failed.pid), (Some(3), 0));
    node.coordinator.stop(ID);
    node.nothing_left(ID, "exits at once").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_exits_after_it_was_ready() {
    let node = node("after-ready").await;
    node.run(ID).await;
    let failed = node.reported(ID, InstanceState::Failed).await;
    assert!(failed.message.contains("crash loop: ended 3 times in a row"), "{}", failed.message);
    assert_eq!((failed.exit_code, failed.restarts), (Some(4), 2));
    let state = node.coordinator.state().reports.iter().filter(|r| r.state() == InstanceState::Ready).count();
    assert!(state >= 2, "it was ready {state} times");
    node.coordinator.stop(ID);
    node.nothing_left(ID, "exits after ready").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_does_not_hear_sigterm() {
    let node = node("deaf").await;
    node.coordinator.offer(ID, DeploymentSpec { stop_grace_ms: Some(300), ..tiny() });
    let ready = node.reported(ID, InstanceState::Ready).await;
    signal(ready.pid, Signal::SIGTERM);
    node.coordinator.stop(ID);
    let stopped = node.reported(ID, InstanceState::Stopped).await;
    assert_eq!(stopped.exit_signal, Some(9));
    node.nothing_left(ID, "deaf").await;
}

/// The child leads a session of its own: neither the group nor the session of the server reaches it.
async fn with_a_child(end: impl AsyncFnOnce(&Node, i64)) {
    let node = node("parent").await;
    let ready = node.run(ID).await;
    let child: i64 = wait_for("the child", || std::fs::read_to_string(node.path("child")).ok()?.parse().ok()).await;
    assert!(is_alive(child));
    end(&node, ready.pid).await;
    wait_for("the child's end", || (!is_alive(child)).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_with_a_child_that_is_stopped() {
    with_a_child(async |node, _| {
        node.coordinator.stop(ID);
        node.reported(ID, InstanceState::Stopped).await;
        node.nothing_left(ID, "a child").await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_with_a_child_that_crashes() {
    with_a_child(async |node, pid| {
        signal(pid, Signal::SIGKILL);
        node.report("the end", ID, |r| r.exit_signal == Some(9)).await;
    })
    .await;
}
