//! The reason of every restart is an event of its own: exit code or signal, which attempt follows, and when.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::v1::InstanceState;
use nix::sys::signal::Signal;
use support::{Node, signal, tiny, wait_for};

const ID: &str = "tiny-234567";

/// The pause that an event tells, in milliseconds.
fn pause(message: &str) -> u64 {
    let (_, rest) = message.split_once("it is started again in ").unwrap();
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

/// However short the states are in between: they pass faster than they are reported.
#[tokio::test(flavor = "multi_thread")]
async fn of_a_server_that_exits_at_once() {
    let node = Node::misbehaving("at-once").await;
    node.coordinator.offer(ID, tiny());
    let failed = node.reported(ID, InstanceState::Failed).await;
    assert_eq!((failed.restarts, failed.exit_code), (2, Some(3)));
    let told = node.events(ID, "BackOff");
    assert_eq!(told.len(), 2, "one for each restart: {told:?}");
    for (n, message) in told.iter().enumerate() {
        assert!(message.starts_with("pid ") && message.contains("exited with code 3"), "{message}");
        assert!(message.contains("misbehaves: at-once"), "its last line: {message}");
        assert!(message.contains(&format!("(attempt {}; 3 quick ends are a crash loop)", n + 2)), "{message}");
    }
    // Doubled each time, and up to a fifth more or less.
    assert!((8..=12).contains(&pause(&told[0])) && (16..=24).contains(&pause(&told[1])), "{told:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_server_that_is_killed_again_and_again_and_what_ran_stably_is_forgiven() {
    let stable = "[restarts]\nbackoff_first_ms = 10\nquick_ends_max = 2\nstable_ms = 2000\n";
    let node = Node::with(stable).await;
    let mut ready = node.run(ID).await;
    // More often than a crash loop allows.
    for n in 1..=3 {
        let began = std::time::Instant::now();
        wait_for("stable running", || (began.elapsed().as_millis() > 2200).then_some(())).await;
        signal(ready.pid, Signal::SIGKILL);
        let what = "the next server";
        let before = ready.pid;
        ready = node.report(what, ID, |r| r.state() == InstanceState::Ready && r.pid != before).await;
        assert_eq!(ready.restarts, n);
        let told = node.events(ID, "BackOff");
        assert_eq!(told.len(), usize::try_from(n).unwrap());
        let last = told.last().unwrap();
        assert!(
            last.contains(&format!("pid {before}, ")) && last.contains("was Ready: llama-server was ended by signal 9")
        );
        assert!(last.contains("(attempt 2; 2 quick ends are a crash loop)"), "the count has begun anew: {last}");
    }
    // At once, without stable running in between: the second end in a row.
    signal(ready.pid, Signal::SIGKILL);
    let failed = node.reported(ID, InstanceState::Failed).await;
    assert!(failed.message.contains("crash loop: ended 2 times in a row"), "{}", failed.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_end_that_no_agent_saw_and_an_adoption_is_one_too() {
    let mut node = Node::start().await;
    let (gone, stays) = (node.run(ID).await, node.run("stays-234567").await);
    node.kill_agent();
    signal(gone.pid, Signal::SIGKILL);
    let exit = node.directory(ID).exit();
    wait_for("the record of the end", || exit.exists().then_some(())).await;
    node.start_agent().await;
    let what = "the restarted server";
    node.report(what, ID, |r| r.state() == InstanceState::Ready && r.pid != gone.pid).await;
    let told = wait_for("its event", || Some(node.events(ID, "BackOff")).filter(|told| !told.is_empty())).await;
    assert!(
        told.len() == 1 && told[0].contains("ended while no agent ran: llama-server was ended by signal 9"),
        "{told:?}"
    );
    let adopted = wait_for("the adoption", || node.events("stays-234567", "Adopted").pop()).await;
    assert!(adopted.contains(&format!("pid {}, ", stays.pid)) && adopted.contains("and answers"), "{adopted}");
    assert!(node.events(ID, "Adopted").is_empty());
}
