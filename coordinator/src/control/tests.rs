//! Claims, reports, election and collection over the store in memory: each rule by name.

mod batches;
mod faults;
pub(crate) mod faulty;
mod progress;
mod reach;
mod together;

use super::{claims, claims::Claims, cycle::Cycle, events::Events, leader, seen::Rate, status::Statuses, view::View};
use crate::{
    plan,
    store::{Compare, Store, Txn, keys, memory::Memory, pack::Step, records, schema},
};
use drover_proto::{
    status::reason,
    store::v1 as record,
    v1::{Capacity, ClaimRequest, DeploymentSpec, InstanceState, ModelFile, ModelInventory, StatusReport, Token},
};
use std::{sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

const WAIT: Duration = Duration::from_secs(10);

struct World {
    store: Store,
    view: View,
    claims: Claims,
    statuses: Statuses,
    events: Events,
    stop: CancellationToken,
}

impl World {
    async fn new() -> Self {
        Self::over(Arc::new(Memory::start(1))).await
    }

    async fn over(store: Store) -> Self {
        schema::open(&store, None).await.unwrap();
        let stop = CancellationToken::new();
        let view = View::start(store.clone(), stop.clone());
        let (events, _) = Events::start(store.clone(), "coordinator/test".to_owned());
        let claims = Claims::new(store.clone(), view.clone(), events.clone());
        let statuses = Statuses::new(store.clone(), view.clone(), events.clone());
        Self { store, view, claims, statuses, events, stop }
    }

    async fn put<M: prost::Message>(&self, key: String, value: &M, lease: i64) -> i64 {
        let txn = Txn { compare: vec![], then: vec![records::put(key, value, lease)], otherwise: vec![] };
        let revision = self.store.txn(txn).await.unwrap().revision;
        self.view.at_least(revision, WAIT).await.unwrap();
        revision
    }

    /// Revision of the store's schema.
    fn schema(&self) -> i64 {
        self.view.snapshot().schema.as_ref().unwrap().mod_revision
    }

    /// A node with a session; returns the session's revision.
    async fn node(&self, name: &str, memory_bytes: i64) -> i64 {
        let lease = self.store.grant(Duration::from_secs(60)).await.unwrap();
        let models = ModelInventory {
            roots: vec!["/m".to_owned()],
            files: vec![ModelFile { path: "/m/m.gguf".to_owned(), size_bytes: 1 }],
            truncated: false,
        };
        let capacity = Some(Capacity { memory_bytes, cpus: 1, gpus: vec![] });
        let inventory_of = format!("s-{name}");
        let node = record::Node { capacity, models: Some(models), inventory_of, ..record::Node::default() };
        self.put(keys::node(name), &node, 0).await;
        let session =
            record::Session { session_id: format!("s-{name}"), lease, version: 1, ..record::Session::default() };
        self.put(keys::session(name), &session, lease).await
    }

    async fn deployment(&self, name: &str, replicas: i32) {
        let spec = DeploymentSpec {
            name: name.to_owned(),
            model_path: "m.gguf".to_owned(),
            memory_bytes: Some(10),
            ..DeploymentSpec::default()
        };
        let revision = record::Revision { spec: Some(spec.clone()), created_at: None };
        self.put(keys::revision(name, 1), &revision, 0).await;
        let deployment = record::Deployment {
            spec: Some(spec),
            generation: 1,
            revision: 1,
            replicas,
            ..record::Deployment::default()
        };
        self.put(keys::deployment(name), &deployment, 0).await;
    }

    /// An instance offered to these nodes; returns the offer's revision.
    async fn offered(&self, id: &str, candidates: &[&str]) -> i64 {
        let offer = record::Offer {
            candidates: candidates.iter().map(ToString::to_string).collect(),
            deadline: Some(super::clock::timestamp(super::clock::now_ms() + 60_000)),
            halt_generation: 0,
        };
        let instance = record::Instance {
            deployment: "m".to_owned(),
            revision: 1,
            wanted: true,
            offer: Some(offer),
            ..record::Instance::default()
        };
        self.put(keys::instance(id), &instance, 0).await
    }

    async fn claim(&self, node: &str, id: &str, session: i64, offer: i64) -> Result<(Token, i64), String> {
        let request = ClaimRequest {
            session_id: format!("s-{node}"),
            session_revision: session,
            instance: id.to_owned(),
            offer_revision: offer,
            nonce: "n".to_owned(),
            memory_bytes: 10,
            recorded_token: (offer == 0).then_some(Token { generation: 1, revision: 1 }),
            halt_generation: 0,
        };
        match self.claims.claim(node, &request, "").await {
            Ok(answer) => Ok((answer.token.unwrap(), answer.session_revision)),
            Err(claims::Error::Refused { reason, .. }) => Err(reason),
            Err(other) => panic!("{other}"),
        }
    }

    async fn report(&self, node: &str, id: &str, token: Token, state: InstanceState) -> bool {
        let report = StatusReport {
            instance: id.to_owned(),
            token: Some(token),
            state: state.into(),
            ..StatusReport::default()
        };
        self.statuses.record(node, 1, &report).await.unwrap()
    }

    /// Waits until the last event asked for is recorded: they are written in their order.
    async fn events_settled(&self) {
        let mark = rand::random::<u64>().to_string();
        let object = super::events::FLEET.to_owned();
        self.events.record(object, "Settled", drover_proto::v1::Severity::Info, mark.clone());
        let settled = async {
            loop {
                let items = self.store.list(&keys::events(super::events::FLEET)).await.unwrap().items;
                if items.iter().any(|kv| kv.value.windows(mark.len()).any(|part| part == mark.as_bytes())) {
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(WAIT, settled).await.unwrap();
    }

    async fn keys(&self) -> Vec<String> {
        let listing = self.store.list("").await.unwrap();
        listing.items.into_iter().map(|i| i.key).filter(|k| !k.starts_with(keys::EVENTS)).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[tokio::test]
async fn claims_of_one_node_are_serial_so_that_capacity_is_never_oversold() {
    let world = World::new().await;
    world.deployment("m", 2).await;
    let session = world.node("a", 15).await;
    let (first, second) = (world.offered("m-222222", &["a"]).await, world.offered("m-333333", &["a"]).await);
    // Both name the session as it was: one wins, whoever it is; the other is dead.
    let both =
        tokio::join!(world.claim("a", "m-222222", session, first), world.claim("a", "m-333333", session, second));
    let mut refused: Vec<_> = [both.0.clone(), both.1.clone()].into_iter().filter_map(Result::err).collect();
    assert_eq!(refused.pop().as_deref(), Some(reason::SESSION_MOVED), "{both:?}");
    assert!(refused.is_empty(), "{both:?}");
    let ((_, moved), (id, offer)) =
        both.0.map(|won| (won, ("m-333333", second))).or(both.1.map(|won| (won, ("m-222222", first)))).unwrap();
    assert_eq!(world.claim("a", id, moved, offer).await.unwrap_err(), reason::NO_CAPACITY);
}

#[tokio::test]
async fn an_offer_serves_once_and_only_those_whom_it_names() {
    let world = World::new().await;
    world.deployment("m", 1).await;
    let (a, b) = (world.node("a", 100).await, world.node("b", 100).await);
    let offer = world.offered("m-222222", &["a"]).await;
    assert_eq!(world.claim("b", "m-222222", b, offer).await.unwrap_err(), reason::OFFER_GONE);
    let (token, moved) = world.claim("a", "m-222222", a, offer).await.unwrap();
    assert_eq!(world.claim("a", "m-222222", moved, offer).await.unwrap_err(), reason::ALREADY_CLAIMED);
    // Its owner gives it up: the offer has served, although the instance is free and wanted.
    assert!(world.report("a", "m-222222", token, InstanceState::Stopped).await);
    let revision = world.store.get(keys::SCHEMA).await.unwrap().unwrap().mod_revision;
    world.view.at_least(revision, WAIT).await.unwrap();
    world.view.subscribe().wait_for(|s| s.claims.is_empty()).await.unwrap();
    assert_eq!(world.claim("a", "m-222222", moved, offer).await.unwrap_err(), reason::OFFER_GONE);
    // A re-claim of a run that the node still has needs no offer.
    assert!(world.claim("a", "m-222222", moved, 0).await.is_ok());
}

#[tokio::test]
async fn under_a_halt_only_what_runs_is_claimed_again() {
    let world = World::new().await;
    world.deployment("m", 2).await;
    let a = world.node("a", 100).await;
    let offer = world.offered("m-222222", &["a"]).await;
    let halt = |level: &str, generation| record::Halt { level: level.to_owned(), generation };
    world.put(keys::HALT.to_owned(), &halt("claims", 1), 0).await;
    assert_eq!(world.claim("a", "m-222222", a, offer).await.unwrap_err(), reason::HALTED);
    let (_, moved) = world.claim("a", "m-222222", a, 0).await.unwrap();
    world.offered("m-333333", &["a"]).await;
    world.put(keys::HALT.to_owned(), &halt("all", 2), 0).await;
    assert_eq!(world.claim("a", "m-333333", moved, 0).await.unwrap_err(), reason::HALTED);
}

#[tokio::test]
async fn a_report_under_a_stale_token_changes_nothing() {
    let world = World::new().await;
    world.deployment("m", 1).await;
    let (a, b) = (world.node("a", 100).await, world.node("b", 100).await);
    let offer = world.offered("m-222222", &["a"]).await;
    let (token, _) = world.claim("a", "m-222222", a, offer).await.unwrap();
    assert!(world.report("a", "m-222222", token, InstanceState::Ready).await);
    // The claim is lost and made anew by another node: the old token is stale from then on.
    let txn = Txn { then: vec![crate::store::Op::Delete(keys::claim("m-222222"))], ..Txn::default() };
    let gone = world.store.txn(txn).await.unwrap().revision;
    world.view.at_least(gone, WAIT).await.unwrap();
    let (newer, _) = world.claim("b", "m-222222", b, 0).await.unwrap();
    assert!(newer > token);
    assert!(!world.report("a", "m-222222", token, InstanceState::Failed).await);
    for stale in [Token { generation: 0, ..newer }, Token { generation: 2, ..newer }] {
        assert!(!world.report("b", "m-222222", stale, InstanceState::Failed).await);
    }
    let status: record::Status =
        records::decode(&world.store.get(&keys::status("m-222222")).await.unwrap().unwrap()).unwrap();
    assert_eq!((status.state(), status.token), (InstanceState::Ready, Some(token)), "as the owner left it");
    assert!(world.report("b", "m-222222", newer, InstanceState::Ready).await);
    // The record of one's own ended run may be closed, whoever owns the instance now; it touches nothing else.
    assert!(world.keys().await.contains(&keys::run("m-222222", &token)));
    assert!(!world.report("b", "m-222222", token, InstanceState::Stopped).await, "not b's run");
    assert!(world.report("a", "m-222222", token, InstanceState::Stopped).await);
    let keys_left = world.keys().await;
    assert!(!keys_left.contains(&keys::run("m-222222", &token)) && keys_left.contains(&keys::claim("m-222222")));
}

/// Waits until the view shows what `found` looks for.
async fn shown(
    world: &World,
    what: &str,
    found: impl Fn(&plan::snapshot::Snapshot) -> bool,
) -> Arc<plan::snapshot::Snapshot> {
    let mut snapshots = world.view.subscribe();
    let shown = tokio::time::timeout(WAIT, snapshots.wait_for(|s| found(s))).await;
    shown.unwrap_or_else(|_| panic!("{what}: not in time")).unwrap().clone()
}

#[tokio::test]
async fn two_coordinators_have_one_leader_and_what_is_deleted_leaves_no_key() {
    let world = World::new().await;
    let session = world.node("a", 1000).await;
    let base = world.keys().await;
    let mut leaders = Vec::new();
    for id in ["one", "two"] {
        let (leadership, _) = leader::start(world.store.clone(), world.view.clone(), id.to_owned(), world.stop.clone());
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
        let cycle = Cycle { store, view, events, settings, replace_rate: Rate { burst: 50, per_s: 10 }, seed: 1 };
        tokio::spawn(cycle.run(leadership.clone(), world.stop.clone()));
        leaders.push(leadership);
    }
    world.deployment("m", 3).await;
    let offered = shown(&world, "three instances are offered", |s| {
        s.instances.values().filter(|i| i.value.offer.is_some()).count() == 3
    })
    .await;
    assert_eq!(leaders.iter().filter(|l| l.borrow().is_some()).count(), 1);
    let mut moved = session;
    let mut owned = Vec::new();
    for (id, instance) in &offered.instances {
        let (token, next) = world.claim("a", id, moved, instance.mod_revision).await.unwrap();
        assert!(world.report("a", id, token, InstanceState::Ready).await);
        moved = next;
        owned.push((id.clone(), token));
    }
    let mut deployment = offered.deployments["m"].value.clone();
    deployment.deleting = true;
    world.put(keys::deployment("m"), &deployment, 0).await;
    shown(&world, "nothing is wanted", |s| s.instances.values().all(|i| !i.value.wanted)).await;
    for (id, token) in owned {
        assert!(world.report("a", &id, token, InstanceState::Stopped).await);
    }
    shown(&world, "the deployment is gone", |s| s.deployments.is_empty()).await;
    let left: Vec<_> = world.keys().await.into_iter().filter(|k| k != keys::LEADER).collect();
    assert_eq!(left, base);
}

#[tokio::test]
async fn a_write_of_a_former_leader_does_nothing() {
    let world = World::new().await;
    let leader = record::Leader { coordinator: "one".to_owned(), since: None };
    let revision = world.put(keys::LEADER.to_owned(), &leader, 0).await;
    let term = leader::Term { revision, schema: world.schema(), since: tokio::time::Instant::now(), lease: 0 };
    world.put(keys::LEADER.to_owned(), &record::Leader { coordinator: "two".to_owned(), since: None }, 0).await;
    let write = records::put(keys::instance("m-222222"), &record::Instance::default(), 0);
    let compare = vec![Compare::CreateRevision(keys::instance("m-222222"), 0)];
    let txn = leader::guarded(&term, Step { compare, then: vec![write] });
    assert!(!world.store.txn(txn).await.unwrap().succeeded);
    assert!(world.store.get(&keys::instance("m-222222")).await.unwrap().is_none());
}
