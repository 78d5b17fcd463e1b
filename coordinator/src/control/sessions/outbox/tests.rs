use super::*;
use crate::{control::clock, plan::snapshot::Stored};
use drover_proto::{store::v1 as record, v1::DeploymentSpec};
use std::sync::Arc;

const NOW: i64 = 1_000_000;

/// A node's stream, which sees one snapshot after the other.
#[derive(Default)]
struct Stream {
    outbox: Outbox,
    node: &'static str,
    last: Snapshot,
    shares: Shares,
}

impl Stream {
    fn of(node: &'static str, runs: Vec<RecordedRun>) -> Self {
        Self { outbox: Outbox::new(runs), node, ..Self::default() }
    }

    fn sees(&mut self, snapshot: &Snapshot, now_ms: i64) -> (Vec<SessionResponse>, Option<i64>) {
        self.shares = self.shares.after(&self.last, snapshot);
        self.last = snapshot.clone();
        self.outbox.due(snapshot, &self.shares, self.node, now_ms)
    }
}

fn stored<T>(value: T, mod_revision: i64) -> Arc<Stored<T>> {
    Arc::new(Stored { value, create_revision: 1, mod_revision })
}

fn offered(revision: i64) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let spec = Some(DeploymentSpec { name: "m".to_owned(), ..DeploymentSpec::default() });
    snapshot.revisions.insert(format!("m/{:020}", 1), stored(record::Revision { spec, created_at: None }, 1));
    let offer = record::Offer {
        candidates: vec!["a".to_owned(), "b".to_owned()],
        deadline: Some(clock::timestamp(NOW + 5000)),
        halt_generation: 0,
    };
    let instance = record::Instance {
        deployment: "m".to_owned(),
        revision: 1,
        wanted: true,
        offer: Some(offer),
        ..record::Instance::default()
    };
    snapshot.instances.insert("m-222222".to_owned(), stored(instance, revision));
    snapshot
}

fn offers_in(messages: &[SessionResponse]) -> usize {
    messages.iter().filter(|m| matches!(m.message, Some(Message::Offer(_)))).count()
}

#[test]
fn the_best_candidate_has_a_head_start_and_each_offer_is_sent_once() {
    let snapshot = offered(7);
    let (mut best, mut other, mut third) = (Stream::of("a", vec![]), Stream::of("b", vec![]), Stream::of("c", vec![]));
    assert_eq!(offers_in(&best.sees(&snapshot, NOW).0), 1);
    assert_eq!(offers_in(&best.sees(&snapshot, NOW + 1).0), 0);
    let (messages, again) = other.sees(&snapshot, NOW);
    assert_eq!((offers_in(&messages), again), (0, Some(NOW + HEAD_START_MS)));
    let (messages, again) = other.sees(&snapshot, NOW + HEAD_START_MS);
    assert_eq!((offers_in(&messages), again), (1, None));
    assert_eq!(offers_in(&third.sees(&snapshot, NOW).0), 0, "it names a and b");
    assert_eq!(offers_in(&best.sees(&offered(9), NOW).0), 1, "another offer");
}

#[test]
fn an_offer_that_is_withdrawn_in_its_head_start_is_not_sent() {
    let mut other = Stream::of("b", vec![]);
    assert_eq!(other.sees(&offered(7), NOW).1, Some(NOW + HEAD_START_MS));
    let mut taken = offered(7);
    let claim = record::Claim { node: "a".to_owned(), ..record::Claim::default() };
    taken.claims.insert("m-222222".to_owned(), stored(claim, 9));
    assert_eq!(offers_in(&other.sees(&taken, NOW + HEAD_START_MS).0), 0);
}

