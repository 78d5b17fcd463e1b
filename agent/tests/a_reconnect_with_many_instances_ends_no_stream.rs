//! A node with more instances than its stream's queue has places reports all of them on one stream, heartbeats between.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{InstanceState, OwnedClaim, Token};
use std::collections::BTreeSet;
use support::{Node, tiny, wait_for};

const INSTANCES: usize = 600;

/// Claims whose model is not there: each has a supervisor and a state, and no process.
fn claims() -> impl Iterator<Item = OwnedClaim> {
    let spec = drover_proto::v1::DeploymentSpec { model_path: "absent.gguf".to_owned(), ..tiny() };
    (0..INSTANCES).map(move |n| OwnedClaim {
        instance: format!("many{n}-234567"),
        token: Some(Token { generation: 1, revision: 50 }),
        wanted: true,
        spec: Some(spec.clone()),
        revision: 1,
        memory_bytes: 1,
        traceparent: String::new(),
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_cut() {
    let node = Node::start().await;
    node.coordinator.change(|state| state.owned = claims().map(|claim| (claim.instance.clone(), claim)).collect());
    let reported = |from: usize| {
        let state = node.coordinator.state();
        let failed = state.reports[from..].iter().filter(|r| r.state() == InstanceState::Failed);
        let all: BTreeSet<String> = failed.map(|r| r.instance.clone()).collect();
        (all.len() == INSTANCES).then_some(())
    };
    wait_for("all to have failed", || reported(0)).await;
    let (from, streams) = {
        let state = node.coordinator.state();
        (state.reports.len(), state.hellos.len())
    };
    node.coordinator.cut();
    wait_for("all reports once more", || reported(from)).await;
    let state = node.coordinator.state();
    assert_eq!(state.hellos.len(), streams + 1, "the stream broke while it was full");
    assert_eq!(state.hellos.last().unwrap().runs.len(), INSTANCES);
}
