//! Where the agent's unit asks the kernel to spare it when memory is short, the shim is spared too and the server is not.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test"
)]

mod support;
use std::fs;
use support::{Stage, kill};

fn adjustment(of: impl std::fmt::Display) -> i32 {
    fs::read_to_string(format!("/proc/{of}/oom_score_adj")).unwrap().trim().parse().unwrap()
}

/// What this process has, every shim that it starts has.
fn under(value: i32) -> Option<(i32, i32)> {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", value.to_string()) {
        eprintln!("left out: oom_score_adj {value} can't be set here: {error}");
        return None;
    }
    let stage = Stage::new();
    let mut shim = stage.run(&stage.shell("sleep 600"));
    let pid = shim.released();
    let found = (adjustment(shim.child.id()), adjustment(pid));
    kill(pid);
    stage.exit();
    shim.child.wait().unwrap();
    Some(found)
}

#[test]
fn but_what_makes_it_more_likely_to_be_ended() {
    let before = adjustment("self");
    assert!(under(-500).is_none_or(|found| found == (-500, 0)));
    assert!(under(300).is_none_or(|found| found == (300, 300)));
    let _ = fs::write("/proc/self/oom_score_adj", before.to_string());
}
