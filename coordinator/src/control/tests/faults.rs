//! Late writes, a full store, a view that does not see: nothing is lost, overwritten or tried without a pause.

use super::{batches::faulty_world, *};
use crate::{
    control::sessions::node_record::{self, Told},
    store::Op,
};
use std::sync::atomic::Ordering::SeqCst;

/// Lets every other task run as long as it does not wait for time.
async fn let_run() {
    for _ in 0..3000 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_report_without_a_claim_writes_nothing_whatever_its_token_says() {
    let world = World::new().await;
    world.deployment("m", 1).await;
    let base = world.keys().await;
    for revision in [0, -1] {
        let token = Token { generation: 1, revision };
        for state in [InstanceState::Ready, InstanceState::Stopped] {
            assert!(!world.report("a", "m-222222", token, state).await);
        }
    }
    assert_eq!(world.keys().await, base);
}

#[tokio::test]
async fn a_report_under_the_token_of_another_node_changes_nothing() {
    let world = World::new().await;
    world.deployment("m", 1).await;
    let a = world.node("a", 100).await;
    let offer = world.offered("m-222222", &["a"]).await;
    let (token, _) = world.claim("a", "m-222222", a, offer).await.unwrap();
    assert!(!world.report("b", "m-222222", token, InstanceState::Stopped).await);
    assert!(world.store.get(&keys::claim("m-222222")).await.unwrap().is_some());
    assert!(world.report("a", "m-222222", token, InstanceState::Ready).await);
}

#[tokio::test]
async fn a_report_of_an_earlier_generation_waits_for_nothing() {
    let world = World::new().await;
    world.node("a", 100).await;
    let token = Some(Token { generation: 0, revision: i64::MAX });
    let stale = StatusReport { instance: "m-222222".to_owned(), token, ..StatusReport::default() };
    let other = StatusReport { instance: "m-333333".to_owned(), ..stale.clone() };
    assert_eq!(world.statuses.record("a", &stale).await, Ok(false));
    assert_eq!(world.statuses.record_all("a", &[stale, other], &mut 0).await, [Ok(false), Ok(false)]);
}

#[tokio::test]
async fn a_report_that_commits_late_does_not_overwrite_a_later_one() {
    let (world, faulty) = faulty_world().await;
    world.deployment("m", 1).await;
    let a = world.node("a", 100).await;
    let offer = world.offered("m-222222", &["a"]).await;
    let (token, _) = world.claim("a", "m-222222", a, offer).await.unwrap();
    let report = |state: InstanceState| StatusReport {
        instance: "m-222222".to_owned(),
        token: Some(token),
        state: state.into(),
        ..StatusReport::default()
    };
    world.view.at_least(token.revision, WAIT).await.unwrap();
    world.events_settled().await;
    faulty.hold.store(true, SeqCst);
    assert!(world.statuses.record("a", &report(InstanceState::Loading)).await.is_err());
    // The agent has moved to another stream and tells its present state there.
    assert!(world.statuses.record("a", &report(InstanceState::Ready)).await.unwrap());
    faulty.commit_held().await;
    let status: record::Status =
        records::decode(&world.store.get(&keys::status("m-222222")).await.unwrap().unwrap()).unwrap();
    assert_eq!(status.state(), InstanceState::Ready);
    // Reports in a row are recorded though the view may not have seen the one before.
    for state in [InstanceState::Suspect, InstanceState::Ready, InstanceState::Draining] {
        assert!(world.statuses.record("a", &report(state)).await.unwrap());
    }
}

#[tokio::test]
async fn a_run_that_was_claimed_again_leaves_no_record_under_its_older_token() {
    let world = World::new().await;
    world.deployment("m", 1).await;
    let a = world.node("a", 100).await;
    let mut moved = a;
    for _ in 0..3 {
        let (token, next) = world.claim("a", "m-222222", moved, world.offered("m-222222", &["a"]).await).await.unwrap();
        moved = next;
        assert!(world.report("a", "m-222222", token, InstanceState::Ready).await);
        shown(&world, "the run", |s| s.runs.contains_key(&format!("m-222222/{token}"))).await;
        let txn = Txn { then: vec![Op::Delete(keys::claim("m-222222"))], ..Txn::default() };
        let gone = world.store.txn(txn).await.unwrap().revision;
        world.view.at_least(gone, WAIT).await.unwrap();
    }
    let runs = world.store.list(&keys::runs("m-222222")).await.unwrap();
    assert_eq!(runs.items.len(), 1, "{runs:?}");
}

#[tokio::test]
async fn a_claim_of_absurd_size_is_refused_by_name() {
    let world = World::new().await;
    world.deployment("m", 1).await;
    let a = world.node("a", 100).await;
    world.offered("m-222222", &["a"]).await;
    let request = ClaimRequest {
        session_id: "s-a".to_owned(),
        session_revision: a,
        instance: "m-222222".to_owned(),
        memory_bytes: i64::MAX,
        recorded_token: Some(Token { generation: 1, revision: 1 }),
        ..ClaimRequest::default()
    };
    let refused = world.claims.claim("a", &request, "").await.unwrap_err();
    assert!(refused.to_string().contains("memory_bytes = 9223372036854775807"), "{refused}");
}

#[tokio::test]
async fn an_election_that_fails_is_repeated_after_a_pause() {
    let (world, faulty) = faulty_world().await;
    faulty.full.store(true, SeqCst);
    let before = faulty.grants.load(SeqCst);
    let (_leadership, _) = leader::start(world.store.clone(), world.view.clone(), "one".to_owned(), world.stop.clone());
    let_run().await;
    let grants = faulty.grants.load(SeqCst) - before;
    assert!((1..=2).contains(&grants), "{grants} leases were granted at once");
}

/// A cycle that leads, its leadership in hand.
pub(super) async fn leading(
    world: &World,
) -> (tokio::sync::watch::Sender<Option<leader::Term>>, tokio::sync::watch::Receiver<BTreeMap<String, String>>) {
    let leader = record::Leader { coordinator: "one".to_owned(), since: None };
    let revision = world.put(keys::LEADER.to_owned(), &leader, 0).await;
    let (lead, leadership) = tokio::sync::watch::channel(Some(leader::Term { revision, since_ms: 0 }));
    let (unplaced, told) = tokio::sync::watch::channel(BTreeMap::new());
    let settings = plan::Settings { candidates: 3, offer_deadline_ms: 60_000, grace_ms: 1000, revisions_kept: 3 };
    let (store, view, events) = (world.store.clone(), world.view.clone(), world.events.clone());
    let cycle = Cycle { store, view, events, settings, seed: 1, unplaced };
    tokio::spawn(cycle.run(leadership, world.stop.clone()));
    (lead, told)
}

#[tokio::test]
async fn a_plan_that_can_not_be_carried_out_is_not_tried_again_without_a_pause() {
    let (world, faulty) = faulty_world().await;
    world.deployment("m", 1).await;
    // A record that can't be read: the view keeps the last good one, and every write that relies on it fails.
    let garbage = Op::Put { key: keys::deployment("m"), value: vec![0xff; 3], lease: 0 };
    let revision = world.store.txn(Txn { then: vec![garbage], ..Txn::default() }).await.unwrap().revision;
    world.view.at_least(revision, WAIT).await.unwrap();
    let _lead = leading(&world).await;
    world.events_settled().await;
    let before = faulty.txns.load(SeqCst);
    let_run().await;
    let tried = faulty.txns.load(SeqCst) - before;
    assert!(tried <= 3, "{tried} transactions at once");
}

#[tokio::test]
async fn who_leads_no_more_does_not_go_on_telling_what_it_could_not_place() {
    let world = World::new().await;
    world.deployment("m", 1).await;
    let (lead, mut unplaced) = leading(&world).await;
    assert!(tokio::time::timeout(WAIT, unplaced.wait_for(|u| u.contains_key("m"))).await.is_ok());
    lead.send_replace(None);
    let silent = tokio::time::timeout(WAIT, unplaced.wait_for(BTreeMap::is_empty)).await.is_ok();
    assert!(silent, "it is another's to tell");
}

#[tokio::test]
async fn what_a_node_tells_of_itself_is_recorded_in_the_end_and_never_over_what_it_told_later_elsewhere() {
    let (world, faulty) = faulty_world().await;
    world.node("a", 100).await;
    let models = |root: &str| Some(ModelInventory { roots: vec![root.to_owned()], ..ModelInventory::default() });
    let (tell, told) = tokio::sync::watch::channel(Told::default());
    let keeper = tokio::spawn(node_record::keep(world.store.clone(), "a".to_owned(), None, told));
    tokio::time::pause();
    faulty.full.store(true, SeqCst);
    tell.send_modify(|t| t.models = models("/first"));
    let_run().await;
    faulty.full.store(false, SeqCst);
    shown(&world, "the models", |s| s.nodes["a"].value.models == models("/first")).await;
    // The node joins again, elsewhere.
    let joined_at = Some(super::super::clock::now());
    let node = record::Node { models: models("/later"), joined_at, ..record::Node::default() };
    world.put(keys::node("a"), &node, 0).await;
    tell.send_modify(|t| t.models = models("/stale"));
    keeper.await.unwrap();
    let stored: record::Node = records::decode(&world.store.get(&keys::node("a")).await.unwrap().unwrap()).unwrap();
    assert_eq!(stored.models, models("/later"));
}
