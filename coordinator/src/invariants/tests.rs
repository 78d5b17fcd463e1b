//! Each rule: a history that is in order breaks none, and one with a single thing changed breaks that rule.

mod cost;

use super::*;
use crate::store::{Backend, Op, Txn, keys, memory::Memory, records::put};
use drover_proto::{
    store::v1 as record,
    v1::{Capacity, ClaimSet, DeploymentSpec, EndRun, InstanceState, OnLeaseLost},
};
use std::time::Duration;

const GRACE: i64 = 10_000;
const NOW: i64 = 1_000_000;

/// What is changed in an otherwise orderly claim.
#[derive(Default)]
struct Twist {
    unleased: bool,
    without_bump: bool,
    named: i64,
    offer: i64,
    memory_bytes: i64,
}

/// A store that is written by hand.
struct World {
    store: Memory,
    leases: BTreeMap<String, i64>,
    versions: BTreeMap<String, u64>,
    checker: Checker,
    judged: i64,
    now_ms: i64,
}

impl World {
    async fn new() -> Self {
        let store = Memory::start(1);
        let checker = Checker::new(Settings { grace_ms: GRACE, slack_ms: 0, orders: true });
        let (leases, versions) = (BTreeMap::new(), BTreeMap::new());
        let mut world = Self { store, leases, versions, checker, judged: 1, now_ms: NOW };
        world
            .write(vec![put(
                keys::SCHEMA,
                &record::Schema { generation: 1, format: 1, oldest_writer: 1, ..Default::default() },
                0,
            )])
            .await;
        world.leader(NOW - 60_000).await;
        let deployment = record::Deployment { revision: 1, replicas: 1, ..record::Deployment::default() };
        world.write(vec![put(keys::deployment("m"), &deployment, 0)]).await;
        for node in ["a", "b"] {
            world.joins(node).await;
        }
        world
    }

    /// Writes, and lets the checker judge what was written.
    async fn write(&mut self, then: Vec<Op>) -> i64 {
        let revision = self.store.txn(Txn { then, ..Txn::default() }).await.unwrap().revision;
        self.judge().await;
        revision
    }

    async fn judge(&mut self) {
        let last = self.store.list("").await.unwrap().revision;
        let mut watch = self.store.watch("", self.judged + 1).await.unwrap();
        while self.judged < last {
            let changes = watch.next().await.unwrap();
            self.judged = changes.revision;
            self.checker.store(self.now_ms, &changes);
        }
    }

    async fn leader(&mut self, since_ms: i64) {
        let since = Some(crate::control::clock::timestamp(since_ms));
        self.write(vec![put(keys::LEADER, &record::Leader { coordinator: "one".to_owned(), since }, 0)]).await;
    }

    fn session(&mut self, node: &str) -> Op {
        let version = self.versions.entry(node.to_owned()).or_default();
        *version += 1;
        let lease = self.leases[node];
        let session =
            record::Session { session_id: format!("s-{node}"), lease, version: *version, ..Default::default() };
        put(keys::session(node), &session, lease)
    }

    async fn joins(&mut self, node: &str) -> i64 {
        let lease = self.store.grant(Duration::from_secs(60)).await.unwrap();
        self.leases.insert(node.to_owned(), lease);
        self.versions.insert(node.to_owned(), 0);
        let capacity = Some(Capacity { memory_bytes: 10, ..Capacity::default() });
        let told = record::Node { capacity, ..record::Node::default() };
        let session = self.session(node);
        self.write(vec![session, put(keys::node(node), &told, 0)]).await
    }

    async fn leaves(&mut self, node: &str) {
        self.store.revoke(self.leases[node]).await.unwrap();
        self.judge().await;
    }

    fn revision_of(&self, node: &str) -> i64 {
        self.checker.state().sessions[node].mod_revision
    }

    async fn offers(&mut self, id: &str, to: &[&str]) -> i64 {
        let offer = Some(record::Offer {
            candidates: to.iter().map(ToString::to_string).collect(),
            deadline: Some(crate::control::clock::timestamp(self.now_ms)),
            halt_generation: 0,
        });
        self.instance(id, true, offer).await
    }

    async fn instance(&mut self, id: &str, wanted: bool, offer: Option<record::Offer>) -> i64 {
        let instance =
            record::Instance { deployment: "m".to_owned(), revision: 1, wanted, offer, ..Default::default() };
        self.write(vec![put(keys::instance(id), &instance, 0)]).await
    }

