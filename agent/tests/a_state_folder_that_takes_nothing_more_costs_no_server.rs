//! A state folder that is full or read-only, on real mounts: what runs serves on and can be stopped, nothing is started,
//! and all goes on when there is room again.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]
#![allow(clippy::print_stderr, reason = "says why a test is left out")]

mod support;
use drover_proto::v1::InstanceState;
use nix::sys::signal::Signal;
use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Command, Output},
};
use support::{Node, signal, tiny, wait_for};

const ID: &str = "tiny-234567";
const OTHER: &str = "tiny-345672";
const KEPT: &str = "tiny-456723";
/// Set in the process that has mounts of its own.
const INSIDE: &str = "DROVER_TEST_OWN_MOUNTS";

/// Runs this very test again in a process whose mounts nobody else sees and that end with it. True in that process.
fn with_own_mounts(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let unshare = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(arguments).args(["--mount", "--propagation", "private"]);
        command
    };
    // Without being root: as root of a user namespace, where that is allowed.
    let root = nix::unistd::geteuid().is_root();
    let arguments: &[&str] = if root { &[] } else { &["--map-root-user"] };
    if !unshare(arguments).arg("true").status().is_ok_and(|status| status.success()) {
        eprintln!("left out: this user may not mount anything here");
        return false;
    }
    let mut command = unshare(arguments);
    command.arg(std::env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]).env(INSIDE, "1");
    assert!(command.status().unwrap().success());
    false
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Takes all the room that a file system has.
fn fill(folder: &Path) {
    let mut ballast = File::options().create(true).append(true).open(folder.join("ballast")).unwrap();
    let mut block = vec![0_u8; 1 << 20];
    while !block.is_empty() {
        while ballast.write_all(&block).is_ok() {}
        block.truncate(block.len() / 2);
    }
}

