//! A program or model that is missing or unfit, and a socket path that is taken: said by name, never tried blindly, and
//! made good when the cause is gone.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{DeploymentSpec, InstanceState};
use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
    path::Path,
};
use support::{Node, is_alive, misbehaving, tiny, wait_for};

const ID: &str = "tiny-234567";
const CONFIG: &str = "[restarts]\nbackoff_first_ms = 50\nbackoff_max_ms = 200\n";

type Spoil = fn(&Path);

/// Makes a program unusable, each in its way; with a word of what is to be said of it.
const UNFIT: [(&str, Spoil, &str); 3] = [
    ("missing", |path| fs::remove_file(path).unwrap(), "No such file"),
    ("not executable", |path| fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap(), ""),
    ("of another architecture", foreign, "Exec format error"),
];

/// The same program with another machine in its ELF header (RISC-V, which none of these tests runs on).
fn foreign(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    bytes[18..20].copy_from_slice(&243_u16.to_le_bytes());
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_without_a_usable_program_names_it_and_touches_nothing() {
    let mut node = Node::start().await;
    let ready = node.run(ID).await;
    node.kill_agent();
    for (what, spoil, why) in UNFIT {
        node.program = node.path("llama-server");
        fs::copy(misbehaving(), &node.program).unwrap();
        spoil(&node.program);
        node.spawn_agent();
        let mut agent = node.agent.take().unwrap();
        let status = wait_for("the agent's end", || agent.try_wait().unwrap()).await;
        let log = node.log();
        let last = log.lines().last().unwrap_or_default();
        assert!(!status.success() && last.contains("llama_server = ") && last.contains(why), "{what}: {last}");
        assert!(is_alive(ready.pid), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_was_replaced_under_a_running_agent() {
    for (what, spoil, why) in UNFIT {
        let mut node = Node::idle(CONFIG).await;
        node.program = node.path("llama-server");
        fs::copy(misbehaving(), &node.program).unwrap();
        node.start_agent().await;
        spoil(&node.program);
        node.coordinator.offer(ID, tiny());
        if what == "missing" {
            // It may be about to be installed anew.
            let backoff = node.reported(ID, InstanceState::Backoff).await;
            assert!(backoff.message.contains(why) && backoff.message.contains("llama-server"), "{}", backoff.message);
            fs::copy(misbehaving(), &node.program).unwrap();
            node.reported(ID, InstanceState::Ready).await;
        } else {
            let failed = node.reported(ID, InstanceState::Failed).await;
            assert!(failed.message.contains("executed") && failed.message.contains(why), "{what}: {}", failed.message);
        }
        node.coordinator.stop(ID);
        node.nothing_left(ID, what).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_absent_or_no_gguf_is_declined_before_it_is_claimed() {
    let node = Node::start().await;
    fs::write(node.path("models/text.gguf"), "this is no model").unwrap();
    fs::write(node.path("models/empty.gguf"), "").unwrap();
    for (file, why) in
        [("absent.gguf", "not below any model root"), ("text.gguf", "no usable GGUF"), ("empty.gguf", "no usable GGUF")]
    {
        node.coordinator.offer(ID, DeploymentSpec { model_path: file.to_owned(), ..tiny() });
        wait_for(&format!("{file} to be declined"), || {
            let events = node.coordinator.state().events.clone();
            let told = |e: &drover_proto::v1::NodeEvent| {
                e.reason == "OfferDeclined" && e.message.contains(why) && e.message.contains(file)
            };
            events.iter().any(told).then_some(())
        })
        .await;
    }
    assert!(node.coordinator.state().claims.is_empty() && !node.directory(ID).path().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_goes_between_claim_and_restart_fails_by_name() {
    let node = Node::with(CONFIG).await;
    let ready = node.run(ID).await;
    fs::remove_file(node.path("models/tiny.gguf")).unwrap();
    support::signal(ready.pid, nix::sys::signal::Signal::SIGKILL);
    let failed = node.reported(ID, InstanceState::Failed).await;
    assert!(failed.message.contains("tiny.gguf"), "{}", failed.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_can_not_be_made() {
    let node = Node::with(CONFIG).await;
    fs::write(node.directory(ID).path(), "in the way").unwrap();
    node.coordinator.offer(ID, tiny());
    let backoff = node.reported(ID, InstanceState::Backoff).await;
    assert!(backoff.message.contains("its directory can't be prepared"), "{}", backoff.message);
    fs::remove_file(node.directory(ID).path()).unwrap();
    node.reported(ID, InstanceState::Ready).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_path_that_is_taken() {
    let node = Node::with(CONFIG).await;
    // What lies there by mistake is in the way until somebody takes it away.
    fs::create_dir(node.socket(ID)).unwrap();
    node.coordinator.offer(ID, tiny());
    let backoff = node.reported(ID, InstanceState::Backoff).await;
    assert!(backoff.message.contains("removal of an earlier run's files"), "{}", backoff.message);
    fs::remove_dir(node.socket(ID)).unwrap();
    node.reported(ID, InstanceState::Ready).await;
    node.coordinator.stop(ID);
    node.nothing_left(ID, "a folder in the way").await;
    // A socket that another process listens on: the folder is the agent's own, so it gives way.
    let _other = UnixListener::bind(node.socket("tiny-333333")).unwrap();
    let ready = node.run("tiny-333333").await;
    assert!(is_alive(ready.pid));
}
