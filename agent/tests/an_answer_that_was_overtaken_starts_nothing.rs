//! What a set of claims has said counts, though the answer to the claim itself comes after it.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{EndRun, InstanceState};
use support::{Answer, Node, is_alive, tiny, wait_for};

/// A node whose claim of `tiny-333333` was made and not answered yet, beside a server that shows which set was applied.
async fn with_a_late_answer() -> (Node, i64) {
    let node = Node::start().await;
    let other = node.run("tiny-234567").await;
    node.coordinator.state().answers.push_back(Answer::GrantLate);
    node.coordinator.offer("tiny-333333", tiny());
    wait_for("the claim", || node.coordinator.state().owned.contains_key("tiny-333333").then_some(())).await;
    (node, other.pid)
}

#[tokio::test(flavor = "multi_thread")]
async fn when_it_is_to_stop_already() {
    let (node, _) = with_a_late_answer().await;
    node.coordinator.change(|state| state.owned.values_mut().for_each(|claim| claim.wanted = false));
    node.reported("tiny-234567", InstanceState::Stopped).await;
    node.coordinator.state().holding_answers = false;
    node.reported("tiny-333333", InstanceState::Stopped).await;
    let state = node.coordinator.state();
    let said = state.reports.iter().filter(|r| r.instance == "tiny-333333").map(|r| r.state());
    assert_eq!(said.collect::<Vec<_>>(), [InstanceState::Stopped], "nothing was started");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_its_session_has_run_out() {
    let (node, other) = with_a_late_answer().await;
    let order = EndRun { instance: "tiny-234567".to_owned(), yields_to: None };
    node.coordinator.state().end_runs.push(order);
    node.coordinator.expire();
    // The set of the new session is applied: it holds no claim of this node.
    wait_for("the end that it orders", || (!is_alive(other)).then_some(())).await;
    node.coordinator.state().holding_answers = false;
    // Claims go one after the other: when this one runs, the late answer was heard.
    node.run("tiny-444444").await;
    assert!(!node.directory("tiny-333333").path().exists(), "a claim that is gone has started something");
}
