//! An agent that was upgraded takes back what a shim one version older keeps, raises its token, ends it, and starts more
//! with such a shim; what a newer version has written is neither adopted nor ended, and named.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{InstanceState, StatusReport};
use drover_shim::{
    durable, failpoint,
    record::{self, Exit, FORMAT, RECORD_FORMAT, Record, SPEC_FORMAT, Spec},
};
use std::{fs, path::Path};
use support::{Node, is_alive, wait_for};

const ID: &str = "tiny-234567";
/// As the shim of format 1 has written them.
const FORMAT_1: [(&str, &str); 3] = [
    ("spec", include_str!("fixtures/format-1/spec")),
    ("record", include_str!("fixtures/format-1/record")),
    ("exit", include_str!("fixtures/format-1/exit")),
];

#[test]
fn its_files_are_read_and_written_as_it_would() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    for (name, text) in FORMAT_1 {
        fs::write(path(name), text).unwrap();
    }
    let spec: Spec = record::read(&path("spec")).unwrap();
    let old: Record = record::read(&path("record")).unwrap();
    let exit: Exit = record::read(&path("exit")).unwrap();
    assert_eq!((old.format, old.cgroup.clone(), old.process.file), (1, None, None));
    assert_eq!((exit.signal, exit.oom_killed), (Some(9), None), "it can't know");
    assert!(old.process.is(&exit.process));
    // What goes back to it is to the byte what it would have written.
    durable::write(&path("spec"), &spec).unwrap();
    durable::write(&path("record"), &old).unwrap();
    durable::write(&path("exit"), &exit).unwrap();
    for (name, text) in FORMAT_1 {
        assert_eq!(fs::read_to_string(path(name)).unwrap(), text, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn which_keeps_a_server() {
    let mut node = Node::idle("").await;
    node.environment = vec![(failpoint::FORMAT_VARIABLE, SPEC_FORMAT.to_string())];
    node.start_agent().await;
    let ready = node.run(ID).await;
    node.kill_agent();
    let old = node.record(ID);
    assert_eq!((old.format, old.cgroup, old.process.file), (SPEC_FORMAT, None, None), "else this test proves nothing");
    node.environment.clear();
    let before = node.coordinator.state().reports.len();
    node.coordinator.expire();
    node.start_agent().await;
    let again = wait_for("a report", || node.coordinator.state().reports.get(before).cloned()).await;
    assert_eq!((again.state(), again.pid), (InstanceState::Ready, ready.pid));
    assert!(again.token > ready.token, "claimed again");
    assert_eq!(node.record(ID).format, SPEC_FORMAT, "the format is its shim's");
    node.coordinator.stop(ID);
    assert_eq!(node.reported(ID, InstanceState::Stopped).await.exit_code, Some(0));
    node.nothing_left(ID, "an older shim").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn that_it_starts_itself() {
    let mut node = Node::idle("").await;
    node.start_agent().await;
    let first = node.run(ID).await;
    assert_eq!((node.record(ID).format, node.spec(ID).format), (RECORD_FORMAT, SPEC_FORMAT));
    node.kill_agent();
    // The agent's folder was upgraded, its shim was not yet.
    node.environment = vec![(failpoint::FORMAT_VARIABLE, SPEC_FORMAT.to_string())];
    node.start_agent().await;
    support::signal(first.pid, nix::sys::signal::Signal::SIGKILL);
    let next = |r: &StatusReport| r.state() == InstanceState::Ready && r.pid != first.pid;
    node.report("the next server", ID, next).await;
    assert_eq!(node.record(ID).format, SPEC_FORMAT);
}

/// Changes a value's format, and with it what it might mean.
fn raise_format(path: &Path) {
    let mut value: serde_json::Value = durable::read(path).unwrap();
    value["format"] = (FORMAT + 1).into();
    value["process"] = "in a form that is not known yet".into();
    durable::write(path, &value).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn and_leaves_alone_what_a_newer_one_keeps() {
    let mut node = Node::start().await;
    let ready = node.run(ID).await;
    node.kill_agent();
    let record = node.directory(ID).record();
    let known = fs::read(&record).unwrap();
    raise_format(&record);
    let newer = fs::read(&record).unwrap();
    node.start_agent().await;
    let told = format!("format {}", FORMAT + 1);
    let unsure = node.report("the newer record to be named", ID, |r| r.message.contains(&told)).await;
    assert_eq!(unsure.state(), InstanceState::Ready, "it answers for its model: {}", unsure.message);
    node.coordinator.stop(ID);
    node.reported(ID, InstanceState::Draining).await;
    assert!(is_alive(ready.pid), "it was ended on a guess");
    assert_eq!(node.processes(ID).len(), 2, "its shim and itself, and no second server");
    assert_eq!(fs::read(&record).unwrap(), newer, "it was written over");
    assert!(!node.path("state/damaged").exists(), "it is not damaged");
    // The version that knows it is back.
    fs::write(&record, known).unwrap();
    node.reported(ID, InstanceState::Stopped).await;
}
