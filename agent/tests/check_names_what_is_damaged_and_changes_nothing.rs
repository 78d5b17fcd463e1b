//! `drover-agent check` names each damaged, cut or absent file of a node, with what follows, and changes nothing at all.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_shim::{durable, record::RECORD_FORMAT};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};
use support::{
    Node,
    check::{check, finding},
};

const ID: &str = "tiny-234567";

/// Every file below a folder: inode, mode, size, and when content and inode were changed last.
fn tree(folder: &Path) -> BTreeMap<PathBuf, [u64; 7]> {
    let mut all = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let file = fs::symlink_metadata(&path).unwrap();
            let times = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()].map(i64::cast_unsigned);
            let [mtime, mtime_nsec, ctime, ctime_nsec] = times;
            all.insert(
                path.clone(),
                [file.ino(), file.mode().into(), file.size(), mtime, mtime_nsec, ctime, ctime_nsec],
            );
            if file.is_dir() {
                folders.push(path);
            }
        }
    }
    all
}

/// Runs the check; the whole state folder is the same after it.
fn unchanged(node: &Node) -> (i32, Value) {
    let before = tree(&node.path("state"));
    let told = check(node);
    assert_eq!(tree(&node.path("state")), before);
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_node() {
    let mut node = Node::start().await;
    let ready = node.run(ID).await;
    let agent = node.agent.as_ref().unwrap().id();
    let (code, report) = check(&node);
    assert_eq!((code, &report["good"]), (0, &Value::Bool(true)), "{report:#}");
    assert_eq!(
        (report["agent"]["holder"].as_str(), report["agent"]["detail"].as_u64()),
        (Some("process"), Some(agent.into()))
    );
    let instance = &report["instances"][0];
    assert_eq!((instance["id"].as_str(), instance["process"]["state"].as_str()), (Some(ID), Some("matching")));
    assert_eq!(instance["process"]["pid"].as_i64(), Some(ready.pid));
    assert_eq!(
        (instance["stage"].as_str(), instance["record"]["version"].as_u64()),
        (Some("released"), Some(u64::from(RECORD_FORMAT)))
    );
    assert_eq!(instance["shim"]["holder"].as_str(), Some("process"));
    assert_eq!(report["proxy"]["lock"]["holder"].as_str(), Some("process"));
    assert_eq!(report["session"]["file"]["state"].as_str(), Some("good"));

    node.kill_agent();
    let (code, report) = unchanged(&node);
    assert_eq!((code, report["agent"]["holder"].as_str()), (0, Some("nobody")), "{report:#}");
    let text = support::check::output(&node, "table").1;
    assert!(text.contains(&format!("{ID}  ")) && text.ends_with("All is well.\n"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_kind_of_damage() {
    let mut node = Node::start().await;
    node.run(ID).await;
    node.kill_agent();
    let state = node.path("state");
    let spool = tree(&state.join("spool")).into_keys().find(|path| path.extension().is_some_and(|e| e == "spans"));
    let spool = spool.expect("spans wait in the spool: the coordinator of this test takes none");
    let files = ["spec", "record", "claim"].map(|name| state.join("instances").join(ID).join(name));
    let session = state.join("session");
    for path in files.iter().chain([&session, &spool]) {
        let good = fs::read(path).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        for (what, bytes) in [("a flipped bit", &flipped[..]), ("cut", &good[..good.len() / 2]), ("empty", b"")] {
            fs::write(path, bytes).unwrap();
            let (code, report) = unchanged(&node);
            let told =
                finding(&report, path).unwrap_or_else(|| panic!("{what}: {} is not named: {report:#}", path.display()));
            assert_eq!((code, told["severity"].as_str()), (1, Some("damaged")), "{what}: {told:#}");
            for field in ["what", "next_start", "way_out"] {
                assert!(!told[field].as_str().unwrap().is_empty(), "{what}: {told:#}");
            }
            assert_eq!(report["findings"].as_array().unwrap().len(), 1, "{what}: {report:#}");
        }
        fs::write(path, good).unwrap();
    }
    for path in &files {
        let good = fs::read(path).unwrap();
        fs::remove_file(path).unwrap();
        let (code, report) = unchanged(&node);
        let told = finding(&report, path).unwrap_or_else(|| panic!("{} is not named: {report:#}", path.display()));
        assert_eq!((code, told["severity"].as_str()), (1, Some("inconsistent")), "{told:#}");
        fs::write(path, good).unwrap();
    }
    assert_eq!(unchanged(&node).0, 0, "all is as before");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_another_s() {
    let mut node = Node::start().await;
    node.run(ID).await;
    node.kill_agent();
    let path = node.directory(ID).record();
    let good = node.record(ID);
    let mut other = good.clone();
    other.process.start_ticks -= 1;
    durable::write(&path, &other).unwrap();
    let (code, report) = unchanged(&node);
    assert_eq!((code, report["instances"][0]["process"]["state"].as_str()), (1, Some("other")), "{report:#}");
    durable::write(&path, &good).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_set_aside_and_what_killed_writers_left() {
    let mut node = Node::start().await;
    node.run(ID).await;
    node.kill_agent();
    let mut gone = std::process::Command::new("true").spawn().unwrap();
    gone.wait().unwrap();
    let state = node.path("state");
    let instance = state.join("instances").join(ID);
    let left = [&state, &instance].map(|folder| folder.join(format!(".claim.{}.tmp", gone.id())));
    let being_written = instance.join(format!(".record.{}.tmp", std::process::id()));
    for path in left.iter().chain([&being_written]) {
        fs::write(path, "{").unwrap();
    }
    let ownerless = state.join("run/nobody-234567.sock");
    drop(std::os::unix::net::UnixListener::bind(&ownerless).unwrap());
    let (code, report) = unchanged(&node);
    assert_eq!(code, 0, "nothing of it is damage: {report:#}");
    for path in left.iter().chain([&being_written, &ownerless]) {
        assert_eq!(finding(&report, path).unwrap()["severity"].as_str(), Some("note"), "{report:#}");
    }
    assert_eq!(finding(&report, &left[0]).unwrap()["next_start"].as_str(), Some("it is removed"));

    fs::write(instance.join("record"), "nothing\n").unwrap();
    node.start_agent().await;
    support::wait_for("the leftovers to go", || left.iter().all(|path| !path.exists()).then_some(())).await;
    assert!(being_written.exists(), "its writer lives");
    fs::remove_file(being_written).unwrap();
    let aside = fs::read_dir(state.join("damaged")).unwrap().next().unwrap().unwrap().path();
    let report = check(&node).1;
    let told = finding(&report, &aside).unwrap()["what"].as_str().unwrap();
    assert!(told.contains("the line with the checksum is missing"), "{told}");
    assert!(report["set_aside"][0]["at_ms"].as_i64().unwrap() > 1_700_000_000_000, "{report:#}");
}

#[test]
fn a_state_folder_that_is_not_there_is_wrong_use_and_is_not_made() {
    let place = tempfile::tempdir().unwrap();
    let absent = place.path().join("state");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_drover-agent"));
    let output = command.arg("check").arg("--state-dir").arg(&absent).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains(&format!("state_dir = {}", absent.display())), "{error}");
    assert!(!absent.exists());
}
