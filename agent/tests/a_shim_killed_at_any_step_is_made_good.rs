//! A shim dies at each of its steps of a start and a stop, or while its server serves: what was wanted serves in the end,
//! what was not is gone, and a server that had begun is not lost with its shim.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::InstanceState;
use nix::sys::signal::Signal;
use support::{Node, is_alive, llama_server, signal, tiny, wait_for, watcher::Watcher};
use tokio::task::JoinSet;

const ID: &str = "tiny-234567";
const CONFIG: &str = "[restarts]\nbackoff_first_ms = 50\nbackoff_max_ms = 400\nquick_ends_max = 50\n";

#[tokio::test(flavor = "multi_thread")]
async fn of_a_start() {
    let before = ["start.locked", "start.forked", "start.recorded", "start.checked"];
    let after = ["start.released", "start.confirmed"];
    let mut cases = JoinSet::new();
    for (step, had_begun) in before.map(|step| (step, false)).into_iter().chain(after.map(|step| (step, true))) {
        cases.spawn(async move {
            let node = Node::armed(CONFIG, Some((step, "kill"))).await;
            let watcher = Watcher::start(node.root.path(), &llama_server());
            node.coordinator.offer(ID, tiny());
            wait_for(&format!("{step}: the shim's end"), || node.path("fail-point").exists().then_some(())).await;
            let ready = node.reported(ID, InstanceState::Ready).await;
            if had_begun {
                assert_eq!(
                    ready.restarts,
                    0,
                    "{step}: its server was lost with it; reports {:?}",
                    node.coordinator.state().reports
                );
                assert_eq!(i64::from(node.record(ID).process.pid), ready.pid, "{step}");
            }
            node.coordinator.stop(ID);
            node.reported(ID, InstanceState::Stopped).await;
            node.nothing_left(ID, step).await;
            assert!(watcher.looked_at() > 0, "{step}: the watcher saw nothing");
            watcher.saw_no_fault(step);
        });
    }
    while let Some(ended) = cases.join_next().await {
        ended.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_stop() {
    let mut cases = JoinSet::new();
    for step in ["stop.seen", "stop.tree-ended", "stop.exit-written"] {
        cases.spawn(async move {
            let node = Node::armed(CONFIG, Some((step, "kill"))).await;
            let ready = node.run(ID).await;
            node.coordinator.stop(ID);
            let stopped = node.reported(ID, InstanceState::Stopped).await;
            // Only what is on disk is known after its end.
            let known = (step == "stop.exit-written").then_some(0);
            assert_eq!((stopped.exit_code, is_alive(ready.pid)), (known, false), "{step}");
            node.nothing_left(ID, step).await;
        });
    }
    while let Some(ended) = cases.join_next().await {
        ended.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_its_server_serves() {
    let mut node = Node::with(CONFIG).await;
    let watcher = Watcher::start(node.root.path(), &llama_server());
    let first = node.run(ID).await;
    let shim = node.processes(ID).into_iter().find(|pid| i64::from(*pid) != first.pid).expect("a shim");
    signal(i64::from(shim), Signal::SIGKILL);
    // The next agent takes the server back without it, and sees its end without it.
    node.kill_agent();
    let before = node.coordinator.state().reports.len();
    node.start_agent().await;
    wait_for("the second agent's report", || (node.coordinator.state().reports.len() > before).then_some(())).await;
    assert_eq!(node.reported(ID, InstanceState::Ready).await.pid, first.pid);
    signal(first.pid, Signal::SIGKILL);
    let backoff = node.reported(ID, InstanceState::Backoff).await;
    assert_eq!((backoff.exit_code, backoff.exit_signal), (None, None));
    assert!(backoff.message.contains("how is not known"), "{}", backoff.message);
    let again = node.report("the next server", ID, |r| r.state() == InstanceState::Ready && r.pid != first.pid).await;
    assert_eq!(node.processes(ID).len(), 2, "a server and a new shim: {again:?}");
    watcher.saw_no_fault("while it serves");
}