#[test]
fn more_claims_are_told_together_and_what_is_to_end_at_once() {
    let claims_in = |messages: &[SessionResponse]| {
        let sets = messages.iter().filter_map(|m| match &m.message {
            Some(Message::Claims(set)) => Some(set.claims.len()),
            _ => None,
        });
        sets.collect::<Vec<_>>()
    };
    let mut snapshot = offered(7);
    let wanted = snapshot.instances["m-222222"].value.clone();
    let mut owner = Stream::of("a", vec![]);
    assert_eq!(claims_in(&owner.sees(&snapshot, NOW).0), [0]);
    for n in 1..=3_i64 {
        let claim = record::Claim { node: "a".to_owned(), ..record::Claim::default() };
        snapshot.instances.insert(format!("m-{n}"), stored(wanted.clone(), 7));
        snapshot.claims.insert(format!("m-{n}"), stored(claim, 10 + n));
        assert_eq!(owner.sees(&snapshot, NOW + n), (vec![], Some(NOW + MORE_CLAIMS_MS)), "it has the answers to them");
    }
    assert_eq!(claims_in(&owner.sees(&snapshot, NOW + MORE_CLAIMS_MS).0), [3]);
    let unwanted = record::Instance { wanted: false, ..wanted };
    snapshot.instances.insert("m-1".to_owned(), stored(unwanted, 20));
    assert_eq!(claims_in(&owner.sees(&snapshot, NOW + MORE_CLAIMS_MS + 1).0), [3], "at once: it is to stop");
    snapshot.claims.remove("m-2");
    assert_eq!(claims_in(&owner.sees(&snapshot, NOW + MORE_CLAIMS_MS + 2).0), [2], "at once: it is its own no more");
}

#[test]
fn a_wall_clock_that_was_put_back_makes_nobody_wait() {
    let mut other = Stream::of("b", vec![]);
    let snapshot = offered(7);
    assert_eq!(other.sees(&snapshot, NOW).1, Some(NOW + HEAD_START_MS));
    let (messages, _) = other.outbox.due(&snapshot, &other.shares, "b", NOW - 3_600_000);
    assert_eq!(offers_in(&messages), 1);
}

#[test]
fn who_runs_what_it_does_not_own_hears_when_another_is_ready_in_its_place() {
    let run = RecordedRun {
        instance: "m-222222".to_owned(),
        token: Some(Token { generation: 0, revision: 5 }),
        alive: true,
        ..RecordedRun::default()
    };
    let mut snapshot = offered(7);
    let claim = record::Claim { node: "b".to_owned(), ..record::Claim::default() };
    snapshot.claims.insert("m-222222".to_owned(), stored(claim, 9));
    let mut loser = Stream::of("a", vec![run]);
    loser.sees(&snapshot, NOW);
    let token = Some(Token { generation: 0, revision: 9 });
    let status = record::Status { token, state: InstanceState::Ready.into(), ..record::Status::default() };
    snapshot.statuses.insert("m-222222".to_owned(), stored(status, 10));
    let (messages, _) = loser.sees(&snapshot, NOW + 1);
    let Some(Message::Claims(set)) = &messages[0].message else { panic!("{messages:?}") };
    assert_eq!(set.end_runs[0].yields_to, token);
}

#[test]
fn a_run_is_ended_only_when_superseded_by_a_ready_one_or_wanted_no_more() {
    let run = RecordedRun {
        instance: "m-222222".to_owned(),
        token: Some(Token { generation: 1, revision: 5 }),
        alive: true,
        memory_bytes: 1,
        ..RecordedRun::default()
    };
    let ends =
        |snapshot: &Snapshot| claim_set(snapshot, &Shares::of(snapshot), "a", std::slice::from_ref(&run)).end_runs;
    let mut snapshot = offered(7);
    snapshot.schema =
        Some(stored(record::Schema { generation: 1, format: 1, oldest_writer: 1, ..record::Schema::default() }, 1));
    assert_eq!(ends(&snapshot), [], "wanted, and nobody else has it");
    let claim = record::Claim { node: "b".to_owned(), ..record::Claim::default() };
    snapshot.claims.insert("m-222222".to_owned(), stored(claim, 9));
    assert_eq!(ends(&snapshot), [], "another owner, not ready yet");
    let token = Token { generation: 1, revision: 9 };
    let status = record::Status { token: Some(token), state: InstanceState::Ready.into(), ..record::Status::default() };
    let mut unwanted = snapshot.clone();
    let instance = record::Instance { wanted: false, ..snapshot.instances["m-222222"].value.clone() };
    unwanted.instances.insert("m-222222".to_owned(), stored(instance, 10));
    assert_eq!(
        ends(&unwanted),
        [EndRun { instance: "m-222222".to_owned(), yields_to: None }],
        "wanted no more: the owner need not be ready first"
    );
    snapshot.statuses.insert("m-222222".to_owned(), stored(status, 10));
    assert_eq!(ends(&snapshot), [EndRun { instance: "m-222222".to_owned(), yields_to: Some(token) }]);
    snapshot.claims.clear();
    assert_eq!(
        ends(&snapshot),
        [],
        "the claim that it was to yield to has vanished: what was said under it is nothing"
    );
    snapshot.instances.clear();
    assert_eq!(ends(&snapshot), [EndRun { instance: "m-222222".to_owned(), yields_to: None }]);
}

