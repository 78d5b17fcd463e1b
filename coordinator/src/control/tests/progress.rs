//! Claims that get nowhere, through the cycle, the claim transaction and reports.

use super::{faults::cycle, *};
use crate::control::leader::Term;
use std::time::Duration;

const ID: &str = "m-222222";

/// A leader that gives up a claim after five seconds.
async fn impatient(world: &World) -> tokio::sync::watch::Sender<Option<Term>> {
    let leader = record::Leader { coordinator: "one".to_owned(), since: None };
    let revision = world.put(keys::LEADER.to_owned(), &leader, 0).await;
    let term = Term { revision, schema: world.schema(), since: tokio::time::Instant::now(), lease: 0 };
    let (lead, leadership) = tokio::sync::watch::channel(Some(term));
    let mut cycle = cycle(world);
    cycle.settings.progress_deadline_ms = 5000;
    tokio::spawn(cycle.run(leadership, world.stop.clone()));
    lead
}

/// What the ring of an object says of a claim that was given up.
async fn told(world: &World, object: &str) -> String {
    let told = async {
        loop {
            let items = world.store.list(&keys::events(object)).await.unwrap().items;
            let events = items.iter().map(|kv| records::decode::<record::Event>(kv).unwrap().event.unwrap());
            if let Some(event) = events.into_iter().find(|event| event.reason == "GivenUp") {
                return event.message;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(WAIT, told).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_claim_without_progress_goes_to_another_node_and_cannot_be_had_again_at_once() {
    let world = World::new().await;
    world.deployment("m", 1).await;
    let (a, b) = (world.node("a", 100).await, world.node("b", 100).await);
    let offer = world.offered(ID, &["a"]).await;
    let (token, moved) = world.claim("a", ID, a, offer).await.unwrap();
    let _lead = impatient(&world).await;
    let claimed = tokio::time::Instant::now();
    let given_up = shown(&world, "the claim is given up", |s| s.claims.is_empty()).await;
    assert!(claimed.elapsed() >= Duration::from_secs(5), "{:?}", claimed.elapsed());
    let instance = &given_up.instances[ID];
    assert_eq!(instance.value.offer.as_ref().unwrap().candidates, ["b"], "offered by the same transaction");
    assert_eq!(instance.value.avoid[0].node, "a");
    // What a says under its token is nothing, and what it runs it may not claim again yet.
    assert!(!world.report("a", ID, token, InstanceState::Ready).await);
    assert_eq!(world.claim("a", ID, moved, 0).await.unwrap_err(), reason::AVOIDED);
    let (newer, _) = world.claim("b", ID, b, instance.mod_revision).await.unwrap();
    assert!(newer > token);
    for object in [format!("instance/{ID}"), "node/a".to_owned(), "history/m".to_owned()] {
        let message = told(&world, &object).await;
        assert!(
            message.contains(&format!("claim {token} of a, ")) && message.contains("without progress"),
            "{message}"
        );
        assert!(message.contains("offered to b; a is avoided for it for 60 s"), "{message}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_shows_progress_stands_for_as_long_as_it_does() {
    let world = World::new().await;
    world.deployment("m", 1).await;
    let (a, _) = (world.node("a", 100).await, world.node("b", 100).await);
    let offer = world.offered(ID, &["a"]).await;
    let (token, _) = world.claim("a", ID, a, offer).await.unwrap();
    let _lead = impatient(&world).await;
    for second in 0..20 {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let progressed_at = Some(prost_types::Timestamp { seconds: second, nanos: 0 });
        let report = StatusReport {
            instance: ID.to_owned(),
            token: Some(token),
            state: InstanceState::Starting.into(),
            progressed_at,
            ..StatusReport::default()
        };
        assert!(world.statuses.record("a", 1, &report).await.unwrap(), "after {} s", second * 2);
    }
    shown(&world, "it is given up once it shows none", |s| s.claims.is_empty()).await;
}
