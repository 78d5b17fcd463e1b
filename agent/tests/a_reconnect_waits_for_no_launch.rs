//! A launch that takes long holds up no reconnect: what is being launched is told as a run, at once.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_shim::identity;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use support::{Node, tiny, wait_for};

const ID: &str = "tiny-234567";

#[tokio::test(flavor = "multi_thread")]
async fn while_a_higher_token_waits_for_it() {
    let node = Node::armed("", Some(("start.locked", "pause"))).await;
    node.coordinator.offer(ID, tiny());
    let shim = node.paused().await;
    let held = || identity::stat(shim).is_ok_and(|stat| stat.state == 'T');
    // Whoever raises a token waits for the launch, and the registry with it.
    node.coordinator.change(|state| state.owned.get_mut(ID).unwrap().token.as_mut().unwrap().revision += 1);
    for cut in ["first", "second"] {
        let hellos = node.coordinator.state().hellos.len();
        node.coordinator.cut();
        let came = || (node.coordinator.state().hellos.len() > hellos).then_some(());
        wait_for(&format!("a stream after the {cut} cut"), came).await;
    }
    assert!(held(), "the reconnect has waited until the agent gave the launch up");
    let hello = node.coordinator.state().hellos.last().unwrap().clone();
    assert_eq!(hello.runs.iter().map(|run| (run.instance.as_str(), run.alive)).collect::<Vec<_>>(), [(ID, true)]);
    kill(Pid::from_raw(shim), Signal::SIGCONT).unwrap();
    node.reported(ID, drover_proto::v1::InstanceState::Ready).await;
}
