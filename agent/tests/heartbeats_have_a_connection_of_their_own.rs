//! Heartbeats go over a connection of their own: what clogs the session's stream delays none. Where that connection is not to
//! be had the stream carries them, and when both are silent the session goes on elsewhere.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{DeploymentSpec, OnLeaseLost};
use drover_shim::{clock, lease};
use support::{Node, tiny, wait_for};

const ID: &str = "stop-234567";

/// Until when the session of the agent lives, as it knows: what it has told the shim of a server that ends with it.
fn until_ns(node: &Node) -> u64 {
    lease::read(&node.directory(ID).lease()).unwrap().until_ns
}

async fn serving() -> Node {
    let node = Node::start().await;
    let spec = DeploymentSpec { on_lease_lost: OnLeaseLost::Stop.into(), ..tiny() };
    node.coordinator.offer(ID, spec);
    node.reported(ID, drover_proto::v1::InstanceState::Ready).await;
    node
}

/// Waits until the lease lives for longer than it did by more than its time to live.
async fn renewed(node: &Node, what: &str) {
    let ttl_ns = node.coordinator.state().ttl_ms.unsigned_abs() * 1_000_000;
    let before = until_ns(node);
    wait_for(what, || (until_ns(node) > before + ttl_ns).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn which_a_clogged_stream_does_not_hold_up() {
    let node = serving().await;
    wait_for("heartbeats", || (node.coordinator.state().beats > 0).then_some(())).await;
    // Nothing of the stream is read, while reports and inventories come.
    node.coordinator.state().reading = false;
    renewed(&node, "renewals for longer than the lease").await;
    assert!(clock::boottime_ns() < until_ns(&node));
    assert_eq!(node.coordinator.state().hellos.len(), 1, "the session goes on over its stream");
    node.coordinator.state().reading = true;
    renewed(&node, "renewals afterwards").await;
    assert_eq!(node.coordinator.state().hellos.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn and_which_an_older_coordinator_does_not_know() {
    let mut node = Node::idle("").await;
    node.coordinator.state().taking_beats = false;
    node.start_agent().await;
    // More than fit into a time to live.
    wait_for("heartbeats on the stream", || (node.coordinator.state().heartbeats >= 20).then_some(())).await;
    let state = node.coordinator.state();
    assert_eq!((state.beats, state.hellos.len()), (0, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_carries_them_while_that_connection_is_broken() {
    let node = serving().await;
    wait_for("heartbeats", || (node.coordinator.state().beats > 0).then_some(())).await;
    {
        let mut state = node.coordinator.state();
        state.beat_streams_cut = usize::MAX;
    }
    renewed(&node, "renewals over the stream").await;
    let (streams, beats) = {
        let state = node.coordinator.state();
        assert_eq!(state.hellos.len(), 1);
        (state.beat_streams, state.beats)
    };
    assert!(streams > 1, "it is tried again");
    node.coordinator.state().beat_streams_cut = streams;
    wait_for("heartbeats of their own again", || (node.coordinator.state().beats > beats + 3).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn and_one_that_is_not_answered_ends_the_stream() {
    let node = serving().await;
    wait_for("heartbeats", || (node.coordinator.state().beats > 0).then_some(())).await;
    node.coordinator.state().answering = false;
    wait_for("another try", || node.log().contains("a heartbeat was not answered in time").then_some(())).await;
    node.coordinator.state().answering = true;
    wait_for("the session to be resumed", || (node.coordinator.state().hellos.len() > 1).then_some(())).await;
    renewed(&node, "renewals for the next stream").await;
    let state = node.coordinator.state();
    assert!(state.welcomes.iter().skip(1).all(|welcome| welcome.resumed), "{:?}", state.welcomes);
}
