//! Each claim names the session's revision as the one before left it; what became of a lost one, a resume tells.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::{
    status::reason,
    v1::{DeploymentSpec, InstanceState},
};
use support::{Answer, Node, tiny, wait_for};

#[tokio::test(flavor = "multi_thread")]
async fn each_with_the_revision_of_the_one_before() {
    let node = Node::start().await;
    node.coordinator.state().announcing = false;
    let names = ["tiny-222222", "tiny-333333", "tiny-444444"];
    for name in names {
        node.coordinator.offer(name, tiny());
    }
    for name in names {
        node.reported(name, InstanceState::Ready).await;
    }
    let state = node.coordinator.state();
    assert_eq!(state.claims.len(), 3, "none was refused and made again");
    assert_eq!(state.hellos.len(), 1, "and none needed a resume");
    let mut nonces: Vec<_> = state.claims.iter().map(|c| c.nonce.clone()).collect();
    nonces.dedup();
    assert!(nonces.len() == 3 && nonces.iter().all(|nonce| nonce.len() == 32));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_was_made_though_its_answer_was_lost_is_found() {
    let node = Node::start().await;
    node.coordinator.state().answers.push_back(Answer::GrantUnheard);
    let ready = node.run("tiny-234567").await;
    let state = node.coordinator.state();
    assert_eq!(state.hellos.len(), 2, "the session was resumed");
    assert!(state.welcomes[1].resumed);
    assert_eq!(state.claims.len(), 1);
    assert_eq!(ready.token, state.owned["tiny-234567"].token);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_was_not_made_starts_nothing() {
    let node = Node::start().await;
    node.coordinator.state().answers.push_back(Answer::Lost);
    node.coordinator.offer("tiny-234567", tiny());
    wait_for("the resume", || (node.coordinator.state().hellos.len() == 2).then_some(())).await;
    // The next one goes on from the revision that the resume has brought.
    node.run("tiny-333333").await;
    assert!(!node.directory("tiny-234567").path().exists());
    assert_eq!(node.coordinator.last_report("tiny-234567"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_names_an_old_revision_is_made_again_after_a_resume() {
    let node = Node::start().await;
    node.coordinator.state().answers.push_back(Answer::Refuse(reason::SESSION_MOVED));
    node.run("tiny-234567").await;
    let state = node.coordinator.state();
    assert_eq!((state.claims.len(), state.hellos.len()), (2, 2));
    assert!(state.claims[1].session_revision > state.claims[0].session_revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn none_is_made_for_what_this_host_can_not_run() {
    let node = Node::start().await;
    let outside = node.path("outside.gguf");
    drover::tiny_model::write(&outside, 1).unwrap();
    let text = node.path("models/text.gguf");
    std::fs::write(&text, "no model at all, but long enough for a header").unwrap();
    let with = |path: &str| DeploymentSpec { model_path: path.to_owned(), ..tiny() };
    let cases = [
        ("tiny-222222", with("gone.gguf"), "is not below any model root"),
        ("tiny-333333", with(outside.to_str().unwrap()), "outside the model roots"),
        ("tiny-444444", with("text.gguf"), "no usable GGUF file"),
        ("tiny-555555", DeploymentSpec { memory_bytes: Some(99_000_000_000), ..tiny() }, "the host has"),
        ("tiny-666666", DeploymentSpec { arguments: vec!["--tools".to_owned()], ..tiny() }, "is not allowed"),
    ];
    for (instance, spec, part) in cases {
        node.coordinator.offer(instance, spec.clone());
        let declined = |what: &str| {
            let state = node.coordinator.state();
            state.events.iter().find(|e| e.instance == what && e.reason == "OfferDeclined").cloned()
        };
        let event = wait_for("the refusal", || declined(instance)).await;
        assert!(event.message.contains(part), "{}", event.message);
    }
    assert_eq!(node.coordinator.state().claims, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offer_stands_for_its_time_whatever_the_coordinator_s_clock_shows() {
    let node = Node::start().await;
    node.coordinator.state().clock_ahead = -10_000;
    node.run("tiny-234567").await;
}
