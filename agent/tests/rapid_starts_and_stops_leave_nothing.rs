//! Starts and stops in quick succession, stopped at whatever they are doing, all end as asked: no process, no lock, no
//! file, no descriptor of the agent is left.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::InstanceState;
use std::fs;
use support::{
    Node, llama_server, tiny, wait_for,
    watcher::{self, Watcher},
};

const CYCLES: usize = 50;
/// Instances at a time.
const AT_ONCE: usize = 5;

#[tokio::test(flavor = "multi_thread")]
async fn fifty_of_them() {
    let node = Node::start().await;
    let watcher = Watcher::start(node.root.path(), &llama_server());
    let agent = node.agent.as_ref().unwrap().id();
    let descriptors = || fs::read_dir(format!("/proc/{agent}/fd")).unwrap().count();
    // The first start opens what stays open.
    node.run("warm-234567").await;
    node.coordinator.stop("warm-234567");
    node.nothing_left("warm-234567", "the first").await;
    let before = descriptors();
    let ids = ["one-234567", "two-234567", "three-234567", "four-234567", "five-234567"];
    for round in 0..CYCLES / AT_ONCE {
        for id in ids {
            node.coordinator.offer(id, tiny());
        }
        for (n, id) in ids.into_iter().enumerate() {
            wait_for("the claim", || node.coordinator.state().owned.contains_key(id).then_some(())).await;
            // Stopped when just claimed, while it starts or loads, or when it is ready.
            let until = [None, Some(InstanceState::Starting), Some(InstanceState::Loading), Some(InstanceState::Ready)];
            let until = until[(round + n) % until.len()];
            let seen = |state: InstanceState| {
                node.coordinator.last_report(id).is_some_and(|r| i32::from(r.state()) >= i32::from(state))
            };
            wait_for("its state", || until.is_none_or(seen).then_some(())).await;
            node.coordinator.stop(id);
        }
        for id in ids {
            wait_for("the claim to go", || (!node.coordinator.state().owned.contains_key(id)).then_some(())).await;
            assert_eq!(
                node.coordinator.last_report(id).unwrap().state(),
                InstanceState::Stopped,
                "round {round}, {id}"
            );
            node.nothing_left(id, &format!("round {round}")).await;
        }
    }
    assert_eq!(fs::read_dir(node.path("state/instances")).unwrap().count(), 0);
    let root = node.path("state/instances");
    let left = watcher::processes(|words| words.iter().any(|word| word.starts_with(root.to_str().unwrap())));
    assert!(left.is_empty(), "{left:?}");
    wait_for("the agent's descriptors to be closed", || (descriptors() <= before).then_some(())).await;
    assert!(watcher.looked_at() > 0);
    watcher.saw_no_fault("fifty cycles");
}
