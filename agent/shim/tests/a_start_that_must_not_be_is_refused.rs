//! Each refusal has its exit code, says why, and nothing runs afterwards.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_shim::{
    clock,
    record::{self, Record, Token},
};
use std::fs::File;
use support::{Stage, kill, wait_gone};

fn nothing_ran(stage: &Stage, code: i32, word: &str) {
    let (found, said) = stage.shim().refused();
    assert_eq!(found, code, "{said}");
    assert!(said.starts_with(&format!("refused {code} ")) && said.contains(word), "{said}");
    assert!(!stage.directory.path().join("ran").exists());
}

#[test]
fn after_the_start_deadline() {
    let stage = Stage::new();
    let mut spec = stage.shell("touch ran");
    spec.start_deadline_ns = clock::boottime_ns();
    stage.write(&spec);
    nothing_ran(&stage, 14, "deadline");
    spec.start_deadline_ns = u64::MAX;
    spec.boot_id = "of another boot".to_owned();
    stage.write(&spec);
    nothing_ran(&stage, 14, "deadline");
}

#[test]
fn while_halted() {
    let stage = Stage::new();
    let spec = stage.shell("touch ran");
    File::create(&spec.halt_file).unwrap();
    stage.write(&spec);
    nothing_ran(&stage, 15, "halt");
}

#[test]
fn under_a_lower_token_than_the_recorded_one() {
    let stage = Stage::new();
    let mut spec = stage.shell("exit 0");
    stage.run(&spec).released();
    stage.exit();
    spec.token = Token { generation: 1, revision: 9 };
    spec.arguments = vec!["-c".to_owned(), "touch ran".to_owned()];
    stage.write(&spec);
    // The first shim may hold the lock for another moment.
    support::wait_for("the first shim's end", || {
        let (code, said) = stage.shim().refused();
        (code != 10).then(|| assert_eq!(code, 11, "{said}"))
    });
    // A lower revision of a newer store is higher.
    spec.token = Token { generation: 2, revision: 1 };
    stage.write(&spec);
    stage.shim().released();
    assert_eq!(stage.exit().token, spec.token);
    assert!(stage.directory.path().join("ran").exists());
}

#[test]
fn while_another_shim_keeps_the_instance() {
    let stage = Stage::new();
    let pid = stage.run(&stage.shell("exec sleep 600")).released();
    stage.write(&stage.shell("touch ran"));
    nothing_ran(&stage, 10, "another shim");
    kill(pid);
    wait_gone(pid);
}

#[test]
fn while_the_recorded_server_lives_though_its_shim_is_dead() {
    let stage = Stage::new();
    let mut shim = stage.run(&stage.shell("exec sleep 600"));
    let pid = shim.released();
    // The record names /bin/sh's real path until the shell replaces itself, so it is corrected as sleep would have it.
    let mut record: Record = stage.record();
    support::wait_for("sleep", || {
        let now = drover_shim::identity::executable(pid).ok()?;
        (now != record.process.executable).then(|| record.process.executable = now)
    });
    record::write(&stage.directory.record(), &record).unwrap();
    shim.child.kill().unwrap();
    shim.child.wait().unwrap();
    stage.write(&stage.shell("touch ran"));
    nothing_ran(&stage, 12, "runs already");
    kill(pid);
    wait_gone(pid);
}

#[test]
fn from_a_damaged_spec() {
    let stage = Stage::new();
    stage.write(&stage.shell("touch ran"));
    let path = stage.directory.spec();
    let text = std::fs::read_to_string(&path).unwrap().replace("touch", "torch");
    std::io::Write::write_all(&mut File::create(&path).unwrap(), text.as_bytes()).unwrap();
    nothing_ran(&stage, 16, "damaged");
}

#[test]
fn under_a_token_that_was_raised_while_the_child_was_held() {
    let stage = Stage::new();
    let mut spec = stage.shell("touch ran");
    stage.write(&spec);
    let marker = stage.root.path().join("fail-point");
    let shim = std::process::Command::new(env!("CARGO_BIN_EXE_drover-shim"))
        .arg(stage.directory.path())
        .env(drover_shim::failpoint::VARIABLE, format!("start.recorded:pause:{}", marker.display()))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let pid = i32::try_from(shim.id()).unwrap();
    support::wait_for("the shim at its fail-point", || {
        drover_shim::identity::stat(pid).is_ok_and(|s| s.state == 'T').then_some(())
    });
    spec.token = Token { generation: 1, revision: 11 };
    stage.write(&spec);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGCONT).unwrap();
    assert_eq!(shim.wait_with_output().unwrap().status.code(), Some(11));
    wait_gone(stage.record().process.pid);
    assert!(!stage.directory.path().join("ran").exists());
}
