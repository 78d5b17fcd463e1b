//! Crashes are noticed within a second and followed by a restart with backoff; what can't work fails and says why.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{DeploymentSpec, InstanceState};
use nix::sys::signal::Signal;
use std::{
    io::Write as _,
    time::{Duration, Instant},
};
use support::{Node, signal, tiny};

#[tokio::test(flavor = "multi_thread")]
async fn after_a_crash() {
    let node = Node::start().await;
    let ready = node.run("tiny-234567").await;
    signal(ready.pid, Signal::SIGKILL);
    let began = Instant::now();
    let backoff = node.reported("tiny-234567", InstanceState::Backoff).await;
    assert!(began.elapsed() < Duration::from_secs(1), "noticed after {:?}", began.elapsed());
    assert!(backoff.message.contains("signal 9"), "{}", backoff.message);
    assert_eq!((backoff.exit_signal, backoff.pid), (Some(9), 0));
    let again = node.reported("tiny-234567", InstanceState::Ready).await;
    assert_eq!((again.restarts, again.token), (1, ready.token));
    assert_ne!(again.pid, ready.pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn but_not_for_ever() {
    let node = Node::with("[restarts]\nbackoff_first_ms = 10\nquick_ends_max = 3\n").await;
    let mut last = node.run("tiny-234567").await.pid;
    for _ in 0..2 {
        signal(last, Signal::SIGKILL);
        let what = "the next server";
        let next = node.report(what, "tiny-234567", |r| r.state() == InstanceState::Ready && r.pid != last).await;
        last = next.pid;
    }
    signal(last, Signal::SIGKILL);
    let failed = node.reported("tiny-234567", InstanceState::Failed).await;
    assert!(failed.message.contains("crash loop: ended 3 times in a row"), "{}", failed.message);
    // A stop of what has failed needs nobody.
    node.coordinator.stop("tiny-234567");
    node.reported("tiny-234567", InstanceState::Stopped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_can_not_be_loaded_fails_with_the_server_s_own_words() {
    let mut node = Node::start().await;
    // The header is fine; what follows is cut off.
    let whole = std::fs::read(node.path("models/tiny.gguf")).unwrap();
    let cut = node.path("models/cut.gguf");
    std::fs::File::create(&cut).unwrap().write_all(&whole[..whole.len() / 2]).unwrap();
    node.coordinator.offer("cut-234567", DeploymentSpec { model_path: "cut.gguf".to_owned(), ..tiny() });
    let failed = node.reported("cut-234567", InstanceState::Failed).await;
    assert!(failed.message.contains("exited with code 1"), "{}", failed.message);
    assert!(failed.message.contains("failed to load model"), "{}", failed.message);
    assert_eq!(failed.exit_code, Some(1));
    // The next agent knows it too, and does not try again.
    node.kill_agent();
    let before = node.coordinator.state().reports.len();
    node.start_agent().await;
    support::wait_for("its report", || (node.coordinator.state().reports.len() > before).then_some(())).await;
    let reports = node.coordinator.state().reports.split_off(before);
    assert!(reports.iter().all(|r| r.state() == InstanceState::Failed && r.message == failed.message), "{reports:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_that_no_agent_saw_is_settled_by_the_next() {
    let mut node = Node::start().await;
    let ready = node.run("tiny-234567").await;
    node.kill_agent();
    signal(ready.pid, Signal::SIGKILL);
    let exit = node.directory("tiny-234567").exit();
    support::wait_for("the record of the end", || exit.exists().then_some(())).await;
    node.start_agent().await;
    assert!(!node.coordinator.state().hellos.last().unwrap().runs[0].alive);
    let what = "the restarted server";
    let again = node.report(what, "tiny-234567", |r| r.state() == InstanceState::Ready && r.pid != ready.pid).await;
    assert_eq!((again.restarts, again.exit_signal), (1, Some(9)));
}
