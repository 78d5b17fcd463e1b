//! A loading server that ends for want of memory, by a signal or without a word is started again; one that refuses its model
//! or its arguments has failed at once.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{DeploymentSpec, InstanceState};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{fs, io::Write as _};
use support::{Node, signal, tiny, wait_for};

const ID: &str = "tiny-234567";

/// The real server, in less memory than its context needs, and then in enough.
#[tokio::test(flavor = "multi_thread")]
async fn want_of_memory_passes() {
    let node = Node::armed("[restarts]\nbackoff_first_ms = 10\n", Some(("start.locked", "pause"))).await;
    node.coordinator.offer(ID, DeploymentSpec { context_tokens: Some(1_000_000), ..tiny() });
    let shim = node.paused().await;
    let limit = 300_000_000;
    let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
    // SAFETY: both pointers are valid for the call, and the old limit is not asked for.
    #[allow(unsafe_code, reason = "nix has no prlimit for another process")]
    let set = unsafe { libc::prlimit(shim, libc::RLIMIT_AS, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(set, 0);
    kill(Pid::from_raw(shim), Signal::SIGCONT).unwrap();
    let ready = node.reported(ID, InstanceState::Ready).await;
    assert_eq!((ready.restarts, ready.exit_code), (1, Some(1)));
    let told = node.events(ID, "BackOff");
    assert!(told.len() == 1 && told[0].contains("exited with code 1"), "{told:?}");
    assert!(told[0].contains("exiting due to model loading error"), "as for a bad model: {told:?}");
}

/// The real server, and what it can't serve. The header of each is fine.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_refused_does_not() {
    let node = Node::start().await;
    let whole = fs::read(node.path("models/tiny.gguf")).unwrap();
    let at = |words: &[u8]| whole.windows(words.len()).position(|w| w == words).unwrap();
    let key = at(b"general.architecture");
    let name = key + whole[key..].windows(5).position(|w| w == b"llama").unwrap();
    let mut other = whole.clone();
    other[name..name + 5].copy_from_slice(b"lxama");
    for (id, bytes, why) in [
        ("arch-234567", other.as_slice(), "unknown model architecture"),
        ("cut-234567", &whole[..whole.len() / 2], "failed to load model"),
    ] {
        let file = format!("{id}.gguf");
        fs::File::create(node.path("models").join(&file)).unwrap().write_all(bytes).unwrap();
        node.coordinator.offer(id, DeploymentSpec { model_path: file, ..tiny() });
        let failed = node.reported(id, InstanceState::Failed).await;
        assert_eq!((failed.restarts, failed.exit_code), (0, Some(1)), "{}", failed.message);
        assert!(failed.message.contains("can't be served") && node.server_log(id).contains(why), "{}", failed.message);
        assert!(node.events(id, "BackOff").is_empty());
    }
}

/// A stand-in that prints what llama-server prints.
#[tokio::test(flavor = "multi_thread")]
async fn its_words_decide_and_those_of_an_earlier_run_do_not_count() {
    // Restarts are slow enough to change the words in between.
    let mut node = Node::idle("").await;
    node.config = support::misbehave("says", &node.path("mark")).replace("first_ms = 10", "first_ms = 500");
    node.program = support::misbehaving();
    node.start_agent().await;
    let says = |words: &str| fs::write(node.path("mark"), words).unwrap();
    says("E srv  start: couldn't bind HTTP server socket\nE srv  llama_server: exiting due to HTTP server error");
    node.coordinator.offer(ID, tiny());
    wait_for("a restart", || node.events(ID, "BackOff").pop()).await;
    says("error while handling argument \"--cache-type-k\": Unsupported cache type: nonsense");
    let failed = node.reported(ID, InstanceState::Failed).await;
    assert!(
        failed.message.contains("can't be served") && failed.message.contains("Unsupported cache type"),
        "{failed:?}"
    );
    assert!(!failed.message.contains("bind"), "of the run before: {}", failed.message);
    // Without a word it is a crash, and bounded as one.
    says("");
    node.coordinator.offer("silent-234567", tiny());
    let failed = node.reported("silent-234567", InstanceState::Failed).await;
    assert!(failed.message.contains("crash loop: ended 3 times in a row"), "{}", failed.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_passes() {
    let node = Node::misbehaving("loading").await;
    node.coordinator.offer(ID, tiny());
    let loading = node.reported(ID, InstanceState::Loading).await;
    signal(loading.pid, Signal::SIGKILL);
    let told = wait_for("the reason", || node.events(ID, "BackOff").pop()).await;
    assert!(told.contains("was Loading: llama-server was ended by signal 9"), "{told}");
    fs::write(node.path("mark"), "").unwrap();
    assert_eq!(node.reported(ID, InstanceState::Ready).await.restarts, 1);
}