    async fn claims(&mut self, node: &str, id: &str, offer: i64) -> Token {
        self.claims_with(node, id, Twist { offer, named: self.revision_of(node), memory_bytes: 5, ..Twist::default() })
            .await
    }

    async fn claims_with(&mut self, node: &str, id: &str, twist: Twist) -> Token {
        let claim = record::Claim {
            node: node.to_owned(),
            session_id: format!("s-{node}"),
            nonce: "n".to_owned(),
            memory_bytes: twist.memory_bytes,
            session_revision: twist.named,
            offer_revision: twist.offer,
            ..Default::default()
        };
        let taken = record::Taken { node: node.to_owned(), nonce: "n".to_owned() };
        let lease = if twist.unleased { 0 } else { self.leases[node] };
        let mut then = vec![put(keys::claim(id), &claim, lease), put(keys::taken(id), &taken, 0)];
        if !twist.without_bump {
            then.push(self.session(node));
        }
        Token { generation: 1, revision: self.write(then).await }
    }

    fn status(node: &str, id: &str, token: Token, state: InstanceState) -> Op {
        let status =
            record::Status { token: Some(token), node: node.to_owned(), state: state.into(), ..Default::default() };
        put(keys::status(id), &status, 0)
    }

    fn run(node: &str, id: &str, token: Token) -> Op {
        let run = record::Run { node: node.to_owned(), token: Some(token), ..Default::default() };
        put(keys::run(id, &token), &run, 0)
    }

    async fn ready(&mut self, node: &str, id: &str, token: Token) {
        let then = vec![Self::status(node, id, token, InstanceState::Ready), Self::run(node, id, token)];
        self.write(then).await;
    }

    /// An instance that a owns, ready.
    async fn owned(&mut self) -> Token {
        let offer = self.offers("m-1", &["a"]).await;
        let token = self.claims("a", "m-1", offer).await;
        self.ready("a", "m-1", token).await;
        token
    }

