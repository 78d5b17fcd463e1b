//! An agent that is killed, or ends, leaves its servers; the next one takes them back, in the same session.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::InstanceState;
use support::{Node, is_alive, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn after_sigkill_the_next_agent_resumes_session_and_server() {
    let mut node = Node::start().await;
    let ready = node.run("tiny-234567").await;
    node.kill_agent();
    assert!(is_alive(ready.pid));
    let before = node.coordinator.state().reports.len();
    node.start_agent().await;
    let hello = node.coordinator.state().hellos.last().unwrap().clone();
    let welcome = node.coordinator.state().welcomes.last().unwrap().clone();
    assert!(welcome.resumed && hello.resume_session_id == welcome.session_id);
    assert_eq!((hello.runs.len(), hello.runs[0].alive, hello.runs[0].token), (1, true, ready.token));
    wait_for("the reports of the second agent", || (node.coordinator.state().reports.len() > before).then_some(()))
        .await;
    // Not even for a moment it is said to be less than ready: requests would be turned away.
    for report in &node.coordinator.state().reports[before..] {
        assert_eq!((report.state(), report.pid, report.token), (InstanceState::Ready, ready.pid, ready.token));
        assert_eq!(report.since, ready.since, "it has been ready all the while");
    }
    // And it is still watched: its end is noticed though it is nobody's child.
    support::signal(ready.pid, nix::sys::signal::Signal::SIGKILL);
    let backoff = node.reported("tiny-234567", InstanceState::Backoff).await;
    assert_eq!(backoff.exit_signal, Some(9));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_keeps_nothing_that_the_agent_has_inherited() {
    // Without close-on-exec: whoever started the agent waits for the end of such a pipe, not for the end of the proxy.
    let (_read, write) = nix::unistd::pipe().unwrap();
    let name = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&write))).unwrap();
    let node = Node::start().await;
    let socket = std::os::unix::net::UnixStream::connect(node.path("state/run/proxy.sock")).unwrap();
    let proxy = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials).unwrap().pid();
    let held = |pid: i64| {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        open.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok()).any(|file| file == name)
    };
    assert!(held(i64::from(node.agent.as_ref().unwrap().id())), "else this test proves nothing");
    assert!(!held(i64::from(proxy)));
    assert!(!held(node.run("tiny-234567").await.pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_the_agent_alone() {
    let mut node = Node::start().await;
    let ready = node.run("tiny-234567").await;
    let proxy: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(node.path("ready.json")).unwrap()).unwrap();
    node.end_agent().await;
    assert!(!node.path("ready.json").exists());
    assert!(is_alive(ready.pid));
    node.start_agent().await;
    let again: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(node.path("ready.json")).unwrap()).unwrap();
    assert_eq!(proxy, again, "the proxy has lived on");
    assert!(node.coordinator.state().welcomes.last().unwrap().resumed);
    let report = node.reported("tiny-234567", InstanceState::Ready).await;
    assert_eq!(report.pid, ready.pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_of_the_same_folder_is_refused() {
    let mut node = Node::start().await;
    let first = node.agent.take();
    node.spawn_agent();
    let mut second = node.agent.take().unwrap();
    node.agent = first;
    let status = wait_for("the second agent's end", || second.try_wait().unwrap()).await;
    assert!(!status.success());
    assert!(node.log().contains("another agent uses it"));
}
