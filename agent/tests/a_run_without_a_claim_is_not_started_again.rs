//! What no claim of this node covers goes on while it serves, and is not started again once it has ended: somebody else may
//! have it by then, and a claim that is gone starts nothing, whichever session its answer finds.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::status::reason;
use nix::sys::signal::Signal;
use std::time::Duration;
use support::{Answer, Node, is_alive, signal, tiny, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn nor_under_the_token_of_a_session_that_is_gone() {
    let node = Node::start().await;
    let before = node.run("tiny-234567").await;
    node.coordinator.state().answers.extend([Answer::Refuse(reason::ALREADY_CLAIMED); 50]);
    node.coordinator.expire();
    wait_for("the attempt to claim it again", || (node.coordinator.state().claims.len() == 2).then_some(())).await;
    assert!(is_alive(before.pid));
    signal(before.pid, Signal::SIGKILL);
    // The pause before a restart is half a second, the next look at what is owned comes after five at the latest.
    wait_for("its files to go, or another server", || {
        let others: Vec<i32> =
            node.processes("tiny-234567").into_iter().filter(|pid| i64::from(*pid) != before.pid).collect();
        let servers: Vec<i32> = others.into_iter().filter(|pid| !is_its_shim(*pid)).collect();
        assert!(servers.is_empty(), "it was started again: {servers:?}");
        (!node.directory("tiny-234567").path().exists()).then_some(())
    })
    .await;
}

/// The shim of the server that has just ended may take a moment to go.
fn is_its_shim(pid: i32) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.is_empty() || name.starts_with("drover-shim")
}

#[tokio::test(flavor = "multi_thread")]
async fn nor_does_the_late_answer_to_a_claim_of_that_session_start_anything() {
    // The first start is held by its shim, and with it the registry, which waits to raise its token.
    let node = Node::armed("", Some(("start.locked", "pause"))).await;
    node.coordinator.state().ttl_ms = 20_000;
    node.coordinator.state().answers.extend([Answer::Grant, Answer::GrantLate]);
    node.coordinator.cut();
    wait_for("a long session", || (node.coordinator.state().hellos.len() == 2).then_some(())).await;
    node.coordinator.offer("first-234567", tiny());
    let shim = node.paused().await;
    node.coordinator.offer("late-2345678", tiny());
    wait_for("the claim", || node.coordinator.state().owned.contains_key("late-2345678").then_some(())).await;
    node.coordinator.change(|state| {
        let revision = state.revision;
        state.owned.get_mut("first-234567").unwrap().token.as_mut().unwrap().revision = revision;
    });
    let attempts = node.coordinator.state().claims.len();
    // Both claims are gone, and another node has them.
    node.coordinator.state().answers.extend([Answer::Refuse(reason::ALREADY_CLAIMED); 50]);
    node.coordinator.expire();
    wait_for("the next session", || (node.coordinator.state().hellos.len() == 3).then_some(())).await;
    node.coordinator.state().holding_answers = false;
    // The answer stands in line for the registry, before the set of the new session.
    passes(Duration::from_millis(300), || {}).await;
    signal(i64::from(shim), Signal::SIGCONT);
    wait_for("what became of the first", || (node.coordinator.state().claims.len() > attempts).then_some(())).await;
    passes(Duration::from_secs(2), || {
        assert!(!began(&node), "it was begun under a claim that is gone:\n{}", node.log());
    })
    .await;
    assert!(node.log().contains("its session was gone"), "the answer was not late");
}

/// Looks again and again for this long.
async fn passes(time: Duration, mut look: impl FnMut()) {
    let until = std::time::Instant::now() + time;
    wait_for("time to pass", || {
        look();
        (std::time::Instant::now() > until).then_some(())
    })
    .await;
}

fn began(node: &Node) -> bool {
    node.directory("late-2345678").record().exists()
}
