//! Damaged files cost no server: they are set aside, named, and rebuilt from what else is known.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::InstanceState;
use std::{fs, path::Path};
use support::Node;

fn damage(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

async fn after_damage_of(files: &[&str]) {
    let mut node = Node::start().await;
    let ready = node.run("tiny-234567").await;
    node.kill_agent();
    for file in files {
        damage(&node.path("state").join(file));
    }
    let before = node.coordinator.state().reports.len();
    node.start_agent().await;
    support::wait_for("the report", || (node.coordinator.state().reports.len() > before).then_some(())).await;
    let report = node.reported("tiny-234567", InstanceState::Ready).await;
    assert_eq!(report.pid, ready.pid);
    let named = |file: &str| {
        let name = Path::new(file).file_name().unwrap().to_str().unwrap().to_owned();
        let events = node.coordinator.state().events.clone();
        events
            .iter()
            .any(|e| e.reason == "FileDamaged" && e.message.contains(&format!("{name} is damaged")))
            .then_some(())
    };
    for file in files {
        support::wait_for(&format!("{file} to be named"), || named(file)).await;
    }
    let aside = fs::read_dir(node.path("state/damaged")).map_or(0, Iterator::count);
    assert_eq!(aside, files.iter().filter(|f| f.starts_with("instances/")).count());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record() {
    after_damage_of(&["instances/tiny-234567/record"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spec_and_a_claim() {
    after_damage_of(&["instances/tiny-234567/spec", "instances/tiny-234567/claim"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_three_of_them() {
    after_damage_of(&["instances/tiny-234567/record", "instances/tiny-234567/spec", "instances/tiny-234567/claim"])
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_session() {
    let mut node = Node::start().await;
    let ready = node.run("tiny-234567").await;
    node.kill_agent();
    damage(&node.path("state/session"));
    // The old session is gone for this agent; here it has run out, and the server is claimed again.
    node.coordinator.expire();
    node.start_agent().await;
    assert_eq!(node.coordinator.state().hellos.last().unwrap().resume_session_id, "");
    let report = node.report("the higher token", "tiny-234567", |r| r.token > ready.token).await;
    assert_eq!((report.state(), report.pid), (InstanceState::Ready, ready.pid));
    assert!(node.path("state/session.damaged").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_was_lost_can_be_started_again() {
    let mut node = Node::start().await;
    let ready = node.run("tiny-234567").await;
    node.kill_agent();
    damage(&node.path("state/instances/tiny-234567/claim"));
    node.start_agent().await;
    let file = node.path("state/instances/tiny-234567/claim");
    support::wait_for("the claim to be on disk again", || file.exists().then_some(())).await;
    support::signal(ready.pid, nix::sys::signal::Signal::SIGKILL);
    let next = |r: &drover_proto::v1::StatusReport| r.state() == InstanceState::Ready && r.pid != ready.pid;
    node.report("the next server", "tiny-234567", next).await;
}
