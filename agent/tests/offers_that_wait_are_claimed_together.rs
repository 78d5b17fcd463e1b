//! What is offered while a claim is under way is claimed by one call after it; an older coordinator gets one claim a call.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::{status::reason, v1::InstanceState};
use support::{Answer, Node, tiny, wait_for};

const FIRST: &str = "tiny-222222";
const OTHERS: [&str; 4] = ["tiny-333333", "tiny-444444", "tiny-555555", "tiny-666666"];

/// Offers one instance, and the others while its claim has no answer yet.
async fn offer_all(node: &Node) {
    node.coordinator.state().answers.push_back(Answer::GrantLate);
    node.coordinator.offer(FIRST, tiny());
    wait_for("the first claim", || (node.coordinator.state().claims.len() == 1).then_some(())).await;
    for other in OTHERS {
        node.coordinator.offer(other, tiny());
    }
    // The agent has read them once it has acknowledged what came after them, which is a heartbeat's answer.
    let beats = node.coordinator.state().heartbeats;
    wait_for("two heartbeats", || (node.coordinator.state().heartbeats >= beats + 2).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn by_one_call() {
    let node = Node::start().await;
    offer_all(&node).await;
    node.coordinator.state().answers.push_back(Answer::Refuse(reason::ALREADY_CLAIMED));
    node.coordinator.state().holding_answers = false;
    for ready in [FIRST, OTHERS[1], OTHERS[2], OTHERS[3]] {
        node.reported(ready, InstanceState::Ready).await;
    }
    let state = node.coordinator.state();
    assert_eq!(state.calls, [1, 4]);
    assert_eq!(state.hellos.len(), 1, "none needed a resume");
    assert!(!node.directory(OTHERS[0]).path().exists(), "another node has it");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_by_one_where_the_coordinator_is_older() {
    let node = Node::start().await;
    node.coordinator.state().one_by_one = true;
    offer_all(&node).await;
    node.coordinator.state().holding_answers = false;
    for ready in [FIRST].iter().chain(&OTHERS) {
        node.reported(ready, InstanceState::Ready).await;
    }
    let state = node.coordinator.state();
    assert!(state.calls.is_empty() && state.claims.len() == 5 && state.hellos.len() == 1, "{:?}", state.calls);
}
