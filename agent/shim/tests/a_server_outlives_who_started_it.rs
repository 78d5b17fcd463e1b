//! SIGKILL of the process that spawned the shim, or of the shim itself, leaves a real llama-server serving.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    process::{Command, Stdio},
};
use support::{Stage, is_alive, kill, llama_server, wait_for, wait_gone};

fn health(socket: &Path) -> Option<String> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.starts_with("HTTP/1.1 200").then_some(answer)
}

fn stage_with_model() -> Stage {
    let stage = Stage::new();
    let model = stage.root.path().join("tiny.gguf");
    drover::tiny_model::write(&model, 1).unwrap();
    let socket = stage.root.path().join("one.sock");
    let words = ["-m", model.to_str().unwrap(), "--host", socket.to_str().unwrap(), "-c", "512", "-np", "1"];
    stage.write(&stage.spec(llama_server(), &words));
    stage
}

#[test]
fn when_the_spawner_is_killed() {
    let stage = stage_with_model();
    // A shell plays the agent: it spawns the shim and is killed with it still its child.
    let script = format!("{} {} & wait", env!("CARGO_BIN_EXE_drover-shim"), stage.directory.path().display());
    let mut spawner = Command::new("/bin/sh").args(["-c", &script]).stdout(Stdio::null()).spawn().unwrap();
    let socket = stage.root.path().join("one.sock");
    wait_for("the server", || health(&socket));
    let record = stage.record();
    spawner.kill().unwrap();
    spawner.wait().unwrap();
    assert!(health(&socket).is_some());
    assert!(is_alive(record.process.pid));
    // The shim still keeps it: its end is recorded.
    kill(record.process.pid);
    assert_eq!(stage.exit().signal, Some(9));
}

#[test]
fn when_the_shim_is_killed() {
    let stage = stage_with_model();
    let mut shim = stage.shim();
    let pid = shim.released();
    let socket = stage.root.path().join("one.sock");
    wait_for("the server", || health(&socket));
    shim.child.kill().unwrap();
    shim.child.wait().unwrap();
    assert!(health(&socket).is_some());
    assert!(!stage.directory.exit().exists());
    kill(pid);
    wait_gone(pid);
}

#[test]
fn and_the_shim_itself_outlives_sigterm() {
    let stage = Stage::new();
    let mut shim = stage.run(&stage.shell("while :; do sleep 1; done"));
    let pid = shim.released();
    let shim_pid = nix::unistd::Pid::from_raw(i32::try_from(shim.child.id()).unwrap());
    nix::sys::signal::kill(shim_pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    // SIGTERM reaches the server, since ignoring it is not inherited.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(stage.exit().signal, Some(15));
    assert!(shim.child.wait().unwrap().success());
}
