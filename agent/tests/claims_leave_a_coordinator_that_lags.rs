//! A coordinator whose view of the store lags makes no claim: the next one is asked at once, and the session stays.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use support::{Node, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn for_new_claims_and_for_servers_that_are_claimed_again() {
    let mut node = Node::idle("").await;
    let replica = node.coordinator.replica(1).await;
    node.replicas.push(replica);
    node.start_agent().await;
    node.coordinator.state().lagging = true;
    let first = node.run("tiny-222222").await;
    node.run("tiny-333333").await;
    {
        let state = node.coordinator.state();
        assert_eq!(state.refused_for_lag, 1, "the second claim went where the first was made");
        assert_eq!((state.hellos.len(), state.claims.len()), (1, 2), "nothing was done, so nothing needed a resume");
    }
    node.coordinator.expire();
    let again = wait_for("both servers to be claimed again", || {
        let state = node.coordinator.state();
        (state.owned.len() == 2).then(|| state.owned["tiny-222222"].token.unwrap())
    })
    .await;
    assert!(Some(again) > first.token);
    let report = node.report("it under its new token", "tiny-222222", |r| r.token == Some(again)).await;
    assert_eq!(report.pid, first.pid);
}
