//! A shim that keeps a server has less than 1 MiB of memory of its own, so that fifty of them are no burden.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_shim::logs;
use std::fs;
use support::{Stage, kill, wait_for, wait_gone};

const BYTES_MAX: u64 = 1 << 20;

/// Memory of a process that it shares with none, in bytes.
fn private_bytes(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let kibibytes = |line: &str| line.split_ascii_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    let private = text.lines().filter(|line| line.starts_with("Private_"));
    private.map(|line| kibibytes(line).expect("Private_…: <n> kB")).sum::<u64>() << 10
}

#[test]
fn while_its_server_serves_and_prints() {
    // Several: of one alone the pages of its program, which all of them share, would count as its own.
    let shims = [(), (), ()].map(|()| {
        let stage = Stage::new();
        let script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; exec sleep 600";
        let mut spec = stage.shell(script);
        // Ten rotations.
        (spec.log_bytes_max, spec.log_files_max) = (20_000, 3);
        let mut shim = stage.run(&spec);
        let pid = shim.released();
        (stage, shim, pid)
    });
    for (stage, ..) in &shims {
        let current = logs::file(&stage.directory.log(), 0);
        wait_for("all lines", || fs::read_to_string(&current).ok()?.ends_with("line 19999\n").then_some(()));
    }
    for (_, shim, _) in &shims {
        let bytes = private_bytes(shim.child.id());
        println!("private memory of a shim: {} KiB", bytes >> 10);
        assert!(bytes < BYTES_MAX, "{bytes} bytes");
    }
    for (_, _, pid) in shims {
        kill(pid);
        wait_gone(pid);
    }
}
