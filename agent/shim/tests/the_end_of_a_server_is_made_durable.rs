//! Exit code, signal, a program that can't be executed; and everything of the server ends with it.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use std::fs;
use support::{Stage, kill, wait_gone};

#[test]
fn with_its_exit_code() {
    let stage = Stage::new();
    let pid = stage.run(&stage.shell("echo a line; echo another >&2; exit 42")).released();
    let exit = stage.exit();
    assert_eq!((exit.code, exit.signal, exit.exec_error, exit.process.pid), (Some(42), None, None, pid));
    assert_eq!(exit.process, stage.record().process);
    assert!(stage.log().ends_with("\na line\nanother\n"), "{}", stage.log());
    assert_eq!(exit.oom_killed, Some(false));
}

#[test]
fn with_its_signal() {
    let stage = Stage::new();
    let pid = stage.run(&stage.shell("while :; do sleep 1; done")).released();
    kill(pid);
    let exit = stage.exit();
    assert_eq!((exit.code, exit.signal), (None, Some(9)));
}

#[test]
fn with_the_reason_when_it_was_never_executed() {
    let stage = Stage::new();
    let program = stage.root.path().join("no-program");
    fs::File::create(&program).unwrap();
    let mut shim = stage.run(&stage.spec(&program, &[]));
    assert!(shim.line().starts_with("held "));
    let said = shim.line();
    assert!(said.starts_with("failed Permission denied"), "{said}");
    let exit = stage.exit();
    assert_eq!(exit.code, Some(127));
    assert!(exit.exec_error.unwrap().contains("Permission denied"));
    assert!(stage.log().contains("could not be executed"));
}

#[test]
fn and_its_children_end_with_it() {
    let stage = Stage::new();
    let pid = stage.run(&stage.shell("sleep 600 & echo $! > child; wait")).released();
    let child: i32 = support::wait_for("the child's pid", || {
        fs::read_to_string(stage.directory.path().join("child")).ok()?.trim().parse().ok()
    });
    kill(pid);
    stage.exit();
    wait_gone(child);
}

#[test]
fn a_flood_of_output_is_bounded_and_never_blocks() {
    let stage = Stage::new();
    let mut spec = stage.shell("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done");
    (spec.log_bytes_max, spec.log_files_max) = (10_000, 2);
    stage.run(&spec).released();
    assert_eq!(stage.exit().code, Some(0));
    let log = stage.log();
    assert!(log.len() <= 20_000 && log.ends_with("line 19999\n"), "{} bytes", log.len());
}
