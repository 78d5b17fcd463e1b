//! Reports, actions of a plan and events share transactions, and where one of them can't be written the others are.

use super::{
    batches::{faulty_world, item},
    *,
};
use drover_proto::limits;
use std::sync::atomic::Ordering::SeqCst;

fn report(id: &str, token: Token, state: InstanceState) -> StatusReport {
    StatusReport { instance: id.to_owned(), token: Some(token), state: state.into(), ..StatusReport::default() }
}

impl World {
    async fn stored_state(&self, id: &str) -> InstanceState {
        let stored = self.store.get(&keys::status(id)).await.unwrap().unwrap();
        records::decode::<record::Status>(&stored).unwrap().state()
    }
}

#[tokio::test]
async fn reports_share_a_transaction_and_a_stale_one_among_them_is_refused_alone() {
    let (world, faulty) = faulty_world().await;
    let a = world.node("a", 1000).await;
    let offered = world.many_offered(4, &["a"]).await;
    let items = offered.iter().map(|(id, revision)| item(id, *revision)).collect();
    let token = world.claim_many("a", a, items).await.unwrap().results[0].token.unwrap();
    world.view.at_least(token.revision, WAIT).await.unwrap();
    world.events_settled().await;
    let all = |state| offered.iter().map(|(id, _)| report(id, token, state)).collect::<Vec<_>>();
    let (before, mut written) = (faulty.txns.load(SeqCst), 0);
    // At once, though the view may not have seen the first ones when the second come.
    for state in [InstanceState::Starting, InstanceState::Loading] {
        let recorded = world.statuses.record_all("a", 1, &all(state), &mut written).await;
        assert!(recorded.iter().all(|r| *r == Ok(true)), "{recorded:?}");
        assert_eq!(world.stored_state(&offered[3].0).await, state);
    }
    let events = 2;
    assert!(faulty.txns.load(SeqCst) - before <= 2 + events, "one for the reports, one for what is told of them");
    // Another node owns one of them by now; nobody here has seen it.
    shown(&world, "the reports", |s| s.statuses.len() == 4).await;
    world.events_settled().await;
    let claim = record::Claim { node: "b".to_owned(), ..record::Claim::default() };
    let then = vec![records::put(keys::claim(&offered[1].0), &claim, 0)];
    faulty.before_next_txn(Txn { then, ..Txn::default() });
    let recorded = world.statuses.record_all("a", 1, &all(InstanceState::Ready), &mut written).await;
    assert_eq!(recorded, [Ok(true), Ok(false), Ok(true), Ok(true)]);
    for (n, (id, _)) in offered.iter().enumerate() {
        let expected = if n == 1 { InstanceState::Loading } else { InstanceState::Ready };
        assert_eq!(world.stored_state(id).await, expected);
    }
}

#[tokio::test]
async fn a_plan_is_written_by_few_transactions_and_what_has_changed_meanwhile_is_left_out_alone() {
    let (world, faulty) = faulty_world().await;
    world.node("a", 10_000).await;
    world.deployment("m", 50).await;
    world.events_settled().await;
    let before = faulty.txns.load(SeqCst);
    let _lead = faults::leading(&world).await;
    let offered = shown(&world, "fifty instances are offered", |s| s.instances.len() == 50).await;
    let revisions: std::collections::BTreeSet<i64> = offered.instances.values().map(|i| i.mod_revision).collect();
    assert_eq!(revisions.len(), 1, "made by one transaction");
    assert!(faulty.txns.load(SeqCst) - before <= 8, "the leader's key, the instances, what is told of them");
    // One of them is changed by somebody else between the plan and its transaction: the others are stopped all the same.
    world.events_settled().await;
    let (id, instance) = offered.instances.iter().next().unwrap();
    let touched = record::Instance { traceparent: "touched".to_owned(), ..instance.value.clone() };
    let touch = records::put(keys::instance(id), &touched, 0);
    faulty.before_next_txn(Txn { then: vec![touch], ..Txn::default() });
    let mut deployment = offered.deployments["m"].value.clone();
    deployment.deleting = true;
    let before = faulty.txns.load(SeqCst);
    let write = records::put(keys::deployment("m"), &deployment, 0);
    faulty.by_others(Txn { then: vec![write], ..Txn::default() }).await;
    shown(&world, "all of them are gone in the end", |s| s.instances.is_empty() && s.deployments.is_empty()).await;
    assert!(faulty.txns.load(SeqCst) - before > 50, "each was tried for itself");
}