/// What the instance's server answers to its health check, through the proxy.
fn health(node: &Node) -> String {
    let ready: serde_json::Value = serde_json::from_slice(&fs::read(node.path("ready.json")).unwrap()).unwrap();
    let mut stream = TcpStream::connect(ready["proxy"].as_str().unwrap()).unwrap();
    stream.set_read_timeout(Some(support::PATIENCE)).unwrap();
    write!(stream, "GET /i/{ID}/health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn events(node: &Node, reason: &str) -> Vec<String> {
    let events = node.coordinator.state().events.clone();
    events.into_iter().filter(|event| event.reason == reason).map(|event| event.message).collect()
}

/// A node whose state folder is a small file system of its own, with a server on it.
async fn on_a_small_disk() -> (Node, drover_proto::v1::StatusReport) {
    let mut node = Node::idle("[restarts]\nbackoff_first_ms = 50\nbackoff_max_ms = 200\nquick_ends_max = 1000\n").await;
    let state = node.path("state");
    fs::create_dir(&state).unwrap();
    // Just above what must be free for a start.
    run("mount", &["-t", "tmpfs", "-o", "size=110m,mode=700", "tmpfs", state.to_str().unwrap()]);
    node.start_agent().await;
    let ready = node.run(ID).await;
    (node, ready)
}

#[tokio::test(flavor = "multi_thread")]
async fn full_while_a_server_runs() {
    if !with_own_mounts("full_while_a_server_runs") {
        return;
    }
    let (node, ready) = on_a_small_disk().await;
    let state = node.path("state");
    fill(&state);
    assert!(health(&node).starts_with("HTTP/1.1 200"), "it serves on");

    node.coordinator.offer(OTHER, tiny());
    wait_for("the offer to be declined with the reason", || {
        events(&node, "OfferDeclined").iter().any(|why| why.contains("nothing is started below")).then_some(())
    })
    .await;

    // A new session: the token can't be raised durably, so it is not raised, and the server is none the worse for it.
    node.coordinator.expire();
    let refusals = || node.log().matches("the token could not be raised").count();
    wait_for("a token that can't be raised, tried again", || (refusals() >= 2).then_some(())).await;
    assert_eq!(node.record(ID).token.revision, ready.token.unwrap().revision);
    assert!(support::is_alive(ready.pid) && health(&node).starts_with("HTTP/1.1 200"));
    fs::remove_file(state.join("ballast")).unwrap();
    let raised = node.report("the higher token", ID, |r| r.token > ready.token).await;
    assert_eq!((raised.state(), raised.pid), (InstanceState::Ready, ready.pid));

    // It crashes while there is no room: it is not started again, with the reason, and then it is.
    fill(&state);
    signal(ready.pid, Signal::SIGKILL);
    node.report("why it is not started again", ID, |r| {
        r.state() == InstanceState::Backoff && r.message.contains("are free in")
    })
    .await;
    // Each attempt ends spans, and soon there is no room for one.
    wait_for("the spans that are given up", || node.log().contains("spans can't be written to disk").then_some(()))
        .await;
    fs::remove_file(state.join("ballast")).unwrap();
    let again = node.report("the next server", ID, |r| r.state() == InstanceState::Ready && r.pid != ready.pid).await;

    // It is stopped while there is no room: it ends, though its end can't be written down.
    fill(&state);
    node.coordinator.stop(ID);
    wait_for("its end", || (!support::is_alive(again.pid)).then_some(())).await;
    node.reported(ID, InstanceState::Stopped).await;
    fs::remove_file(state.join("ballast")).unwrap();
    node.nothing_left(ID, "with room again").await;
    end(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_at_the_start_after_a_server_has_ended() {
    if !with_own_mounts("full_at_the_start_after_a_server_has_ended") {
        return;
    }
    let (mut node, ready) = on_a_small_disk().await;
    signal(ready.pid, Signal::SIGKILL);
    let second = node.report("the second server", ID, |r| r.state() == InstanceState::Ready && r.restarts == 1).await;
    node.kill_agent();
    signal(second.pid, Signal::SIGKILL);
    let state = node.path("state");
    wait_for("its end on disk", || node.directory(ID).exit().exists().then_some(())).await;
    fill(&state);
    node.start_agent().await;
    node.report("why it is not started", ID, |r| r.message.contains("its directory can't be prepared")).await;
    fs::remove_file(state.join("ballast")).unwrap();
    let third = node.report("the third server", ID, |r| {
        r.state() == InstanceState::Ready && ![ready.pid, second.pid].contains(&r.pid)
    });
    assert_eq!(third.await.restarts, 2, "what was learnt before is forgotten");
    end(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn full_log_lines_are_dropped_and_counted() {
    if !with_own_mounts("full_log_lines_are_dropped_and_counted") {
        return;
    }
    let (mut node, ready) = on_a_small_disk().await;
    let log = node.directory(ID).log().join("server.log");
    fill(&node.path("state"));
    let size = fs::metadata(&log).unwrap().len();
    // Completions are logged.
    for _ in 0..20 {
        let _ = completion(&node);
    }
    assert!(fs::metadata(&log).unwrap().len() < size + 8192, "there was room left");
    // An agent starts on it all the same, and takes the server back.
    node.kill_agent();
    let reports = node.coordinator.state().reports.len();
    node.start_agent().await;
    wait_for("its report", || (node.coordinator.state().reports.len() > reports).then_some(())).await;
    assert_eq!(node.reported(ID, InstanceState::Ready).await.pid, ready.pid);
    fs::remove_file(node.path("state/ballast")).unwrap();
    wait_for("the count of dropped lines", || {
        let _ = completion(&node);
        fs::read_to_string(&log).unwrap().contains(" log lines were dropped here").then_some(())
    })
    .await;
    node.coordinator.stop(ID);
    node.nothing_left(ID, "stopped").await;
    end(node).await;
}

/// One short completion.
fn completion(node: &Node) -> String {
    let ready: serde_json::Value = serde_json::from_slice(&fs::read(node.path("ready.json")).unwrap()).unwrap();
    let mut stream = TcpStream::connect(ready["proxy"].as_str().unwrap()).unwrap();
    stream.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let body = r#"{"prompt":"a","n_predict":1}"#;
    write!(
        stream,
        "POST /i/{ID}/completion HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// A disk that fails turns read-only under the programs that use it: ext4 does it on request.
#[tokio::test(flavor = "multi_thread")]
async fn read_only_while_a_server_runs() {
    if !with_own_mounts("read_only_while_a_server_runs") {
        return;
    }
    if !nix::unistd::geteuid().is_root() || fs::metadata("/dev/loop-control").is_err() {
        eprintln!("left out: no loop devices");
        return;
    }
    let mut node = Node::idle("[restarts]\nbackoff_first_ms = 50\nbackoff_max_ms = 200\nquick_ends_max = 1000\n").await;
    let (state, image) = (node.path("state"), node.path("disk.img"));
    File::create(&image).unwrap().set_len(256 << 20).unwrap();
    run("mkfs.ext4", &["-q", "-m", "0", image.to_str().unwrap()]);
    fs::create_dir(&state).unwrap();
    if !Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&state).status().unwrap().success() {
        eprintln!("left out: no loop mount is allowed here");
        return;
    }
    node.start_agent().await;
    let (first, kept) = (node.run(ID).await, node.run(KEPT).await);
    run("mount", &["-o", "remount,abort", state.to_str().unwrap()]);
    assert!(File::create(state.join("probe")).is_err(), "it takes writes still");
    assert!(health(&node).starts_with("HTTP/1.1 200"), "it serves on");

    node.coordinator.offer(OTHER, tiny());
    wait_for("the offer to be declined with the reason", || {
        events(&node, "OfferDeclined").iter().any(|why| why.contains("can't be written")).then_some(())
    })
    .await;
    signal(first.pid, Signal::SIGKILL);
    node.report("why it is not started again", ID, |r| {
        r.state() == InstanceState::Backoff && r.message.contains("Read-only file system")
    })
    .await;
    node.coordinator.stop(ID);
    node.reported(ID, InstanceState::Stopped).await;

    // The server of an agent that is gone is left alone, and the next agent says why it does not start.
    node.kill_agent();
    refused(&node, &agent(&node, &[]));
    assert!(support::is_alive(kept.pid));
    let (code, report) = support::check::check(&node);
    let instances = report["instances"].as_array().unwrap();
    let told = instances.iter().find(|instance| instance["id"] == KEPT).unwrap();
    assert_eq!(told["process"]["state"].as_str(), Some("matching"), "exit code {code}: {report:#}");

    // What is left can't be removed from this disk: it goes with it.
    signal(kept.pid, Signal::SIGTERM);
    wait_for("its end", || (!support::is_alive(kept.pid)).then_some(())).await;
    for shim in [ID, KEPT].into_iter().flat_map(|instance| node.processes(instance)) {
        signal(shim.into(), Signal::SIGKILL);
    }
    kill_proxy(&node);
    unmount(&state).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn read_only_at_the_start() {
    if !with_own_mounts("read_only_at_the_start") {
        return;
    }
    let mut node = Node::start().await;
    let ready = node.run(ID).await;
    node.kill_agent();
    // For the new agent alone: what runs has files open for writing.
    let state = node.path("state").display().to_string();
    let read_only = format!("mount --bind '{state}' '{state}' && mount -o remount,ro,bind '{state}' && exec \"$@\"");
    let prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", &read_only, "sh"];
    let output = agent(&node, &prefix);
    refused(&node, &output);
    assert!(support::is_alive(ready.pid));
    // The check works there too, and finds nothing wrong.
    let program = env!("CARGO_BIN_EXE_drover-agent");
    let check = [program, "check", "--state-dir", &state, "--llama-server", node.program.to_str().unwrap()];
    let told = Command::new(prefix[0]).args(&prefix[1..]).args(check).output().unwrap();
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stdout));
    node.start_agent().await;
    assert_eq!(node.reported(ID, InstanceState::Ready).await.pid, ready.pid);
}

/// Runs an agent that is to end by itself.
fn agent(node: &Node, prefix: &[&str]) -> Output {
    let words: Vec<String> = prefix.iter().map(|&word| word.to_owned()).chain(node.agent_words()).collect();
    Command::new(&words[0]).args(&words[1..]).output().unwrap()
}

fn refused(node: &Node, output: &Output) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    let last = error.lines().last().unwrap_or_default();
    let named = format!("state_dir = {}: ", node.path("state").display());
    assert!(
        last.contains(&named) && last.contains("Read-only file system") && last.contains("can write to"),
        "{error}"
    );
    assert!(!error.contains("panicked"), "{error}");
}

fn kill_proxy(node: &Node) {
    let proxy = std::os::unix::net::UnixStream::connect(node.path("state/run/proxy.sock")).unwrap();
    let pid = nix::sys::socket::getsockopt(&proxy, nix::sys::socket::sockopt::PeerCredentials).unwrap().pid();
    signal(i64::from(pid), Signal::SIGKILL);
}

/// Ends everything while the mount is still there.
async fn end(mut node: Node) {
    node.end_agent().await;
    let state = node.path("state");
    let down =
        Command::new(env!("CARGO_BIN_EXE_drover-agent")).arg("down").arg("--state-dir").arg(&state).output().unwrap();
    assert!(down.status.success(), "{}", String::from_utf8_lossy(&down.stderr));
    unmount(&state).await;
}

async fn unmount(folder: &Path) {
    let done = || Command::new("umount").arg(folder).output().is_ok_and(|output| output.status.success()).then_some(());
    wait_for("the mount to be free", done).await;
}
