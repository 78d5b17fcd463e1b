//! A record whose pid belongs to another process by now: that process is left alone, whatever is asked.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::InstanceState;
use drover_shim::{durable, identity};
use std::process::{Child, Command};
use support::{Node, is_alive};

/// A process that nobody may touch; ends with the test.
struct Bystander(Child);

impl Bystander {
    fn start() -> Self {
        Self(Command::new("/bin/sleep").arg("600").spawn().unwrap())
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Ends the server and lets its record name another process, as if the pid had been used again.
async fn with_reused_pid(node: &mut Node, change: impl FnOnce(&mut identity::Process, &Bystander)) -> Bystander {
    let ready = node.run("tiny-234567").await;
    node.kill_agent();
    support::signal(ready.pid, nix::sys::signal::Signal::SIGKILL);
    let directory = node.directory("tiny-234567");
    support::wait_for("the record of the end", || directory.exit().exists().then_some(())).await;
    let other = Bystander::start();
    let mut record = node.record("tiny-234567");
    change(&mut record.process, &other);
    durable::write(&directory.record(), &record).unwrap();
    other
}

async fn is_spared(mut node: Node, other: Bystander) {
    node.coordinator.stop("tiny-234567");
    node.start_agent().await;
    node.reported("tiny-234567", InstanceState::Stopped).await;
    assert!(is_alive(i64::from(other.pid())));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_another_start_time() {
    let mut node = Node::start().await;
    let other = with_reused_pid(&mut node, |process, other| {
        process.pid = other.pid();
        process.executable = identity::executable(process.pid).unwrap();
    })
    .await;
    is_spared(node, other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_another_executable() {
    let mut node = Node::start().await;
    let other = with_reused_pid(&mut node, |process, other| {
        process.pid = other.pid();
        process.start_ticks = identity::stat(process.pid).unwrap().start_ticks;
    })
    .await;
    // No pid is used again within a tick: this may be the server after all, seen under another name. Nothing is done to it,
    // and nothing in its place.
    node.start_agent().await;
    let unsure = node.reported("tiny-234567", InstanceState::Suspect).await;
    assert!(unsure.message.contains("can't be told") && unsure.message.contains("sleep"), "{}", unsure.message);
    node.coordinator.stop("tiny-234567");
    let unsure = node.reported("tiny-234567", InstanceState::Draining).await;
    assert!(unsure.message.contains(&format!("pid {}", other.pid())), "{}", unsure.message);
    let pid = other.pid();
    assert!(is_alive(i64::from(pid)) && node.processes("tiny-234567").is_empty());
    // Once that has ended there is nothing left to be told.
    drop(other);
    node.reported("tiny-234567", InstanceState::Stopped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn from_another_boot() {
    let mut node = Node::start().await;
    let other = with_reused_pid(&mut node, |process, other| {
        let pid = other.pid();
        *process = identity::Process {
            boot_id: "another".to_owned(),
            pid,
            start_ticks: identity::stat(pid).unwrap().start_ticks,
            executable: identity::executable(pid).unwrap(),
            file: identity::executable_file(pid).ok(),
        };
    })
    .await;
    is_spared(node, other).await;
}