#[tokio::test]
async fn what_is_offered_to_a_node_whose_session_has_gone_meanwhile_is_not_written() {
    let (world, faulty) = faulty_world().await;
    world.node("a", 10_000).await;
    let _lead = faults::leading(&world).await;
    world.events_settled().await;
    world.deployment("m", 0).await;
    let deployment =
        shown(&world, "the deployment", |s| s.deployments.contains_key("m")).await.deployments["m"].clone();
    world.events_settled().await;
    // Between the plan and its transaction: the node may join anew at once, with what runs on it.
    let then = vec![crate::store::Op::Delete(keys::session("a"))];
    faulty.before_next_txn(Txn { then, ..Txn::default() });
    let asked = record::Deployment { replicas: 1, ..deployment.value.clone() };
    let write = records::put(keys::deployment("m"), &asked, 0);
    faulty.by_others(Txn { then: vec![write], ..Txn::default() }).await;
    let snapshot = shown(&world, "the instance", |s| !s.instances.is_empty()).await;
    assert!(snapshot.instances.values().all(|i| i.value.offer.is_none()), "{:?}", snapshot.instances);
}

#[tokio::test]
async fn a_plan_larger_than_a_transaction_is_cut_where_it_has_to_be() {
    let (world, _) = faulty_world().await;
    world.node("a", 10_000).await;
    world.deployment("m", 200).await;
    let _lead = faults::leading(&world).await;
    let offered = shown(&world, "two hundred instances are offered", |s| s.instances.len() == 200).await;
    let revisions: std::collections::BTreeSet<i64> = offered.instances.values().map(|i| i.mod_revision).collect();
    assert_eq!(revisions.len(), 2, "a comparison and a write each, and what all of them compare");
}

#[tokio::test]
async fn a_plan_of_a_former_leader_that_does_not_know_it_yet_is_not_carried_out() {
    let (world, faulty) = faulty_world().await;
    world.node("a", 1000).await;
    let _lead = faults::leading(&world).await;
    world.put(keys::LEADER.to_owned(), &record::Leader { coordinator: "two".to_owned(), since: None }, 0).await;
    world.events_settled().await;
    let before = faulty.txns.load(SeqCst);
    world.deployment("m", 2).await;
    let tried = async {
        // The two records of the deployment, the plan, and each of its actions; then once more.
        while faulty.txns.load(SeqCst) < before + 8 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(WAIT, tried).await.unwrap();
    assert!(world.store.list(keys::INSTANCES).await.unwrap().items.is_empty());
}

#[tokio::test]
async fn events_that_queue_up_are_written_together_and_in_order() {
    let world = World::new().await;
    world.node("a", 10).await;
    // However long one is, it is told, and so are those with it.
    let long = "ä".repeat(2_000_000);
    world.events.record("node/gone".to_owned(), "Told", drover_proto::v1::Severity::Info, long);
    world.events.record_by_node("a", "gone-222222", "Told", drover_proto::v1::Severity::Info, "ended".to_owned());
    for n in 0..200 {
        let object = if n % 4 == 0 { "node/gone".to_owned() } else { "node/a".to_owned() };
        world.events.record(object, "Told", drover_proto::v1::Severity::Info, n.to_string());
    }
    let told = async |object: &str| {
        let items = world.store.list(&keys::events(object)).await.unwrap().items;
        let events = items.iter().map(|kv| records::decode::<record::Event>(kv).unwrap());
        let mut events: Vec<_> = events.map(|e| (e.sequence, e.event.unwrap().message)).collect();
        events.sort();
        events
    };
    let last_told = async {
        while told("node/a").await.last().is_none_or(|(_, message)| message != "199") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(WAIT, last_told).await.unwrap();
    let events = told("node/a").await;
    assert_eq!(events.len(), usize::try_from(limits::EVENTS_PER_OBJECT).unwrap());
    let messages: Vec<usize> = events.iter().map(|(_, message)| message.parse().unwrap()).collect();
    assert!(messages.is_sorted() && messages[0] > 100, "{messages:?}");
    assert!(events.windows(2).all(|w| w[0].0 + 1 == w[1].0), "no number is left out or used twice: {events:?}");
    let of_the_gone = told(super::super::events::FLEET).await;
    assert!(of_the_gone.iter().any(|(_, message)| message == "node/gone: 196"), "{of_the_gone:?}");
    assert!(of_the_gone.iter().any(|(_, message)| message == "instance/gone-222222: ended"), "{of_the_gone:?}");
    assert!(of_the_gone.iter().all(|(_, message)| !message.starts_with("history/")), "its copy goes with it");
    assert!(of_the_gone[0].1.starts_with("node/gone: ää") && of_the_gone[0].1.len() < 10_000);
}
