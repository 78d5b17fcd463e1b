//! Where /proc hides a server from its agent, as hidepid and other mounts do, the agent goes by what it can know: its own
//! record, whether the pid lives, whether the socket answers for the model. Nothing is cut, ended or started on a guess.
//!
//! Needs to be root, or to be allowed to mount in a mount namespace of its own.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{InstanceState, StatusReport};
use nix::sys::signal::Signal;
use std::process::Command;
use support::{Node, is_alive, signal, wait_for};

const ID: &str = "tiny-234567";

/// Starts the node's next agent in a mount namespace in which these pids are hidden.
async fn start_blind(node: &mut Node, pids: &[i32]) {
    let list: Vec<String> = pids.iter().map(ToString::to_string).collect();
    let script = format!(
        "for p in {}; do mount -t tmpfs -o ro,size=4k none /proc/$p || exit 99; done; exec \"$@\"",
        list.join(" ")
    );
    let words = ["unshare", "--mount", "sh", "-c", &script, "sh"];
    let tried = Command::new("unshare").args(["--mount", "mount", "-t", "tmpfs", "none", "/mnt"]).output().unwrap();
    let said = String::from_utf8_lossy(&tried.stderr);
    assert!(tried.status.success(), "this test mounts in a namespace of its own and may not ({said}): run it as root");
    node.wrapper = words.map(str::to_owned).to_vec();
    node.start_agent().await;
    node.wrapper.clear();
}

/// Shows the pids again.
fn open_eyes(node: &Node, pids: &[i32]) {
    let agent = node.agent.as_ref().unwrap().id().to_string();
    for pid in pids {
        let place = format!("/proc/{pid}");
        let done = Command::new("nsenter").args(["--target", &agent, "--mount", "umount", &place]).status().unwrap();
        assert!(done.success(), "{place}");
    }
}

/// A server that serves, its agent killed, and the pids of it and its shim.
async fn left(node: &mut Node) -> (StatusReport, [i32; 2]) {
    let ready = node.run(ID).await;
    let server = i32::try_from(ready.pid).unwrap();
    let shim = node.processes(ID).into_iter().find(|pid| *pid != server).expect("a shim");
    node.kill_agent();
    (ready, [server, shim])
}

async fn told(node: &Node, reason: &str) {
    wait_for(&format!("the event {reason}"), || {
        let events = node.coordinator.state().events.clone();
        events.iter().any(|e| e.reason == reason && e.instance == ID).then_some(())
    })
    .await;
}

async fn unsure(node: &Node, ready: &StatusReport) -> StatusReport {
    let unsure = node.report("what can't be told", ID, |r| r.message.contains("can't be told")).await;
    assert_eq!((unsure.state(), unsure.pid), (InstanceState::Ready, ready.pid));
    assert!(unsure.message.contains("/proc/"), "{}", unsure.message);
    unsure
}

#[tokio::test(flavor = "multi_thread")]
async fn it_serves_and_is_taken_back_when_it_is_shown_again() {
    let mut node = Node::start().await;
    let (ready, pids) = left(&mut node).await;
    let before = node.coordinator.state().reports.len();
    start_blind(&mut node, &pids).await;
    unsure(&node, &ready).await;
    told(&node, "IdentityUnknown").await;
    assert_eq!(support::ask(&node, ID).await, 200, "its route is gone");
    // Not even for a moment it is said to be less than ready.
    let states = node.coordinator.state().reports[before..].iter().map(StatusReport::state).collect::<Vec<_>>();
    assert!(states.iter().all(|state| *state == InstanceState::Ready), "{states:?}");
    // A session that runs out meanwhile is no reason to lose it.
    node.coordinator.expire();
    let claimed = node.report("the next claim", ID, |r| r.token > ready.token).await;
    assert_eq!((claimed.state(), claimed.pid), (InstanceState::Ready, ready.pid));
    assert_eq!(support::ask(&node, ID).await, 200, "its route is gone");
    open_eyes(&node, &pids);
    told(&node, "IdentityKnown").await;
    let known = node.report("it to be known again", ID, |r| r.message.is_empty() && r.token == claimed.token).await;
    assert_eq!((known.state(), known.pid), (InstanceState::Ready, ready.pid));
    assert_eq!(node.processes(ID).len(), 2, "its shim and itself, and no second server");
    node.coordinator.stop(ID);
    assert_eq!(node.reported(ID, InstanceState::Stopped).await.exit_code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_claimed_again_by_an_agent_that_comes_after_its_session_has_run_out() {
    let mut node = Node::start().await;
    let (ready, pids) = left(&mut node).await;
    node.coordinator.expire();
    start_blind(&mut node, &pids).await;
    let claimed = node.report("the next claim", ID, |r| r.token > ready.token).await;
    assert_eq!((claimed.state(), claimed.pid), (InstanceState::Ready, ready.pid));
    assert_eq!(node.record(ID).token.revision, claimed.token.unwrap().revision, "on disk first");
    assert_eq!(support::ask(&node, ID).await, 200, "its route is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_not_signalled_before_it_is_shown_again() {
    let mut node = Node::start().await;
    let (ready, pids) = left(&mut node).await;
    start_blind(&mut node, &pids[..1]).await;
    unsure(&node, &ready).await;
    node.coordinator.stop(ID);
    let waits = node.reported(ID, InstanceState::Draining).await;
    assert!(waits.message.contains("end it by hand") && waits.message.contains(&ready.pid.to_string()), "{waits:?}");
    assert_eq!(support::ask(&node, ID).await, 503, "it is not wanted");
    assert!(is_alive(ready.pid), "it was ended on a guess");
    open_eyes(&node, &pids[..1]);
    node.reported(ID, InstanceState::Stopped).await;
    node.nothing_left(ID, "shown again").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn its_end_is_noticed_all_the_same() {
    let mut node = Node::start().await;
    let (ready, pids) = left(&mut node).await;
    start_blind(&mut node, &pids).await;
    unsure(&node, &ready).await;
    signal(ready.pid, Signal::SIGKILL);
    let next = node.report("the next server", ID, |r| r.state() == InstanceState::Ready && r.pid != ready.pid).await;
    assert!(is_alive(next.pid));
}
