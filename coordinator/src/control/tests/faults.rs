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
    assert_eq!(world.statuses.record("a", 1, &stale).await, Ok(false));
    assert_eq!(world.statuses.record_all("a", 1, &[stale, other], &mut 0).await, [Ok(false), Ok(false)]);
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
    assert!(world.statuses.record("a", 1, &report(InstanceState::Loading)).await.is_err());
    // The agent has moved to another stream and tells its present state there.
    assert!(world.statuses.record("a", 1, &report(InstanceState::Ready)).await.unwrap());
    faulty.commit_held().await;
    let status: record::Status =
        records::decode(&world.store.get(&keys::status("m-222222")).await.unwrap().unwrap()).unwrap();
    assert_eq!(status.state(), InstanceState::Ready);
    // Reports in a row are recorded though the view may not have seen the one before.
    for state in [InstanceState::Suspect, InstanceState::Ready, InstanceState::Draining] {
        assert!(world.statuses.record("a", 1, &report(state)).await.unwrap());
    }
}

#[tokio::test]
async fn what_an_agent_has_said_on_an_older_stream_does_not_replace_what_it_has_said_since() {
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
    let stored = async || {
        let kv = world.store.get(&keys::status("m-222222")).await.unwrap().unwrap();
        let status: record::Status = records::decode(&kv).unwrap();
        (status.state(), status.stream_revision)
    };
    let (first, second, third) = (token.revision, token.revision + 10, token.revision + 20);
    assert_eq!(world.statuses.record("a", first, &report(InstanceState::Starting)).await, Ok(true));
    world.events_settled().await;
    // Another coordinator, to which the agent has gone on, records it while this one is slow with an older report.
    let ready = record::Status {
        token: Some(token),
        node: "a".to_owned(),
        state: InstanceState::Ready.into(),
        stream_revision: second,
        ..record::Status::default()
    };
    let then = vec![records::put(keys::status("m-222222"), &ready, 0)];
    faulty.before_next_txn(Txn { then, ..Txn::default() });
    assert_eq!(world.statuses.record("a", first, &report(InstanceState::Loading)).await, Ok(false));
    assert_eq!(stored().await, (InstanceState::Ready, second));
    // The same state on yet another stream keeps out what was said on the one before.
    assert_eq!(world.statuses.record("a", third, &report(InstanceState::Ready)).await, Ok(true));
    assert_eq!(world.statuses.record("a", second, &report(InstanceState::Suspect)).await, Ok(false));
    assert_eq!(stored().await, (InstanceState::Ready, third));
    assert_eq!(world.statuses.record("a", third, &report(InstanceState::Suspect)).await, Ok(true));
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
async fn whether_a_run_was_ready_is_known_after_its_claim_is_lost_and_another_owner_has_reported() {
    let world = World::new().await;
    world.deployment("m", 1).await;
    let (a, b) = (world.node("a", 100).await, world.node("b", 100).await);
    for node in ["a", "b"] {
        let silent = record::Node { inventory_of: String::new(), ..world.view.snapshot().nodes[node].value.clone() };
        world.put(keys::node(node), &silent, 0).await;
    }
    let offer = world.offered("m-222222", &["a"]).await;
    let (token, _) = world.claim("a", "m-222222", a, offer).await.unwrap();
    // Reports in a row, whether or not the view has seen the one before: the last one counts.
    for (seconds, state) in [InstanceState::Ready, InstanceState::Suspect, InstanceState::Ready].into_iter().enumerate()
    {
        let since = Some(prost_types::Timestamp { seconds: i64::try_from(seconds).unwrap(), nanos: 0 });
        let (instance, token) = ("m-222222".to_owned(), Some(token));
        let report = StatusReport { instance, token, state: state.into(), since, ..StatusReport::default() };
        assert!(world.statuses.record("a", 1, &report).await.unwrap());
    }
    let txn = Txn { then: vec![Op::Delete(keys::claim("m-222222"))], ..Txn::default() };
    let gone = world.store.txn(txn).await.unwrap().revision;
    let answers = |revision| {
        let view = world.view.clone();
        async move { view.at_least(revision, WAIT).await.unwrap().answering("m-222222").map(|run| run.node.clone()) }
    };
    assert_eq!(answers(gone).await.as_deref(), Some("a"));
    let (newer, _) = world.claim("b", "m-222222", b, 0).await.unwrap();
    assert!(world.report("b", "m-222222", newer, InstanceState::Loading).await);
    let reported = world.store.get(&keys::status("m-222222")).await.unwrap().unwrap().mod_revision;
    assert_eq!(answers(reported).await.as_deref(), Some("a"), "b loads");
    assert!(world.report("b", "m-222222", newer, InstanceState::Ready).await);
    let reported = world.store.get(&keys::status("m-222222")).await.unwrap().unwrap().mod_revision;
    assert_eq!(answers(reported).await.as_deref(), Some("b"), "a higher token is ready");
    // The node of the higher one says that it runs nothing: what is left is the other one.
    let node = record::Node { inventory_of: "s-b".to_owned(), ..record::Node::default() };
    let told = world.put(keys::node("b"), &node, 0).await;
    assert_eq!(answers(told).await.as_deref(), Some("b"), "what it owns it tells by its reports");
    let txn = Txn { then: vec![Op::Delete(keys::claim("m-222222"))], ..Txn::default() };
    let gone = world.store.txn(txn).await.unwrap().revision;
    assert_eq!(answers(gone).await.as_deref(), Some("a"));
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
pub(super) async fn leading(world: &World) -> tokio::sync::watch::Sender<Option<leader::Term>> {
    let leader = record::Leader { coordinator: "one".to_owned(), since: None };
    let revision = world.put(keys::LEADER.to_owned(), &leader, 0).await;
    let (lead, leadership) = tokio::sync::watch::channel(Some(leader::Term {
        revision,
        schema: world.schema(),
        since: tokio::time::Instant::now(),
        lease: 0,
    }));
    tokio::spawn(cycle(world).run(leadership, world.stop.clone()));
    lead
}

pub(super) fn cycle(world: &World) -> Cycle {
    let settings = plan::Settings {
        candidates: 3,
        offer_deadline_ms: 60_000,
        grace_ms: 1000,
        revisions_kept: 3,
        freeze_share_percent: 55,
        progress_deadline_ms: 60_000,
        give_up_after_ms: 60_000,
        avoid: plan::avoid::Delays { first_ms: 60_000, max_ms: 600_000 },
    };
    let (store, view, events) = (world.store.clone(), world.view.clone(), world.events.clone());
    Cycle { store, view, events, settings, replace_rate: Rate { burst: 50, per_s: 10 }, seed: 1 }
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
async fn what_a_plan_wrote_late_does_not_come_on_top_of_the_next_plan() {
    let (world, faulty) = faulty_world().await;
    world.node("a", 100).await;
    let _lead = leading(&world).await;
    world.events_settled().await;
    let_run().await;
    let spec = DeploymentSpec {
        name: "m".to_owned(),
        model_path: "m.gguf".to_owned(),
        memory_bytes: Some(10),
        ..DeploymentSpec::default()
    };
    let revision = record::Revision { spec: Some(spec.clone()), created_at: None };
    let deployment = record::Deployment { spec: Some(spec), revision: 1, replicas: 1, ..record::Deployment::default() };
    let then =
        vec![records::put(keys::revision("m", 1), &revision, 0), records::put(keys::deployment("m"), &deployment, 0)];
    // The answer to the plan's transaction does not come.
    faulty.hold.store(true, SeqCst);
    faulty.by_others(Txn { then, ..Txn::default() }).await;
    shown(&world, "an instance", |s| s.instances.len() == 1).await;
    assert!(!faulty.commit_held().await.succeeded, "it was settled that it has not taken effect");
    let term = world.store.get(keys::LEADER).await.unwrap().unwrap();
    assert!(term.mod_revision > term.create_revision, "the term goes on under a new revision of its key");
    let scaled = record::Deployment { replicas: 2, ..world.view.snapshot().deployments["m"].value.clone() };
    world.put(keys::deployment("m"), &scaled, 0).await;
    shown(&world, "it still leads", |s| s.instances.len() == 2).await;
}

#[tokio::test]
async fn what_finds_no_node_is_in_the_store_for_every_replica_while_somebody_leads_who_could_take_it_back() {
    let world = World::new().await;
    world.deployment("m", 1).await;
    let stop = world.stop.child_token();
    let (leadership, _) = leader::start(world.store.clone(), world.view.clone(), "one".to_owned(), stop.clone());
    tokio::spawn(cycle(&world).run(leadership, world.stop.clone()));
    let why = |s: &plan::snapshot::Snapshot| s.unplaced.get("m").map(|u| u.value.why.clone()).unwrap_or_default();
    shown(&world, "no node has joined", |s| why(s) == "no node has ever joined").await;
    world.node("a", 5).await;
    shown(&world, "a has too little room", |s| why(s).contains("a has 5 bytes of memory left")).await;
    let roomy = world.node("b", 100).await;
    shown(&world, "it is offered", |s| s.unplaced.is_empty() && s.revision > roomy).await;
    world.deployment("n", 1).await;
    let full = record::Deployment { replicas: 20, ..world.view.snapshot().deployments["n"].value.clone() };
    world.put(keys::deployment("n"), &full, 0).await;
    shown(&world, "not all of n", |s| s.unplaced.contains_key("n")).await;
    stop.cancel();
    shown(&world, "nobody leads", |s| s.leader.is_none() && s.unplaced.is_empty()).await;
}

#[tokio::test]
async fn what_a_node_tells_of_itself_is_recorded_in_the_end_and_never_over_what_it_told_later_elsewhere() {
    let (world, faulty) = faulty_world().await;
    world.node("a", 100).await;
    let models = |root: &str| Some(ModelInventory { roots: vec![root.to_owned()], ..ModelInventory::default() });
    let (tell, told) = tokio::sync::watch::channel(Told::default());
    let keeper = tokio::spawn(node_record::keep(world.store.clone(), "a".to_owned(), (None, world.schema()), told));
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

#[tokio::test]
async fn a_report_from_before_a_restore_is_void_though_revisions_come_again() {
    let (world, faulty) = faulty_world().await;
    world.deployment("m", 1).await;
    let a = world.node("a", 100).await;
    let offer = world.offered("m-222222", &["a"]).await;
    let (token, _) = world.claim("a", "m-222222", a, offer).await.unwrap();
    world.view.at_least(token.revision, WAIT).await.unwrap();
    world.events_settled().await;
    let report = StatusReport {
        instance: "m-222222".to_owned(),
        token: Some(token),
        state: InstanceState::Ready.into(),
        ..StatusReport::default()
    };
    faulty.hold.store(true, SeqCst);
    assert!(world.statuses.record("a", 1, &report).await.is_err());
    // The store is restored. The claim, for the sake of argument, is another one that was made at the same revision.
    let schema = world.view.snapshot().schema.clone().unwrap();
    let raised = record::Schema { generation: 2, ..schema.value.clone() };
    world.put(keys::SCHEMA.to_owned(), &raised, 0).await;
    assert!(!faulty.commit_held().await.succeeded, "it compares what the store is");
    assert!(world.store.get(&keys::status("m-222222")).await.unwrap().is_none());
}

#[tokio::test]
async fn a_leader_whose_key_was_removed_leads_no_more_and_another_term_begins() {
    let world = World::new().await;
    let (leadership, _) = leader::start(world.store.clone(), world.view.clone(), "one".to_owned(), world.stop.clone());
    let first = term(&leadership, |_| true).await;
    let txn = Txn { then: vec![Op::Delete(keys::LEADER.to_owned())], ..Txn::default() };
    world.store.txn(txn).await.unwrap();
    let next = term(&leadership, |term| *term != first).await;
    assert!(next.revision > first.revision);
    // Nor does a term survive a restore.
    let schema = world.view.snapshot().schema.clone().unwrap();
    let raised = record::Schema { generation: 2, ..schema.value.clone() };
    world.put(keys::SCHEMA.to_owned(), &raised, 0).await;
    let last = term(&leadership, |term| *term != next).await;
    assert!(last.schema > next.schema);
}

async fn term(leadership: &leader::Leadership, fits: impl Fn(&leader::Term) -> bool) -> leader::Term {
    let mut leadership = leadership.clone();
    let reached = leadership.wait_for(|term| term.as_ref().is_some_and(&fits));
    tokio::time::timeout(WAIT, reached).await.expect("a term").unwrap().unwrap()
}

#[tokio::test]
async fn nothing_is_decided_from_a_store_whose_content_is_lost() {
    let world = World::new().await;
    world.deployment("m", 1).await;
    let before = world.view.snapshot();
    let (leadership, _) = leader::start(world.store.clone(), world.view.clone(), "one".to_owned(), world.stop.clone());
    term(&leadership, |_| true).await;
    let everything = Txn { then: vec![Op::DeletePrefix(String::new())], ..Txn::default() };
    world.store.txn(everything).await.unwrap();
    let why = tokio::time::timeout(WAIT, world.view.until_refused()).await.unwrap();
    assert!(why.contains("the store is empty") && why.contains("--new-store"), "{why}");
    assert!(!world.view.live());
    let mut over = leadership.clone();
    tokio::time::timeout(WAIT, over.wait_for(Option::is_none)).await.expect("the term's end").unwrap();
    // Begun anew, it is another one.
    schema::open(&world.store, None).await.unwrap();
    let mut refused = world.view.refused();
    let another = refused.wait_for(|why| why.as_ref().is_some_and(|why| why.contains("begun anew")));
    tokio::time::timeout(WAIT, another).await.expect("the refusal").unwrap();
    assert_eq!(world.view.snapshot().deployments.len(), before.deployments.len(), "what was known last is shown");
    // What was lost is put back.
    let schema = before.schema.clone().unwrap();
    let put = Txn { then: vec![records::put(keys::SCHEMA, &schema.value, 0)], ..Txn::default() };
    world.store.txn(put).await.unwrap();
    tokio::time::timeout(WAIT, refused.wait_for(Option::is_none)).await.expect("the view").unwrap();
    term(&leadership, |_| true).await;
}
