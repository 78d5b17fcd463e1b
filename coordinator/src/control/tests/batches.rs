//! Claims of one node that share a call: each is held to the rules of one that comes alone.

use super::{faulty::Faulty, *};
use drover_proto::{
    limits,
    v1::{ClaimItem, ClaimManyRequest, ClaimManyResponse},
};
use std::sync::atomic::Ordering::SeqCst;

pub(super) fn item(id: &str, offer_revision: i64) -> ClaimItem {
    ClaimItem {
        instance: id.to_owned(),
        offer_revision,
        nonce: format!("nonce-{id}"),
        memory_bytes: 10,
        recorded_token: (offer_revision == 0).then_some(Token { generation: 1, revision: 1 }),
        traceparent: String::new(),
    }
}

impl World {
    pub(super) async fn claim_many(
        &self,
        node: &str,
        session_revision: i64,
        claims: Vec<ClaimItem>,
    ) -> Result<ClaimManyResponse, claims::Error> {
        let session_id = format!("s-{node}");
        self.claims
            .claim_many(node, &ClaimManyRequest { session_id, session_revision, halt_generation: 0, claims })
            .await
    }

    /// Instances of a deployment, offered to these nodes; their ids with the revisions of the offers.
    pub(super) async fn many_offered(&self, count: usize, candidates: &[&str]) -> Vec<(String, i64)> {
        self.deployment("m", 1).await;
        let mut offered = Vec::new();
        for n in 0..count {
            let id = format!("m-{n:06}");
            offered.push((id.clone(), self.offered(&id, candidates).await));
        }
        offered
    }
}

pub(super) async fn faulty_world() -> (World, Arc<Faulty>) {
    let faulty = Arc::new(Faulty::start());
    (World::over(faulty.clone()).await, faulty)
}

/// "" for each that was made, else why it was not.
fn reasons(answer: &ClaimManyResponse) -> Vec<&str> {
    answer
        .results
        .iter()
        .map(|result| {
            assert_eq!(result.token.is_some() && result.spec.is_some(), result.reason.is_empty(), "{result:?}");
            assert_eq!(result.reason.is_empty(), result.message.is_empty(), "{result:?}");
            result.reason.as_str()
        })
        .collect()
}

