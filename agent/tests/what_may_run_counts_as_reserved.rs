//! Memory of a run of which it can't be told whether it lives is not given to another instance.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::{DeploymentSpec, InstanceState};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
};
use std::fs::File;
use support::{Node, signal, tiny, wait_for};

const ID: &str = "tiny-234567";

#[tokio::test(flavor = "multi_thread")]
async fn until_it_is_known_to_be_gone() {
    let mut node = Node::with("memory_bytes = 1000000000\n").await;
    let spec = DeploymentSpec { memory_bytes: Some(600_000_000), ..tiny() };
    node.coordinator.offer(ID, spec.clone());
    let ready = node.reported(ID, InstanceState::Ready).await;
    node.kill_agent();
    signal(ready.pid, Signal::SIGKILL);
    let directory = node.directory(ID);
    wait_for("the record of the end", || directory.exit().exists().then_some(())).await;
    // A shim at work there: whether something runs can't be told.
    let shim = wait_for("the lock", || {
        let file = File::options().write(true).open(directory.lock()).unwrap();
        Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()
    })
    .await;
    node.coordinator.change(|state| state.owned.clear());
    node.start_agent().await;
    // What is ready after the join was claimed after the set of claims was applied.
    let small = DeploymentSpec { memory_bytes: Some(100_000_000), ..tiny() };
    node.coordinator.offer("small-234567", small);
    node.reported("small-234567", InstanceState::Ready).await;
    node.coordinator.offer("other-234567", spec.clone());
    let declined = wait_for("the refusal", || node.events("other-234567", "OfferDeclined").pop()).await;
    assert!(declined.contains("needs 572 MiB, and 667 MiB of this node's"), "{declined}");
    drop(shim);
    wait_for("its files to go", || (!directory.path().exists()).then_some(())).await;
    node.coordinator.offer("other-234567", spec);
    node.reported("other-234567", InstanceState::Ready).await;
}
