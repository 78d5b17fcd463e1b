//! Another program gets the very pid that a record names: it is neither adopted nor signalled, and the instance is started
//! anew; whether that happens between two agents or in the middle of an adoption, also when it is a llama-server itself.
//!
//! Runs in a pid namespace of its own, whose next pid can be set: needs to be root, or to be allowed user namespaces.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{InstanceState, StatusReport};
use nix::{
    sys::{signal::Signal, wait::waitpid},
    unistd::{Pid, geteuid},
};
use std::{
    fs,
    process::{Child, Command, Stdio},
};
use support::{Node, misbehaving, signal, wait_for};

const ID: &str = "tiny-234567";
/// Set within the namespace.
const INSIDE: &str = "DROVER_TEST_PID_NAMESPACE";
/// A pid is missed when a thread begins in the same moment.
const ATTEMPTS: u32 = 1_000;

/// Runs a test of this file in a pid namespace, with its process as the first one there: what loses its parent is its child.
fn in_a_namespace(name: &str, body: impl Future<Output = ()>) {
    if std::env::var_os(INSIDE).is_some() {
        return tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap().block_on(body);
    }
    let mut command = Command::new("unshare");
    if !geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    let probe = Command::new("unshare").args(command.get_args()).arg("true").output().expect("unshare (util-linux)");
    let said = String::from_utf8_lossy(&probe.stderr);
    assert!(probe.status.success(), "no pid namespace can be made: run this test as root ({said})");
    let output = command
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("1 passed"), "within the namespace: {said}");
}

/// Kills a child of this process, or one that lost its parent, so that its pid is free.
fn end(pid: i64) {
    signal(pid, Signal::SIGKILL);
    waitpid(Pid::from_raw(i32::try_from(pid).unwrap()), None).unwrap();
}

/// A process that nobody may touch; ends with the test.
struct Bystander(Child);

impl Bystander {
    /// The program gets this pid, which is free.
    fn take(pid: i64, mut program: Command) -> Self {
        for _ in 0..ATTEMPTS {
            fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
            let mut child = program.spawn().unwrap();
            if i64::from(child.id()) == pid {
                return Self(child);
            }
            child.kill().unwrap();
            child.wait().unwrap();
        }
        panic!("pid {pid} could not be had again");
    }

    fn is_untouched(&mut self) {
        assert_eq!(self.0.try_wait().unwrap(), None, "it was signalled");
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn sleep(_: &Node) -> Command {
    let mut command = Command::new("sleep");
    command.arg("600");
    command
}

/// The very program that the record names, started by hand.
fn server(node: &Node) -> Command {
    let mut command = Command::new(&node.program);
    let _ = fs::remove_file(node.path("by-hand.sock"));
    command.arg("--host").arg(node.path("by-hand.sock")).args(["--model", "by-hand"]).stdout(Stdio::null());
    command
}

/// A node with a server, and no agent; the pids of server and shim.
async fn left() -> (Node, StatusReport, i64) {
    let mut node = Node::idle("[restarts]\nbackoff_first_ms = 10\n").await;
    node.program = misbehaving();
    node.start_agent().await;
    let ready = node.run(ID).await;
    let shim = node.processes(ID).into_iter().map(i64::from).find(|pid| *pid != ready.pid).expect("a shim");
    node.kill_agent();
    (node, ready, shim)
}

/// The server is started anew, beside the other program, and ended; the other never notices.
async fn started_anew(node: &Node, before: &StatusReport, mut other: Bystander) {
    let again = node.report("the next server", ID, |r| r.state() == InstanceState::Ready && r.pid != before.pid).await;
    assert_eq!(i64::from(node.record(ID).process.pid), again.pid);
    other.is_untouched();
    node.coordinator.stop(ID);
    node.reported(ID, InstanceState::Stopped).await;
    node.nothing_left(ID, "stopped").await;
    other.is_untouched();
    assert!(!node.coordinator.state().events.iter().any(|e| e.reason == "IdentityUnknown"));
}

async fn between_agents(program: fn(&Node) -> Command) {
    let (mut node, ready, shim) = left().await;
    // The shim first: it would make the end durable.
    end(shim);
    end(ready.pid);
    let other = Bystander::take(ready.pid, program(&node));
    node.start_agent().await;
    started_anew(&node, &ready, other).await;
}

#[test]
fn between_two_agents() {
    in_a_namespace("between_two_agents", between_agents(sleep));
}

#[test]
fn between_two_agents_by_another_llama_server() {
    in_a_namespace("between_two_agents_by_another_llama_server", between_agents(server));
}

/// The pid changes hands while an agent is held at a step of its adoption.
async fn at(step: &'static str) -> (Node, StatusReport, Bystander) {
    let (mut node, ready, shim) = left().await;
    node.fail_point = Some((step, "pause"));
    node.spawn_agent();
    let agent = node.paused().await;
    end(shim);
    end(ready.pid);
    let other = Bystander::take(ready.pid, server(&node));
    if step == "adopt.verified" {
        node.coordinator.stop(ID);
    }
    signal(i64::from(agent), Signal::SIGCONT);
    wait_for("the agent's ready file", || node.path("ready.json").exists().then_some(())).await;
    (node, ready, other)
}

#[test]
fn after_the_record_was_read() {
    in_a_namespace("after_the_record_was_read", async {
        let (node, ready, other) = at("adopt.read").await;
        started_anew(&node, &ready, other).await;
    });
}

#[test]
fn after_the_handle_was_opened() {
    in_a_namespace("after_the_handle_was_opened", async {
        let (node, ready, other) = at("adopt.opened").await;
        started_anew(&node, &ready, other).await;
    });
}

#[test]
fn after_the_identity_was_verified() {
    in_a_namespace("after_the_identity_was_verified", async {
        let (node, _, mut other) = at("adopt.verified").await;
        // It is not wanted: what was verified is told to end, through its handle.
        node.reported(ID, InstanceState::Stopped).await;
        node.nothing_left(ID, "stopped").await;
        other.is_untouched();
    });
}
