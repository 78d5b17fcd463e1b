//! A session that ran out costs no server: what runs is claimed again under a higher token, or goes on until it is told.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::{
    status::reason,
    v1::{EndRun, InstanceState, Token},
};
use nix::sys::signal::Signal;
use support::{Answer, Node, is_alive, signal, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn and_raises_the_token_on_disk_first() {
    let node = Node::start().await;
    let before = node.run("tiny-234567").await;
    node.coordinator.expire();
    let after = node.report("the higher token", "tiny-234567", |r| r.token > before.token).await;
    assert_eq!((after.state(), after.pid), (InstanceState::Ready, before.pid));
    let (token, claim) = (after.token.unwrap(), node.coordinator.state().claims[1].clone());
    assert_eq!((claim.recorded_token, claim.offer_revision), (before.token, 0));
    assert_eq!(node.record("tiny-234567").token.revision, token.revision);
    assert_eq!(node.spec("tiny-234567").token.revision, token.revision);
    assert_eq!(i64::from(node.record("tiny-234567").process.pid), before.pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn and_does_so_in_a_restored_store_whose_revisions_are_lower() {
    let node = Node::start().await;
    let before = node.run("tiny-234567").await;
    {
        let mut state = node.coordinator.state();
        (state.generation, state.revision) = (2, 10);
    }
    node.coordinator.expire();
    let after = node.report("the higher token", "tiny-234567", |r| r.token > before.token).await;
    assert_eq!((after.state(), after.pid), (InstanceState::Ready, before.pid));
    let token = after.token.unwrap();
    assert!(token.generation == 2 && token.revision < before.token.unwrap().revision, "{token}");
    assert_eq!(node.record("tiny-234567").token.generation, 2);
    assert_eq!(node.spec("tiny-234567").token.generation, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn and_keeps_them_running_while_another_holds_the_claim_until_it_is_told_to_yield() {
    let node = Node::start().await;
    let before = node.run("tiny-234567").await;
    let token = before.token.unwrap();
    node.coordinator.state().answers.push_back(Answer::Refuse(reason::ALREADY_CLAIMED));
    node.coordinator.expire();
    wait_for("the attempt", || (node.coordinator.state().claims.len() == 2).then_some(())).await;
    let order = |revision| EndRun {
        instance: "tiny-234567".to_owned(),
        yields_to: Some(Token { generation: token.generation, revision }),
    };
    // Void: it holds that token itself.
    node.coordinator.state().answers.extend([Answer::Refuse(reason::ALREADY_CLAIMED); 50]);
    node.coordinator.change(|state| state.end_runs = vec![order(token.revision)]);
    let claims = node.coordinator.state().claims.len();
    wait_for("another attempt", || (node.coordinator.state().claims.len() > claims).then_some(())).await;
    assert!(is_alive(before.pid));
    node.coordinator.change(|state| state.end_runs = vec![order(token.revision + 1)]);
    wait_for("the end", || (!is_alive(before.pid)).then_some(())).await;
    let directory = node.directory("tiny-234567");
    // The set is applied again every few seconds; what has ended and is not owned goes then.
    wait_for("its files to go", || (!directory.path().exists()).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn but_starts_nothing_while_it_has_none() {
    let node = Node::start().await;
    let before = node.run("tiny-234567").await;
    node.coordinator.change(|state| state.answering = false);
    node.coordinator.cut();
    // Past the end of its session the agent still keeps what runs, and no more.
    let ttl = std::time::Duration::from_millis(node.coordinator.state().ttl_ms.unsigned_abs());
    let began = std::time::Instant::now();
    wait_for("the end of the session", || (began.elapsed() > ttl).then_some(())).await;
    assert!(is_alive(before.pid));
    signal(before.pid, Signal::SIGKILL);
    wait_for("the refusal", || node.log().contains("nothing is started until it has one").then_some(())).await;
    assert_eq!(i64::from(node.record("tiny-234567").process.pid), before.pid, "no other was recorded");
    node.coordinator.state().answering = true;
    let what = "the restarted server";
    node.report(what, "tiny-234567", |r| r.state() == InstanceState::Ready && r.pid != before.pid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn and_an_older_store_is_refused() {
    let node = Node::start().await;
    node.run("tiny-234567").await;
    node.coordinator.state().generation = 0;
    node.coordinator.cut();
    wait_for("the refusal", || node.log().contains("an older copy of the store").then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn and_a_store_that_was_lost_and_begun_anew_ends_no_server() {
    let node = Node::start().await;
    let before = node.run("tiny-234567").await;
    {
        // It knows of nothing, whatever its revisions and its generation are.
        let mut state = node.coordinator.state();
        (state.store_id, state.generation) = ("store-2".to_owned(), 2);
        state.end_runs = vec![EndRun { instance: "tiny-234567".to_owned(), yields_to: None }];
    }
    node.coordinator.expire();
    wait_for("the refusal", || node.log().contains("begun anew").then_some(())).await;
    assert!(is_alive(before.pid));
    // The one that it knows is back.
    {
        let mut state = node.coordinator.state();
        (state.store_id, state.generation, state.end_runs) = ("store-1".to_owned(), 1, vec![]);
    }
    node.coordinator.expire();
    let after = node.report("the higher token", "tiny-234567", |r| r.token > before.token).await;
    assert_eq!(after.pid, before.pid);
    let hello = node.coordinator.state().hellos.last().unwrap().clone();
    assert_eq!((hello.store_id.as_str(), hello.store_generation), ("store-1", 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn and_an_older_copy_of_the_store_ends_none_either() {
    let node = Node::start().await;
    let before = node.run("tiny-234567").await;
    let revision = {
        let mut state = node.coordinator.state();
        std::mem::replace(&mut state.revision, 10)
    };
    node.coordinator.expire();
    wait_for("the refusal", || node.log().contains("an older copy of the store").then_some(())).await;
    assert!(is_alive(before.pid));
    node.coordinator.state().revision = revision;
    node.coordinator.expire();
    node.report("the higher token", "tiny-234567", |r| r.token > before.token).await;
}
