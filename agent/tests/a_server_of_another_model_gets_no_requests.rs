//! A server that says it serves another model than its claim gets no requests, however well it answers, and is not ended;
//! one that says the right thing later gets them.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::InstanceState;
use std::{fs, net::TcpStream};
use support::{Node, is_alive, tiny, wait_for};

const ID: &str = "tiny-234567";

/// What the proxy answers to a request for the instance.
fn status(node: &Node) -> String {
    use std::io::{Read as _, Write as _};
    let ready: serde_json::Value = serde_json::from_str(&fs::read_to_string(node.path("ready.json")).unwrap()).unwrap();
    let mut stream = TcpStream::connect(ready["proxy"].as_str().unwrap()).unwrap();
    write!(stream, "GET /i/{ID}/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.split_whitespace().nth(1).unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn when_it_is_started_and_when_it_is_adopted() {
    let mut node = Node::misbehaving("other-model").await;
    node.coordinator.offer(ID, tiny());
    let suspect = node.reported(ID, InstanceState::Suspect).await;
    assert!(suspect.message.contains("serves /elsewhere.gguf, not") && suspect.message.contains("tiny.gguf"));
    assert_ne!(status(&node), "200");
    // The next agent finds it as it is: many good answers of /health make it no other server.
    node.kill_agent();
    let before = node.coordinator.state().reports.len();
    node.start_agent().await;
    let probes = || node.coordinator.state().reports[before..].iter().any(|r| r.state() == InstanceState::Suspect);
    wait_for("its report", || probes().then_some(())).await;
    let heard = || node.log().matches("Suspect: the server serves").count();
    wait_for("the state to be seen twice", || (heard() >= 2).then_some(())).await;
    assert_ne!(status(&node), "200");
    let ready = node.coordinator.state().reports.iter().any(|r| r.state() == InstanceState::Ready);
    assert!(!ready && is_alive(suspect.pid), "it is neither used nor ended");
    fs::write(node.path("mark"), "").unwrap();
    let ready = node.reported(ID, InstanceState::Ready).await;
    assert_eq!((ready.pid, status(&node).as_str()), (suspect.pid, "200"));
    node.coordinator.stop(ID);
    node.nothing_left(ID, "another model").await;
}
