//! A server that the kernel ends because memory is short (OOM): status and event say so; one that was killed by hand in the
//! same place is not said to be that.
//!
//! Needs a memory controller, version 1 or 2, below which this user may make a cgroup: to be root.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::InstanceState;
use drover_shim::{
    membership,
    record::{self, Exit},
};
use nix::sys::signal::Signal;
use std::{fs, path::PathBuf};
use support::{Node, misbehaving, signal, wait_for};

const ID: &str = "tiny-234567";
const LIMIT_BYTES: u64 = 600 << 20;

/// A cgroup with little memory; removed with the test.
struct Limited(PathBuf);

impl Limited {
    fn make(name: &str) -> Self {
        let of = membership::of(i32::try_from(std::process::id()).unwrap());
        let name = format!("drover-test-{}-{name}", std::process::id());
        let mut tried = Vec::new();
        for (parent, limit) in [(of.memory, "memory.limit_in_bytes"), (of.unified, "memory.max")] {
            let Some(path) = parent.map(|parent| parent.join(&name)) else { continue };
            let limited = Self(path.clone());
            match fs::create_dir(&path).and_then(|()| fs::write(path.join(limit), LIMIT_BYTES.to_string())) {
                Ok(()) => return limited,
                Err(error) => tried.push(format!("{}: {error}", path.join(limit).display())),
            }
        }
        panic!(
            "this test limits the memory of a cgroup of its own: run it as root on a host with a memory controller; {tried:?}"
        )
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        // What was ended leaves it in a moment.
        for _ in 0..500 {
            match fs::remove_dir(&self.0) {
                Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                _ => return,
            }
        }
    }
}

/// A node in such a cgroup, with a server that takes memory when it is told to. Dropped before its cgroup.
async fn node(limited: &Limited) -> Node {
    let mut node = Node::idle("").await;
    node.config =
        format!("[llama_server_environment]\nMISBEHAVE = 'hungry'\nCHILD_FILE = '{}'\n", node.path("hunger").display());
    node.program = misbehaving();
    let script = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", limited.0.display());
    node.wrapper = ["sh", "-c", &script, "sh"].map(str::to_owned).to_vec();
    node.start_agent().await;
    node.run(ID).await;
    node
}

fn exit(node: &Node) -> Option<Exit> {
    record::read(&node.directory(ID).exit()).ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn by_status_and_event() {
    let limited = Limited::make("oom");
    let node = node(&limited).await;
    fs::write(node.path("hunger"), "").unwrap();
    let ended = node.reported(ID, InstanceState::Backoff).await;
    assert_eq!(ended.exit_signal, Some(9));
    assert!(ended.message.contains("killed by the kernel because memory was short (OOM)"), "{}", ended.message);
    wait_for("the event", || {
        let events = node.coordinator.state().events.clone();
        events.iter().any(|e| e.reason == "OomKilled" && e.instance == ID).then_some(())
    })
    .await;
    node.report("the next server", ID, |r| r.state() == InstanceState::Ready && r.restarts == 1).await;
    drop(node);
}

#[tokio::test(flavor = "multi_thread")]
async fn and_a_kill_by_hand_is_none() {
    let limited = Limited::make("kill");
    let mut node = node(&limited).await;
    let pid = node.coordinator.last_report(ID).unwrap().pid;
    node.kill_agent();
    signal(pid, Signal::SIGKILL);
    let exit = wait_for("the record of the end", || exit(&node)).await;
    assert_eq!((exit.signal, exit.oom_killed), (Some(9), Some(false)));
    node.wrapper.clear();
    node.start_agent().await;
    node.report("the next server", ID, |r| r.state() == InstanceState::Ready && r.pid != pid).await;
    assert!(!node.coordinator.state().events.iter().any(|e| e.reason == "OomKilled"));
    drop(node);
}