    fn rules(&self) -> Vec<Rule> {
        self.checker.violations().iter().map(|violation| violation.rule).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn an_orderly_history_breaks_nothing() {
    let mut world = World::new().await;
    let first = world.owned().await;
    world.leaves("a").await;
    let offer = world.offers("m-1", &["b"]).await;
    let second = world.claims("b", "m-1", offer).await;
    world.ready("b", "m-1", second).await;
    world.joins("a").await;
    let ends = vec![EndRun { instance: "m-1".to_owned(), yields_to: Some(second) }];
    let set = ClaimSet { end_runs: ends, revision: world.judged, ..ClaimSet::default() };
    world.checker.told(NOW, "a", &Said::Claims(&set));
    world.instance("m-1", false, None).await;
    let stopped = World::status("b", "m-1", second, InstanceState::Stopped);
    let gone =
        [Op::Delete(keys::claim("m-1")), Op::Delete(keys::run("m-1", &second)), Op::Delete(keys::run("m-1", &first))];
    // The run of a is not b's to close.
    let (close, gone) = (gone[2].clone(), gone[..2].to_vec());
    world.write([vec![stopped], gone].concat()).await;
    world.write(vec![close]).await;
    world
        .write(vec![Op::Delete(keys::instance("m-1")), Op::Delete(keys::taken("m-1")), Op::Delete(keys::status("m-1"))])
        .await;
    assert_eq!(world.checker.violations(), []);
}

#[tokio::test(start_paused = true)]
async fn each_rule_of_claiming_is_named_by_the_one_thing_that_breaks_it() {
    async fn broken(twist: impl FnOnce(i64, i64) -> Twist) -> Vec<Rule> {
        let mut world = World::new().await;
        let offer = world.offers("m-1", &["a"]).await;
        let named = world.revision_of("a");
        world.claims_with("a", "m-1", twist(offer, named)).await;
        world.rules()
    }
    let fine = |offer, named| Twist { offer, named, memory_bytes: 5, ..Twist::default() };
    assert_eq!(broken(fine).await, []);
    assert_eq!(broken(|o, n| Twist { unleased: true, ..fine(o, n) }).await, [Rule::ClaimWithoutLease]);
    assert_eq!(broken(|o, n| Twist { without_bump: true, ..fine(o, n) }).await, [Rule::ClaimNotByTransaction]);
    assert_eq!(broken(|o, n| Twist { named: n - 1, ..fine(o, n) }).await, [Rule::ClaimOfMovedSession]);
    assert_eq!(broken(|o, n| Twist { offer: o - 1, ..fine(o, n) }).await, [Rule::ClaimNotOffered]);
    assert_eq!(broken(|o, n| Twist { memory_bytes: 11, ..fine(o, n) }).await, [Rule::Oversold]);
}

#[tokio::test(start_paused = true)]
async fn a_second_claim_a_used_offer_and_a_claim_that_goes_by_itself_are_seen() {
    let mut world = World::new().await;
    let offer = world.offers("m-1", &["a", "b"]).await;
    world.claims("a", "m-1", offer).await;
    world.claims("b", "m-1", offer).await;
    assert_eq!(world.rules(), [Rule::SecondClaim, Rule::OfferServedTwice]);

    let mut world = World::new().await;
    let offer = world.offers("m-1", &["a", "b"]).await;
    world.claims("a", "m-1", offer).await;
    world.leaves("a").await;
    world.claims("b", "m-1", offer).await;
    assert_eq!(world.rules(), [Rule::OfferServedTwice]);

    let mut world = World::new().await;
    world.owned().await;
    world.write(vec![Op::Delete(keys::claim("m-1"))]).await;
    assert_eq!(world.rules(), [Rule::ClaimVanished]);

    let mut world = World::new().await;
    world.versions.insert("a".to_owned(), 0);
    let session = world.session("a");
    world.write(vec![session]).await;
    assert_eq!(world.rules(), [Rule::SessionRewritten]);

    let mut world = World::new().await;
    let halt = record::Halt { level: "claims".to_owned(), generation: 1 };
    world.write(vec![put(keys::HALT, &halt, 0)]).await;
    let offer = world.offers("m-1", &["a"]).await;
    world.claims("a", "m-1", offer).await;
    assert_eq!(world.rules(), [Rule::ClaimUnderHalt]);
}

#[tokio::test(start_paused = true)]
async fn effects_of_a_stale_token_are_seen() {
    let mut world = World::new().await;
    let first = world.owned().await;
    world.leaves("a").await;
    world.write(vec![World::status("a", "m-1", first, InstanceState::Ready)]).await;
    assert_eq!(world.rules(), [Rule::StaleEffect], "nobody owns it");
    let offer = world.offers("m-1", &["b"]).await;
    let second = world.claims("b", "m-1", offer).await;
    world.write(vec![World::status("a", "m-1", first, InstanceState::Ready)]).await;
    world.write(vec![World::status("a", "m-1", second, InstanceState::Ready)]).await;
    world.write(vec![World::run("a", "m-1", second)]).await;
    assert_eq!(world.rules()[1..], [Rule::StaleEffect, Rule::StaleEffect, Rule::StaleRun]);
    let both = vec![Op::Delete(keys::run("m-1", &first)), World::status("b", "m-1", second, InstanceState::Loading)];
    world.write(both).await;
    assert_eq!(world.rules().last(), Some(&Rule::RunRemoved), "the run is a's");
}

#[tokio::test(start_paused = true)]
async fn a_report_by_an_older_stream_after_one_by_a_newer_is_seen() {
    let mut world = World::new().await;
    let token = world.owned().await;
    let by = |stream_revision| {
        let status = record::Status { token: Some(token), node: "a".to_owned(), stream_revision, ..Default::default() };
        vec![put(keys::status("m-1"), &status, 0)]
    };
    for stream in [5, 9, 0] {
        world.write(by(stream)).await;
    }
    assert_eq!(world.rules(), [], "one that does not say it is of an older program");
    world.write(by(9)).await;
    world.write(by(5)).await;
    assert_eq!(world.rules(), [Rule::OlderReport]);
}

#[tokio::test(start_paused = true)]
async fn what_the_reconciler_does_too_soon_or_too_often_is_seen() {
    let mut world = World::new().await;
    world.offers("m-1", &["a"]).await;
    world.offers("m-2", &["a"]).await;
    assert_eq!(world.rules(), [Rule::SurplusInstance]);

    let mut world = World::new().await;
    world.owned().await;
    world.leaves("a").await;
    world.leader(NOW - GRACE + 1).await;
    world.now_ms = NOW;
    world.offers("m-1", &["b"]).await;
    assert_eq!(world.rules(), [Rule::ReplacedInGrace]);
}

#[tokio::test(start_paused = true)]
async fn an_offer_to_a_node_that_has_not_said_what_runs_there_is_seen() {
    let mut world = World::new().await;
    let told = |session: &str| {
        put(keys::node("c"), &record::Node { inventory_of: session.to_owned(), ..Default::default() }, 0)
    };
    let session = |id: &str, version| {
        let session_id = id.to_owned();
        let opened_at = Some(crate::control::clock::timestamp(NOW));
        put(keys::session("c"), &record::Session { session_id, opened_at, version, ..Default::default() }, 0)
    };
    world.write(vec![session("first", 1), told("")]).await;
    world.now_ms = NOW + GRACE - 1;
    world.offers("m-1", &["a", "c"]).await;
    assert_eq!(world.rules(), [Rule::OfferedBeforeInventory]);
    world.offers("m-1", &["a", "c"]).await;
    assert_eq!(world.rules().len(), 1, "the same offer, written once more");
    world.write(vec![told("first")]).await;
    // On another stream of the same session it says it once more.
    world.write(vec![session("first", 2), told("")]).await;
    world.now_ms = NOW + GRACE - 2;
    world.offers("m-1", &["c"]).await;
    assert_eq!(world.rules().len(), 1);
    world.write(vec![Op::Delete(keys::session("c"))]).await;
    world.write(vec![session("second", 1), told("first")]).await;
    world.now_ms = NOW + GRACE - 3;
    world.offers("m-1", &["c"]).await;
    assert_eq!(world.rules().len(), 2, "that was another session");
    world.now_ms = NOW + GRACE;
    world.offers("m-1", &["c"]).await;
    assert_eq!(world.rules().len(), 2, "it is waited for no longer than that");
}

#[tokio::test(start_paused = true)]
async fn a_restore_that_does_not_raise_the_generation_or_leaves_claims_is_seen() {
    let mut world = World::new().await;
    let token = world.owned().await;
    let copy = world.store.copy();
    world.store.restore(&copy, 2);
    let as_it_was = world.store.list("").await.unwrap();
    world.checker.restored(NOW, &as_it_was);
    assert_eq!(world.rules(), [Rule::RestoredAsItWas]);
    crate::store::restore::finish(&(Arc::new(world.store.clone()) as crate::store::Store), 0).await.unwrap();
    let restored = world.store.list("").await.unwrap();
    world.checker.restored(NOW, &restored);
    assert_eq!((world.rules().len(), world.checker.state().generation()), (1, 2));
    // What the owner from before says is an effect of a stale token.
    world.judged = restored.revision;
    world.write(vec![World::status("a", "m-1", token, InstanceState::Ready)]).await;
    assert_eq!(world.rules()[1..], [Rule::StaleEffect]);
}

#[tokio::test(start_paused = true)]
async fn what_is_told_is_held_against_the_history() {
    let mut world = World::new().await;
    let token = world.owned().await;
    let told = |world: &mut World, node: &str, said: &Said<'_>| {
        let before = world.rules().len();
        world.checker.told(NOW, node, said);
        world.rules().split_off(before)
    };
    let claimed = |token, nonce| Said::Claimed { instance: "m-1", nonce, token };
    assert_eq!(told(&mut world, "a", &claimed(token, "n")), []);
    assert_eq!(told(&mut world, "a", &claimed(token, "other")), [Rule::AnsweredUnknownClaim]);
    assert_eq!(told(&mut world, "b", &claimed(token, "n")), [Rule::AnsweredUnknownClaim]);
    let other = Token { generation: 2, ..token };
    assert_eq!(told(&mut world, "a", &claimed(other, "n")), [Rule::TokenOfOtherGeneration, Rule::AnsweredUnknownClaim]);

    let order = |yields_to, revision| {
        let end_runs = vec![EndRun { instance: "m-1".to_owned(), yields_to }];
        ClaimSet { end_runs, revision, ..ClaimSet::default() }
    };
    let now = world.judged;
    assert_eq!(told(&mut world, "b", &Said::Claims(&order(Some(token), now))), []);
    assert_eq!(
        told(&mut world, "b", &Said::Claims(&order(Some(token), now - 1))),
        [Rule::DrainOrder],
        "not ready then"
    );
    assert_eq!(told(&mut world, "b", &Said::Claims(&order(None, now))), [Rule::DrainOrder], "it is wanted");

    let hello = |resumes| Said::Hello { stream: 1, resumes, chosen: "" };
    let welcome =
        |session_id, session_revision, resumed| Said::Welcome { stream: 1, session_id, session_revision, resumed };
    told(&mut world, "a", &hello("s-a"));
    assert_eq!(told(&mut world, "a", &welcome("s-a", now + 1, true)), []);
    told(&mut world, "a", &hello("s-a"));
    assert_eq!(told(&mut world, "a", &welcome("s-a", now, true)), [Rule::ResumedWithoutBump]);
    told(&mut world, "a", &hello(""));
    assert_eq!(told(&mut world, "a", &welcome("s-a", now + 2, true)), [Rule::SessionHandedOver]);
    // Of two streams, as after a break, each welcome answers its own hello.
    told(&mut world, "a", &Said::Hello { stream: 2, resumes: "s-a", chosen: "" });
    told(&mut world, "a", &Said::Hello { stream: 3, resumes: "", chosen: "other" });
    let second = Said::Welcome { stream: 2, session_id: "s-a", session_revision: now + 3, resumed: true };
    assert_eq!(told(&mut world, "a", &second), []);

    world.checker.asked_for_renewal("a");
    world.checker.renewed(NOW, "a");
    assert_eq!(world.rules().len(), 8);
    world.checker.renewed(NOW, "a");
    world.checker.deadline(NOW, "a", 5, 5);
    world.checker.deadline(NOW, "a", 6, 5);
    assert_eq!(world.rules()[8..], [Rule::RenewedWithoutHeartbeat, Rule::DeadlineBeyondLease]);
}

#[tokio::test(start_paused = true)]
async fn a_server_ends_with_its_lease_where_its_deployment_says_so_and_only_there() {
    for policy in [OnLeaseLost::Unspecified, OnLeaseLost::Keep, OnLeaseLost::Stop] {
        let mut world = World::new().await;
        let spec = DeploymentSpec { on_lease_lost: policy.into(), ..DeploymentSpec::default() };
        let revision = record::Revision { spec: Some(spec), created_at: None };
        world.write(vec![put(keys::revision("m", 1), &revision, 0)]).await;
        let token = world.owned().await;
        let process = Process { instance: "m-1".to_owned(), token, memory_bytes: 5 };
        let events = [
            HostEvent::Started { pid: 1, process, on_disk: token, capacity: 10 },
            HostEvent::LeaseLost { pid: 1, ready: false },
            HostEvent::LeaseLost { pid: 1, ready: true },
        ];
        events.iter().for_each(|event| world.checker.host(NOW, "a", "a", event));
        // It was told to end, and lives all the same.
        world.leaves("a").await;
        let broken = if policy == OnLeaseLost::Stop { [Rule::OutlivedLease] } else { [Rule::SignalledWhileWanted] };
        assert_eq!(world.rules(), broken, "{policy:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_hosts_do_is_held_against_the_history() {
    let mut world = World::new().await;
    let token = world.owned().await;
    let process = |token| Process { instance: "m-1".to_owned(), token, memory_bytes: 5 };
    let started = |pid, token, on_disk| HostEvent::Started { pid, process: process(token), on_disk, capacity: 10 };
    let host = |world: &mut World, host: &str, event: HostEvent| {
        let before = world.rules().len();
        world.checker.host(NOW, host, "a", &event);
        world.rules().split_off(before)
    };
    assert_eq!(host(&mut world, "a", started(1, token, token)), []);
    assert_eq!(host(&mut world, "a", HostEvent::Signalled { pid: 1, ready: false }), []);
    assert_eq!(host(&mut world, "a", HostEvent::Signalled { pid: 1, ready: true }), [Rule::SignalledWhileWanted]);
    assert_eq!(host(&mut world, "clone", started(1, token, token)), [Rule::SecondProcess]);
    host(&mut world, "a", HostEvent::Ended { pid: 1 });
    host(&mut world, "clone", HostEvent::Ended { pid: 1 });
    let higher = Token { revision: token.revision + 1, ..token };
    assert_eq!(host(&mut world, "a", started(2, token, higher)), [Rule::LowerTokenStarted]);
    host(&mut world, "a", HostEvent::Ended { pid: 2 });
    assert_eq!(host(&mut world, "a", started(3, higher, higher)), [Rule::StartedWithoutClaim]);
    host(&mut world, "a", HostEvent::Ended { pid: 3 });
    world.leaves("a").await;
    assert_eq!(host(&mut world, "other", started(4, token, token)), [Rule::StartedTooLate]);
    world.instance("m-1", false, None).await;
    assert_eq!(host(&mut world, "other", HostEvent::Signalled { pid: 4, ready: true }), [], "nobody wants it");
}
