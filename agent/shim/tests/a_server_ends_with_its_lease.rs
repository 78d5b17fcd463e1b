//! Where its spec says so a server is over before its lease is, whatever it does itself; a renewal that comes in time is
//! seen, and without the file nothing starts.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_shim::{
    clock, failpoint,
    lease::{self, Times},
    record::{FORMAT, LEASED_FORMAT, RECORD_FORMAT, SPEC_FORMAT, Spec},
};
use std::fs;
use support::{Stage, wait_for, wait_gone};

const MS: u64 = 1_000_000;

/// It is asked to end in so many milliseconds, and ended so many later; its lease ends a long time after that.
fn times(term_ms: u64, kill_ms: u64) -> Times {
    let term_ns = clock::boottime_ns() + term_ms * MS;
    let kill_ns = term_ns + kill_ms * MS;
    Times { drain_ns: term_ns, term_ns, kill_ns, until_ns: kill_ns + 60_000 * MS }
}

fn leased(stage: &Stage, script: &str, times: Times) -> Spec {
    lease::write(&stage.directory.lease(), times).unwrap();
    Spec { format: LEASED_FORMAT, ends_with_lease: true, ..stage.shell(script) }
}

/// What the shim has recorded, as nanoseconds on CLOCK_BOOTTIME.
fn ended_ns(ended_at_ms: i64) -> u64 {
    let ago_ms = u64::try_from(clock::unix_ms() - ended_at_ms).unwrap();
    clock::boottime_ns() - ago_ms * MS
}

#[test]
fn it_is_asked_to_end_and_how_it_ended_is_on_record() {
    let stage = Stage::new();
    let times = times(1_500, 60_000);
    let spec = leased(&stage, "trap 'echo asked; exit 3' TERM; while :; do sleep 0.05; done", times);
    stage.run(&spec).released();
    let exit = stage.exit();
    assert_eq!((exit.format, exit.code, exit.lease_lost), (LEASED_FORMAT, Some(3), true));
    let ended_ns = ended_ns(exit.ended_at_ms);
    assert!(times.term_ns <= ended_ns + MS && ended_ns < times.until_ns, "{ended_ns} {times:?}");
    assert!(stage.log().contains("the lease was not renewed in time") && stage.log().ends_with("asked\n"));
}

#[test]
fn one_that_does_not_listen_is_killed_with_all_that_it_has_started() {
    let stage = Stage::new();
    let times = times(1_500, 300);
    let script = "trap '' TERM; setsid sleep 600 & echo $! > child; while :; do sleep 0.05; done";
    stage.run(&leased(&stage, script, times)).released();
    let child: i32 = wait_for("the child's pid", || {
        fs::read_to_string(stage.directory.path().join("child")).ok()?.trim().parse().ok()
    });
    let exit = stage.exit();
    assert_eq!((exit.signal, exit.lease_lost), (Some(9), true));
    let ended_ns = ended_ns(exit.ended_at_ms);
    assert!(times.kill_ns <= ended_ns + MS && ended_ns < times.until_ns, "{ended_ns} {times:?}");
    wait_gone(child);
}

#[test]
fn a_renewal_is_seen_and_an_end_of_its_own_is_no_loss() {
    let stage = Stage::new();
    let first = times(1_500, 60_000);
    let go = stage.root.path().join("go");
    let script = format!("while [ ! -e {} ]; do sleep 0.05; done; exit 7", go.display());
    stage.run(&leased(&stage, &script, first)).released();
    lease::write(&stage.directory.lease(), times(60_000, 60_000)).unwrap();
    wait_for("the first deadline to be over", || (clock::boottime_ns() > first.term_ns + 200 * MS).then_some(()));
    fs::write(go, "").unwrap();
    let exit = stage.exit();
    assert_eq!((exit.code, exit.lease_lost), (Some(7), false), "{}", stage.log());
}

#[test]
fn a_file_that_is_damaged_or_gone_counts_as_not_renewed() {
    for damage in [Some("99999999999999999999 a renewal by nobody\n"), None] {
        let stage = Stage::new();
        let times = times(1_500, 60_000);
        stage.run(&leased(&stage, "exec sleep 600", times)).released();
        match damage {
            Some(text) => fs::write(stage.directory.lease(), text).unwrap(),
            None => fs::remove_file(stage.directory.lease()).unwrap(),
        }
        let exit = stage.exit();
        assert_eq!((exit.signal, exit.lease_lost), (Some(15), true), "{damage:?}");
        assert!(times.term_ns <= ended_ns(exit.ended_at_ms) + MS);
    }
}

#[test]
fn all_others_live_on_whatever_lies_there() {
    let stage = Stage::new();
    let spec = Spec { format: SPEC_FORMAT, ends_with_lease: false, ..leased(&stage, "exec sleep 600", times(0, 0)) };
    let pid = stage.run(&spec).released();
    assert_eq!(stage.record().format, RECORD_FORMAT);
    support::kill(pid);
    let exit = stage.exit();
    assert_eq!((exit.format, exit.signal, exit.lease_lost), (RECORD_FORMAT, Some(9), false), "by us, not by its shim");
}

#[test]
fn nothing_starts_without_a_lease_that_is_known_and_leaves_time() {
    let stage = Stage::new();
    let spec = leased(&stage, "touch ran", times(0, 60_000));
    let refused = |word: &str| {
        let (code, said) = stage.run(&spec).refused();
        assert!(code == 18 && said.contains(word), "{said}");
    };
    refused("is about to end");
    fs::write(stage.directory.lease(), "damaged").unwrap();
    refused("is damaged");
    fs::remove_file(stage.directory.lease()).unwrap();
    refused("is not known");
    assert!(!stage.directory.path().join("ran").exists());
}

#[test]
fn an_older_shim_does_not_start_it() {
    let stage = Stage::new();
    stage.write(&leased(&stage, "touch ran", times(60_000, 60_000)));
    let shim = std::process::Command::new(env!("CARGO_BIN_EXE_drover-shim"))
        .arg(stage.directory.path())
        .env(failpoint::FORMAT_VARIABLE, (FORMAT - 1).to_string())
        .output()
        .unwrap();
    let said = String::from_utf8(shim.stdout).unwrap();
    assert!(shim.status.code() == Some(16) && said.contains("format is 3"), "{said}");
    assert!(!stage.directory.path().join("ran").exists());
}
