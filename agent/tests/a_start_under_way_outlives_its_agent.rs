//! An agent is killed in the middle of a start: its shim goes on, and what that starts is neither orphaned nor unrecorded.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::InstanceState;
use drover_shim::{
    durable, identity,
    record::{Directory, Record, Spec},
};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
};
use std::{fs::File, process::Command};
use support::{Node, is_alive, wait_for};

/// Holds the lock of an instance, as a shim does in the middle of a start.
async fn as_a_shim(directory: &Directory) -> Flock<File> {
    wait_for("the lock", || {
        let file = File::options().write(true).open(directory.lock()).unwrap();
        Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()
    })
    .await
}

/// An instance whose server has ended and whose agent was killed.
async fn ended(node: &mut Node) -> (Directory, Record) {
    let ready = node.run("tiny-234567").await;
    node.kill_agent();
    support::signal(ready.pid, Signal::SIGKILL);
    let directory = node.directory("tiny-234567");
    wait_for("the record of the end", || directory.exit().exists().then_some(())).await;
    (directory, node.record("tiny-234567"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_one_takes_nothing_away_from_under_a_shim() {
    let mut node = Node::start().await;
    let (directory, _) = ended(&mut node).await;
    let shim = as_a_shim(&directory).await;
    node.coordinator.change(|state| state.owned.clear());
    node.start_agent().await;
    // What is ready after the join was claimed after the set of claims was applied.
    node.run("tiny-333333").await;
    assert!(directory.path().exists(), "the shim would record its process in a directory that is gone");
    drop(shim);
    wait_for("its files to go", || (!directory.path().exists()).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_what_comes_of_it() {
    let mut node = Node::start().await;
    let (directory, _) = ended(&mut node).await;
    let shim = as_a_shim(&directory).await;
    // It is claimed and wanted: nothing is started beside the shim, and nothing is said to have ended.
    node.start_agent().await;
    let unsure = node.reported("tiny-234567", InstanceState::Starting).await;
    assert!(unsure.progressed_at.is_some(), "it is given up in the end: {unsure:?}");
    assert!(unsure.message.contains("a shim that an earlier agent has started is at work"), "{unsure:?}");
    node.coordinator.stop("tiny-234567");
    node.reported("tiny-234567", InstanceState::Draining).await;
    let stopped = |node: &Node| {
        let state = node.coordinator.state();
        state.reports.iter().any(|report| report.state() == InstanceState::Stopped)
    };
    assert!(!stopped(&node), "its claim would be another's while its server is started here");
    drop(shim);
    wait_for("the stop", || stopped(&node).then_some(())).await;
    wait_for("its files to go", || (!directory.path().exists()).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_has_not_looked_yet_finds_its_time_over() {
    let mut node = Node::start().await;
    let (directory, record) = ended(&mut node).await;
    // As an agent has written it that was killed right after it had forked the shim.
    let spec = Spec { start_deadline_ns: u64::MAX, ..node.spec("tiny-234567") };
    durable::write(&directory.spec(), &spec).unwrap();
    node.coordinator.change(|state| state.answering = false);
    node.spawn_agent();
    wait_for("the start to be called off", || (node.spec("tiny-234567").start_deadline_ns == 0).then_some(())).await;
    let refused = Command::new(support::shim()).arg(directory.path()).output().unwrap();
    assert_eq!(refused.status.code(), Some(14), "{refused:?}");
    assert!(!is_alive(i64::from(record.process.pid)));
}

#[tokio::test(flavor = "multi_thread")]
async fn down_ends_what_is_recorded_while_it_waits() {
    let mut node = Node::start().await;
    let (directory, mut record) = ended(&mut node).await;
    let shim = as_a_shim(&directory).await;
    let mut down = Command::new(env!("CARGO_BIN_EXE_drover-agent"));
    let mut down = down.args(["down", "--state-dir"]).arg(node.path("state")).spawn().unwrap();
    let lock = node.path("state/lock");
    wait_for("down to be at work", || {
        std::fs::read_to_string(&lock).is_ok_and(|pid| pid == down.id().to_string()).then_some(())
    })
    .await;
    let mut server = Command::new("/bin/sleep").arg("600").spawn().unwrap();
    let pid = i32::try_from(server.id()).unwrap();
    wait_for("its program", || {
        identity::executable(pid).is_ok_and(|e| e != std::env::current_exe().unwrap()).then_some(())
    })
    .await;
    record.process.pid = pid;
    record.process.start_ticks = identity::stat(pid).unwrap().start_ticks;
    record.process.executable = identity::executable(pid).unwrap();
    durable::write(&directory.record(), &record).unwrap();
    wait_for("the server's end", || (!is_alive(i64::from(pid))).then_some(())).await;
    server.wait().unwrap();
    drop(shim);
    let status = wait_for("the end of down", || down.try_wait().unwrap()).await;
    assert!(status.success(), "{status}");
    assert!(!directory.path().exists());
}
