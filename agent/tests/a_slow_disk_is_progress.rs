//! A server that only reads, and hardly uses the processor, makes progress: it is not ended for the time that loading takes.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{DeploymentSpec, InstanceState};
use std::{fs, time::Duration};
use support::{Node, tiny, wait_for};

const ID: &str = "tiny-234567";
const TIMEOUT_MS: i64 = 2_000;

#[tokio::test(flavor = "multi_thread")]
async fn for_several_times_the_load_timeout() {
    let node = Node::misbehaving("reading").await;
    let spec = DeploymentSpec { load_timeout_ms: Some(TIMEOUT_MS), ..tiny() };
    node.coordinator.offer(ID, spec);
    let loading = node.reported(ID, InstanceState::Loading).await;
    let began = std::time::Instant::now();
    let long = Duration::from_millis(TIMEOUT_MS.unsigned_abs()) * 3;
    wait_for("three times the timeout", || (began.elapsed() > long).then_some(())).await;
    fs::write(node.path("mark"), "").unwrap();
    let ready = node.reported(ID, InstanceState::Ready).await;
    assert_eq!((ready.pid, ready.restarts), (loading.pid, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn but_one_that_does_nothing_is_ended() {
    let node = Node::misbehaving("loading").await;
    node.coordinator
        .offer(ID, DeploymentSpec { load_timeout_ms: Some(TIMEOUT_MS), stop_grace_ms: Some(200), ..tiny() });
    let loading = node.reported(ID, InstanceState::Loading).await;
    // Stopped, it does not even answer probes.
    support::signal(loading.pid, nix::sys::signal::Signal::SIGSTOP);
    wait_for("its end", || {
        node.events(ID, "BackOff").first().map(|m| assert!(m.contains("no progress for 2 s"), "{m}"))
    })
    .await;
}
