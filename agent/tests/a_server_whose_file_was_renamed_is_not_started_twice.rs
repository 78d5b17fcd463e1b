//! An upgrade moves llama-server's file aside while it runs and puts another in its place: the server that runs is taken
//! back by the number of its file; where that is not on record it is left alone, and no second one is started beside it.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{InstanceState, StatusReport};
use drover_shim::durable;
use std::fs;
use support::{Node, is_alive, misbehaving, wait_for, watcher};

const ID: &str = "tiny-234567";

/// A node whose server runs from a file that was renamed, and no agent.
async fn renamed() -> (Node, StatusReport) {
    let mut node = Node::idle("").await;
    node.program = node.path("llama-server");
    fs::copy(misbehaving(), &node.program).unwrap();
    node.start_agent().await;
    let ready = node.run(ID).await;
    node.kill_agent();
    fs::rename(&node.program, node.path("llama-server.old")).unwrap();
    fs::copy(misbehaving(), &node.program).unwrap();
    (node, ready)
}

fn no_second_one(node: &Node) {
    assert_eq!(watcher::servers(node.root.path(), &node.program), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_known_by_its_file() {
    let (mut node, ready) = renamed().await;
    let before = node.coordinator.state().reports.len();
    node.start_agent().await;
    let again = wait_for("a report", || node.coordinator.state().reports.get(before).cloned()).await;
    assert_eq!((again.state(), again.pid, again.message.as_str()), (InstanceState::Ready, ready.pid, ""));
    no_second_one(&node);
    node.coordinator.stop(ID);
    node.reported(ID, InstanceState::Stopped).await;
    node.nothing_left(ID, "renamed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_number_of_its_file_it_goes_on_unsignalled() {
    let (mut node, ready) = renamed().await;
    let mut record = node.record(ID);
    record.process.file = None;
    durable::write(&node.directory(ID).record(), &record).unwrap();
    node.start_agent().await;
    let told = |r: &StatusReport| r.message.contains("llama-server.old");
    let unsure = node.report("what can't be told", ID, told).await;
    assert_eq!((unsure.state(), unsure.pid), (InstanceState::Ready, ready.pid), "it answers for its model");
    wait_for("the event", || {
        let events = node.coordinator.state().events.clone();
        events.iter().any(|e| e.reason == "IdentityUnknown" && e.instance == ID).then_some(())
    })
    .await;
    node.coordinator.stop(ID);
    node.reported(ID, InstanceState::Draining).await;
    assert!(is_alive(ready.pid), "it was signalled on a guess");
    no_second_one(&node);
    // Under its own name it is known again.
    fs::rename(node.path("llama-server.old"), &node.program).unwrap();
    node.reported(ID, InstanceState::Stopped).await;
    assert!(!is_alive(ready.pid));
}