fn refusal(outcome: Result<ClaimManyResponse, claims::Error>) -> (String, String) {
    match outcome {
        Err(claims::Error::Refused { reason, message }) => (reason, message),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn claims_of_one_call_are_made_by_one_transaction_under_one_token() {
    let world = World::new().await;
    let a = world.node("a", 1000).await;
    let offered = world.many_offered(5, &["a"]).await;
    let items = offered.iter().map(|(id, revision)| item(id, *revision)).collect();
    let answer = world.claim_many("a", a, items).await.unwrap();
    assert_eq!(reasons(&answer), [""; 5]);
    let token = answer.results[0].token.unwrap();
    assert_eq!(token.revision, answer.session_revision);
    for ((id, _), result) in offered.iter().zip(&answer.results) {
        assert_eq!((&result.instance, result.token), (id, Some(token)));
        let stored = world.store.get(&keys::claim(id)).await.unwrap().unwrap();
        assert_eq!((stored.mod_revision, stored.version), (token.revision, 1));
        let claim: record::Claim = records::decode(&stored).unwrap();
        assert_eq!((claim.node.as_str(), claim.nonce), ("a", format!("nonce-{id}")));
        let taken = world.store.get(&keys::taken(id)).await.unwrap().unwrap();
        assert_eq!((taken.mod_revision, taken.lease), (token.revision, 0));
        let session = world.store.get(&keys::session("a")).await.unwrap().unwrap();
        assert!(session.lease != 0 && stored.lease == session.lease, "claims end with their session");
        // The token is that of each of them: what it has to report is taken, and only its own claim ends with it.
        assert!(world.report("a", id, token, InstanceState::Ready).await);
    }
    assert!(world.report("a", &offered[0].0, token, InstanceState::Stopped).await);
    assert!(world.store.get(&keys::claim(&offered[0].0)).await.unwrap().is_none());
    assert!(world.report("a", &offered[1].0, token, InstanceState::Draining).await, "the others stand");
    let session = world.store.get(&keys::session("a")).await.unwrap().unwrap();
    assert_eq!(session.mod_revision, answer.session_revision, "bumped once");
}

#[tokio::test]
async fn an_instance_that_another_node_has_just_taken_is_refused_and_the_others_are_won() {
    // Of a re-claim nothing but the compare of the claim itself stands between two owners.
    for again in [false, true] {
        let (world, faulty) = faulty_world().await;
        let (a, b) = (world.node("a", 1000).await, world.node("b", 1000).await);
        let offered = world.many_offered(4, &["a", "b"]).await;
        world.events_settled().await;
        // b's claim commits between a's look at the view and a's transaction.
        faulty.before_next_txn(claim_of("b", b, &offered[2]));
        let items = offered.iter().map(|(id, revision)| item(id, if again { 0 } else { *revision })).collect();
        let answer = world.claim_many("a", a, items).await.unwrap();
        assert_eq!(reasons(&answer), ["", "", reason::ALREADY_CLAIMED, ""]);
        assert!(answer.results[2].message.contains("owned by b"), "{answer:?}");
        let owner: record::Claim =
            records::decode(&world.store.get(&keys::claim(&offered[2].0)).await.unwrap().unwrap()).unwrap();
        assert_eq!(owner.node, "b");
        let tokens: Vec<_> = [0, 1, 3].map(|n: usize| answer.results[n].token).into();
        assert!(tokens.iter().all(|t| t.unwrap().revision == answer.session_revision), "{tokens:?}");
    }
}

/// What another coordinator writes for a claim of `node`, without its session.
fn claim_of(node: &str, session: i64, (id, _): &(String, i64)) -> Txn {
    let claim = record::Claim { node: node.to_owned(), session_id: format!("s-{node}"), ..record::Claim::default() };
    let taken = record::Taken { node: node.to_owned(), nonce: String::new() };
    Txn {
        compare: vec![Compare::CreateRevision(keys::claim(id), 0), Compare::ModRevision(keys::session(node), session)],
        then: vec![records::put(keys::claim(id), &claim, 0), records::put(keys::taken(id), &taken, 0)],
        otherwise: vec![],
    }
}

#[tokio::test]
async fn an_offer_that_served_or_was_withdrawn_meanwhile_is_refused_and_the_others_are_won() {
    for served in [true, false] {
        let (world, faulty) = faulty_world().await;
        let a = world.node("a", 1000).await;
        let offered = world.many_offered(3, &["a"]).await;
        world.events_settled().await;
        let taken = record::Taken { node: "b".to_owned(), nonce: String::new() };
        let then = if served {
            vec![records::put(keys::taken(&offered[1].0), &taken, 0)]
        } else {
            vec![records::put(keys::instance(&offered[1].0), &record::Instance::default(), 0)]
        };
        faulty.before_next_txn(Txn { then, ..Txn::default() });
        let items = offered.iter().map(|(id, revision)| item(id, *revision)).collect();
        let answer = world.claim_many("a", a, items).await.unwrap();
        assert_eq!(reasons(&answer), ["", reason::OFFER_GONE, ""], "served: {served}");
    }
}

#[tokio::test]
async fn a_halt_set_meanwhile_stops_the_whole_call() {
    let (world, faulty) = faulty_world().await;
    let a = world.node("a", 1000).await;
    let offered = world.many_offered(3, &["a"]).await;
    world.events_settled().await;
    let halt = record::Halt { level: "claims".to_owned(), generation: 1 };
    let then = vec![records::put(keys::HALT.to_owned(), &halt, 0)];
    faulty.before_next_txn(Txn { then, ..Txn::default() });
    let items = offered.iter().map(|(id, revision)| item(id, *revision)).collect();
    let answer = world.claim_many("a", a, items).await.unwrap();
    assert_eq!((reasons(&answer), answer.session_revision), (vec![reason::OFFER_GONE; 3], a));
    assert!(world.store.list(keys::CLAIMS).await.unwrap().items.is_empty());
}

#[tokio::test]
async fn of_claims_that_do_not_fit_together_as_many_are_made_as_fit() {
    let world = World::new().await;
    let a = world.node("a", 35).await;
    let offered = world.many_offered(5, &["a"]).await;
    let items = offered.iter().map(|(id, revision)| item(id, *revision)).collect();
    let answer = world.claim_many("a", a, items).await.unwrap();
    let none = reason::NO_CAPACITY;
    assert_eq!(reasons(&answer), ["", "", "", none, none]);
    assert_eq!(world.store.list(keys::CLAIMS).await.unwrap().items.len(), 3);
    let (id, revision) = &offered[3];
    let later = world.claim_many("a", answer.session_revision, vec![item(id, *revision)]).await.unwrap();
    assert_eq!(reasons(&later), [none], "those made count for the next call");
}

#[tokio::test]
async fn a_run_claimed_again_takes_its_room_before_the_offers_after_it() {
    let world = World::new().await;
    let a = world.node("a", 25).await;
    let offered = world.many_offered(3, &["a"]).await;
    // Nobody counts its memory yet: the node has not said that it runs there.
    let items = vec![item(&offered[0].0, 0), item(&offered[1].0, offered[1].1), item(&offered[2].0, offered[2].1)];
    let answer = world.claim_many("a", a, items).await.unwrap();
    assert_eq!(reasons(&answer), ["", "", reason::NO_CAPACITY]);
}

#[tokio::test]
async fn a_run_claimed_again_does_not_take_its_room_twice() {
    let world = World::new().await;
    world.node("a", 25).await;
    let offered = world.many_offered(2, &["a"]).await;
    let mut node = world.view.snapshot().nodes["a"].value.clone();
    node.unclaimed = vec![record::UnclaimedRun { instance: offered[0].0.clone(), memory_bytes: 10 }];
    world.put(keys::node("a"), &node, 0).await;
    let session = world.view.snapshot().sessions["a"].mod_revision;
    let items = vec![item(&offered[0].0, 0), item(&offered[1].0, offered[1].1)];
    let answer = world.claim_many("a", session, items).await.unwrap();
    assert_eq!(reasons(&answer), ["", ""]);
}

#[tokio::test]
async fn what_runs_is_claimed_again_though_it_is_offered_to_others_at_that_moment() {
    let (world, faulty) = faulty_world().await;
    let a = world.node("a", 1000).await;
    let offered = world.many_offered(3, &["b"]).await;
    let record = |n: usize| world.view.snapshot().instances[&offered[n].0].value.clone();
    // One is offered anew, and one wanted no more, between the look at the view and the transaction.
    let unwanted = record::Instance { wanted: false, ..record(1) };
    let then = vec![
        records::put(keys::instance(&offered[0].0), &record(0), 0),
        records::put(keys::instance(&offered[1].0), &unwanted, 0),
    ];
    faulty.before_next_txn(Txn { then, ..Txn::default() });
    let items = offered.iter().map(|(id, _)| item(id, 0)).collect();
    let answer = world.claim_many("a", a, items).await.unwrap();
    assert_eq!(reasons(&answer), ["", reason::OFFER_GONE, ""]);
}

#[tokio::test]
async fn an_offer_that_has_run_out_and_a_run_that_nobody_wants_are_refused_alone() {
    let world = World::new().await;
    let a = world.node("a", 1000).await;
    let mut offered = world.many_offered(3, &["a"]).await;
    let mut late = world.view.snapshot().instances[&offered[0].0].value.clone();
    late.offer.as_mut().unwrap().deadline = Some(super::super::clock::timestamp(1));
    offered[0].1 = world.put(keys::instance(&offered[0].0), &late, 0).await;
    let unwanted = record::Instance { wanted: false, ..world.view.snapshot().instances[&offered[1].0].value.clone() };
    world.put(keys::instance(&offered[1].0), &unwanted, 0).await;
    let items = vec![item(&offered[0].0, offered[0].1), item(&offered[1].0, 0), item(&offered[2].0, offered[2].1)];
    let answer = world.claim_many("a", a, items).await.unwrap();
    assert_eq!(reasons(&answer), [reason::OFFER_GONE, reason::OFFER_GONE, ""]);
}

#[tokio::test]
async fn under_the_session_of_another_agent_or_a_store_opened_anew_nothing_is_made() {
    let (world, faulty) = faulty_world().await;
    let a = world.node("a", 1000).await;
    let offered = world.many_offered(2, &["a"]).await;
    let claims: Vec<ClaimItem> = offered.iter().map(|(id, revision)| item(id, *revision)).collect();
    let request = ClaimManyRequest {
        session_id: "another".to_owned(),
        session_revision: a,
        claims: claims.clone(),
        ..ClaimManyRequest::default()
    };
    assert_eq!(refusal(world.claims.claim_many("a", &request).await).0, reason::SESSION_MOVED);
    // As a restore does between the look at the view and the transaction.
    let schema = world.store.get(keys::SCHEMA).await.unwrap().unwrap();
    let then = vec![crate::store::Op::Put { key: keys::SCHEMA.to_owned(), value: schema.value, lease: 0 }];
    faulty.before_next_txn(Txn { then, ..Txn::default() });
    let answer = world.claim_many("a", a, claims).await.unwrap();
    assert_eq!(reasons(&answer), [reason::OFFER_GONE; 2]);
    assert!(world.store.list(keys::CLAIMS).await.unwrap().items.is_empty());
}

#[tokio::test]
async fn under_a_session_that_has_moved_nothing_is_made() {
    let (world, faulty) = faulty_world().await;
    let a = world.node("a", 1000).await;
    let offered = world.many_offered(3, &["a"]).await;
    let items: Vec<ClaimItem> = offered.iter().map(|(id, revision)| item(id, *revision)).collect();
    // As this coordinator's view shows it, and when it moves between the look at the view and the transaction.
    assert_eq!(refusal(world.claim_many("a", a - 1, items.clone()).await).0, reason::SESSION_MOVED);
    world.events_settled().await;
    let session: record::Session =
        records::decode(&world.store.get(&keys::session("a")).await.unwrap().unwrap()).unwrap();
    let then = vec![records::put(keys::session("a"), &session, session.lease)];
    faulty.before_next_txn(Txn { then, ..Txn::default() });
    assert_eq!(refusal(world.claim_many("a", a, items).await).0, reason::SESSION_MOVED);
    assert!(world.store.list(keys::CLAIMS).await.unwrap().items.is_empty());
}

#[tokio::test]
async fn when_the_outcome_is_unknown_no_claim_is_said_to_be_made_and_none_is_tried_again() {
    let (world, faulty) = faulty_world().await;
    let a = world.node("a", 1000).await;
    let offered = world.many_offered(3, &["a"]).await;
    world.events_settled().await;
    faulty.hold.store(true, SeqCst);
    let items: Vec<ClaimItem> = offered.iter().map(|(id, revision)| item(id, *revision)).collect();
    let unknown = world.claim_many("a", a, items.clone()).await;
    assert!(matches!(unknown, Err(claims::Error::Store(crate::store::Error::OutcomeUnknown(_)))), "{unknown:?}");
    // It commits late: all of them are there, each with its nonce, and a repetition is dead.
    assert!(faulty.commit_held().await.succeeded);
    for (id, _) in &offered {
        let claim: record::Claim = records::decode(&world.store.get(&keys::claim(id)).await.unwrap().unwrap()).unwrap();
        assert_eq!(claim.nonce, format!("nonce-{id}"));
    }
    assert_eq!(refusal(world.claim_many("a", a, items).await).0, reason::SESSION_MOVED);
}

#[tokio::test]
async fn a_call_over_the_limit_empty_or_with_an_instance_named_twice_is_refused_by_name() {
    let world = World::new().await;
    let a = world.node("a", 1000).await;
    let offered = world.many_offered(2, &["a"]).await;
    let max = limits::CLAIMS_PER_CALL_MAX;
    let many = (0..=max).map(|n| item(&format!("m-{n:06}"), 1)).collect();
    let (why, message) = refusal(world.claim_many("a", a, many).await);
    assert!(
        why == reason::INVALID_FIELD && message.contains(&format!("{} are named, 1 to {max}", max + 1)),
        "{message}"
    );
    let (why, _) = refusal(world.claim_many("a", a, vec![]).await);
    assert_eq!(why, reason::INVALID_FIELD);
    let twice = [0, 1, 0].map(|n: usize| item(&offered[n].0, offered[n].1));
    let (why, message) = refusal(world.claim_many("a", a, twice.into()).await);
    assert!(why == reason::INVALID_FIELD && message.contains("claims[2].instance = \"m-000000\""), "{message}");
    assert!(world.store.list(keys::CLAIMS).await.unwrap().items.is_empty());
}

#[tokio::test]
async fn a_call_as_large_as_allowed_fits_into_a_transaction() {
    let world = World::new().await;
    let a = world.node("a", 100_000).await;
    let offered = world.many_offered(limits::CLAIMS_PER_CALL_MAX, &["a"]).await;
    let items = offered.iter().map(|(id, revision)| item(id, *revision)).collect();
    let answer = world.claim_many("a", a, items).await.unwrap();
    assert!(reasons(&answer).iter().all(|why| why.is_empty()), "{answer:?}");
}
