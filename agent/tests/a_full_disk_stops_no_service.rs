//! A disk that takes nothing more: nothing new is started, and what runs is kept, known and reachable.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::InstanceState;
use std::{fs, os::unix::fs::symlink};
use support::Node;

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_can_not_be_written_down_is_held_all_the_same() {
    let node = Node::start().await;
    let before = node.run("tiny-234567").await;
    let session = node.path("state/session");
    fs::remove_file(&session).unwrap();
    fs::create_dir_all(session.join("in the way")).unwrap();
    node.coordinator.expire();
    let after = node.report("the higher token", "tiny-234567", |r| r.token > before.token).await;
    assert_eq!((after.state(), after.pid), (InstanceState::Ready, before.pid));
    let events = node.coordinator.state().events.clone();
    assert!(events.iter().any(|e| e.reason == "SessionNotOnDisk"), "{events:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_starts_though_neither_it_nor_its_proxy_can_write_a_file() {
    let mut node = Node::start().await;
    let before = node.run("tiny-234567").await;
    node.kill_agent();
    let proxy = std::os::unix::net::UnixStream::connect(node.path("state/run/proxy.sock")).unwrap();
    let proxy = nix::sys::socket::getsockopt(&proxy, nix::sys::socket::sockopt::PeerCredentials).unwrap().pid();
    support::signal(i64::from(proxy), nix::sys::signal::Signal::SIGKILL);
    for file in ["lock", "proxy.log"] {
        fs::remove_file(node.path("state").join(file)).unwrap();
        symlink("/dev/full", node.path("state").join(file)).unwrap();
    }
    fs::create_dir_all(node.path("ready.json/in the way")).unwrap();
    let reports = node.coordinator.state().reports.len();
    node.start_agent().await;
    support::wait_for("its report", || (node.coordinator.state().reports.len() > reports).then_some(())).await;
    assert_eq!(node.reported("tiny-234567", InstanceState::Ready).await.pid, before.pid);
    support::wait_for("what is said of it", || node.log().contains("ready_file = ").then_some(())).await;
    assert!(node.agent.as_mut().unwrap().try_wait().unwrap().is_none(), "the agent has ended");
}