#[test]
fn what_the_store_never_knew_or_can_not_read_is_not_ended() {
    let run = |generation, revision| RecordedRun {
        instance: "m-222222".to_owned(),
        token: Some(Token { generation, revision }),
        alive: true,
        memory_bytes: 1,
        ..RecordedRun::default()
    };
    let ends = |snapshot: &Snapshot, run: RecordedRun| {
        !claim_set(snapshot, &Shares::of(snapshot), "a", &[run]).end_runs.is_empty()
    };
    let mut snapshot = Snapshot { revision: 90, ..Snapshot::default() };
    let schema = record::Schema { generation: 2, ..record::Schema::default() };
    let begun_at =
        |revision| Some(Arc::new(Stored { value: schema.clone(), create_revision: revision, mod_revision: 70 }));
    snapshot.schema = begun_at(1);
    assert!(ends(&snapshot, run(2, 50)), "it was claimed here, and is gone since");
    assert!(!ends(&snapshot, run(1, 50)), "it was claimed before a restore");
    assert!(!ends(&snapshot, run(3, 50)), "it was claimed in a store that is newer");
    snapshot.schema = begun_at(60);
    assert!(!ends(&snapshot, run(2, 50)), "it was claimed before this store was begun");
    snapshot.schema = begun_at(1);
    snapshot.unreadable.insert("instances/m-222222".to_owned());
    assert!(!ends(&snapshot, run(2, 50)), "its record is there");
    // Of one that is owned nobody has said that it is to stop.
    let claim = record::Claim { node: "a".to_owned(), ..record::Claim::default() };
    snapshot.claims.insert("m-222222".to_owned(), stored(claim, 50));
    let wanted = |snapshot: &Snapshot| claim_set(snapshot, &Shares::of(snapshot), "a", &[]).claims[0].wanted;
    assert!(wanted(&snapshot));
    snapshot.unreadable.clear();
    assert!(!wanted(&snapshot));
}

#[test]
fn every_node_of_a_large_fleet_is_told_about_a_change_in_time() {
    let mut snapshot = offered(7);
    for n in 0..10_000 {
        let id = format!("z-{n:06}");
        let instance = snapshot.instances["m-222222"].as_ref().clone();
        snapshot.instances.insert(id.clone(), Arc::new(instance));
        let claim = record::Claim { node: format!("n{}", n % 1000), ..record::Claim::default() };
        snapshot.claims.insert(id, stored(claim, 9));
    }
    #[allow(clippy::disallowed_methods)] // measured is what it really takes
    let begun = std::time::Instant::now();
    let shares = Shares::of(&snapshot);
    let told: usize = (0..1000)
        .map(|n| Outbox::new(vec![]).due(&snapshot, &shares, &format!("n{n}"), NOW).0)
        .map(|messages| match &messages[..] {
            [SessionResponse { message: Some(Message::Claims(set)) }] => set.claims.len(),
            other => panic!("{other:?}"),
        })
        .sum();
    let took = begun.elapsed();
    println!("1000 nodes that own 10,000 were told in {took:?}");
    assert!(took.as_millis() < 1500, "{took:?}: looking through all claims for every node took 3.9 s");
    assert_eq!(told, 10_000);
}

#[test]
fn a_command_is_told_once_on_a_stream_and_only_to_its_node() {
    let mut snapshot = Snapshot::default();
    let asked = |id: &str| {
        let command = Some(drover_proto::v1::NodeCommand { id: id.to_owned(), command: None });
        stored(record::Command { command, lease: 1 }, 3)
    };
    snapshot.commands.insert("a/1".to_owned(), asked("1"));
    snapshot.commands.insert("ab/2".to_owned(), asked("2"));
    let mut stream = Stream::of("a", vec![]);
    let mut told = |snapshot: &Snapshot| {
        let (due, _) = stream.sees(snapshot, NOW);
        let ids = due.into_iter().filter_map(|m| match m.message {
            Some(Message::Command(command)) => Some(command.id),
            _ => None,
        });
        ids.collect::<Vec<_>>()
    };
    assert_eq!(told(&snapshot), ["1"]);
    assert!(told(&snapshot).is_empty());
    assert_eq!(Outbox::new(vec![]).due(&snapshot, &Shares::of(&snapshot), "b", NOW).0.len(), 1, "the set of claims");
}
