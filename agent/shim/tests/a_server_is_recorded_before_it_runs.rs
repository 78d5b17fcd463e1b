//! The record is on disk before the program's first instruction, and an end of the shim in between leaves nothing.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_shim::{
    identity::{self, Verdict},
    record::{self, Record, Stage as Progress},
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::{
    fs,
    process::{Command, Stdio},
};
use support::{Stage, wait_for, wait_gone};

#[test]
fn the_program_itself_finds_its_record() {
    let stage = Stage::new();
    let mut spec = stage.shell("cat record > seen; echo $$ > pid");
    spec.environment.push(("ONLY".to_owned(), "this".to_owned()));
    stage.run(&spec).released();
    assert_eq!(stage.exit().code, Some(0));
    let seen = fs::read_to_string(stage.directory.path().join("seen")).unwrap();
    let pid = fs::read_to_string(stage.directory.path().join("pid")).unwrap();
    assert!(seen.contains(&format!("\"pid\":{}", pid.trim())), "{seen}");
    assert_eq!(stage.record().stage, Progress::Released);
}

/// The shim's output is a full pipe: it is held at the word "held", after the record and before the release.
#[test]
fn a_held_child_exits_when_its_shim_dies() {
    let stage = Stage::new();
    stage.write(&stage.shell("touch ran; exec sleep 600"));
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while nix::unistd::write(&writer, &[0; 4096]).is_ok() {}
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    let mut shim = Command::new(env!("CARGO_BIN_EXE_drover-shim"))
        .arg(stage.directory.path())
        .stdout(Stdio::from(writer))
        .spawn()
        .unwrap();
    let record: Record = wait_for("the record", || record::read(&stage.directory.record()).ok());
    assert_eq!(record.stage, Progress::Held);
    assert_eq!(identity::verify(&record.process, Some(&record.shim)), Verdict::Same);
    assert!(
        matches!(identity::verify(&record.process, None), Verdict::Unknown(_)),
        "it does not execute the program yet"
    );
    shim.kill().unwrap();
    shim.wait().unwrap();
    wait_gone(record.process.pid);
    assert!(!stage.directory.path().join("ran").exists());
    drop(reader);
}
