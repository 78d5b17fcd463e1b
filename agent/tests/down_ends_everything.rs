//! `drover-agent down` ends servers, shims and the proxy of a state folder, and touches nothing while an agent lives.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use std::process::{Command, Output};
use support::{Node, is_alive, wait_for};

fn down(node: &Node) -> Output {
    Command::new(env!("CARGO_BIN_EXE_drover-agent"))
        .args(["down", "--state-dir"])
        .arg(node.path("state"))
        .output()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn and_leaves_no_process_socket_or_directory() {
    let mut node = Node::start().await;
    let one = node.run("tiny-234567").await;
    let other = node.run("tiny-333333").await;
    // One whose shim is gone is ended too.
    let shim = drover_shim::identity::stat(i32::try_from(other.pid).unwrap()).map(|_| shim_of(&node, "tiny-333333"));
    support::signal(shim.unwrap(), nix::sys::signal::Signal::SIGKILL);
    node.end_agent().await;
    let output = down(&node);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!is_alive(one.pid) && !is_alive(other.pid));
    assert_eq!(std::fs::read_dir(node.path("state/instances")).unwrap().count(), 0);
    let sockets = std::fs::read_dir(node.path("state/run")).unwrap().map(|e| e.unwrap().file_name());
    assert!(sockets.filter(|name| name.to_string_lossy().ends_with(".sock")).count() == 0);
    let ours = node.root.path().to_str().unwrap().to_owned();
    wait_for("the last process", || command_lines().iter().all(|(_, line)| !line.contains(&ours)).then_some(())).await;
    assert!(down(&node).status.success(), "a second time there is nothing to do");
}

#[tokio::test(flavor = "multi_thread")]
async fn but_not_under_a_living_agent() {
    let mut node = Node::start().await;
    let ready = node.run("tiny-234567").await;
    let output = down(&node);
    assert!(!output.status.success());
    let pid = node.agent.as_ref().unwrap().id();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("another agent uses it") && said.contains(&format!("pid {pid}")), "{said}");
    assert!(is_alive(ready.pid));
    node.end_agent().await;
}

fn shim_of(node: &Node, instance: &str) -> i64 {
    let directory = node.directory(instance);
    let name = directory.path().to_str().unwrap();
    let found = command_lines().into_iter().find(|(_, line)| line.contains("drover-shim") && line.contains(name));
    found.expect("a shim").0
}

/// All processes that are no zombies, with their command lines.
fn command_lines() -> Vec<(i64, String)> {
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i64>().ok())
        .filter(|&pid| is_alive(pid) && pid != i64::from(std::process::id()))
        .filter_map(|pid| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            Some((pid, String::from_utf8_lossy(&line).replace('\0', " ")))
        })
        .collect()
}
