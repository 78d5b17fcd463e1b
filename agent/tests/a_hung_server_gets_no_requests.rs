//! A server that does not answer its probes is unrouted and left alive; when it answers again it gets requests again.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::InstanceState;
use nix::sys::signal::Signal;
use support::{Node, is_alive, signal};

#[tokio::test(flavor = "multi_thread")]
async fn until_it_answers_again() {
    let node = Node::start().await;
    let ready = node.run("tiny-234567").await;
    signal(ready.pid, Signal::SIGSTOP);
    let suspect = node.reported("tiny-234567", InstanceState::Suspect).await;
    assert!(suspect.message.contains("no answer from /health"), "{}", suspect.message);
    assert!(is_alive(ready.pid));
    signal(ready.pid, Signal::SIGCONT);
    let again = node.reported("tiny-234567", InstanceState::Ready).await;
    assert_eq!((again.pid, again.restarts, again.message.as_str()), (ready.pid, 0, ""));
}
