//! Each kind of difference, told from the others, and when it is told.

use super::*;
use crate::plan::snapshot::Stored;
use drover_proto::store::v1 as record;
use std::sync::Arc;

const ID: &str = "m-222222";

fn stored<T>(value: T, mod_revision: i64) -> Arc<Stored<T>> {
    Arc::new(Stored { value, create_revision: mod_revision, mod_revision })
}

fn token(revision: i64) -> Token {
    Token { generation: 1, revision }
}

/// A store made at revision 2, at 100 now, with one instance that is wanted.
fn store() -> Snapshot {
    let mut snapshot = Snapshot { revision: 100, ..Snapshot::default() };
    snapshot.schema = Some(stored(record::Schema { generation: 1, ..record::Schema::default() }, 2));
    let instance = record::Instance { wanted: true, ..record::Instance::default() };
    snapshot.instances.insert(ID.to_owned(), stored(instance, 5));
    snapshot
}

fn claim(snapshot: &mut Snapshot, node: &str, revision: i64) {
    let claim = record::Claim { node: node.to_owned(), ..record::Claim::default() };
    snapshot.claims.insert(ID.to_owned(), stored(claim, revision));
}

fn status(snapshot: &mut Snapshot, revision: i64, state: InstanceState) {
    let token = Some(token(revision));
    let status = record::Status { node: "a".to_owned(), token, state: state.into(), pid: 7, ..Default::default() };
    snapshot.statuses.insert(ID.to_owned(), stored(status, revision + 1));
}

fn record(snapshot: &mut Snapshot, node: &str, revision: i64) {
    let run = record::Run { node: node.to_owned(), token: Some(token(revision)), ..record::Run::default() };
    snapshot.runs.insert(format!("{ID}/{}", token(revision)), stored(run, revision + 1));
}

/// Node a runs it under this token, and has applied its claims as of revision 90.
fn runs(revision: i64) -> RunSet {
    let run = RecordedRun {
        instance: ID.to_owned(),
        token: Some(token(revision)),
        alive: true,
        state: InstanceState::Ready.into(),
        pid: 7,
        ..RecordedRun::default()
    };
    RunSet { runs: vec![run], ..nothing() }
}

fn nothing() -> RunSet {
    RunSet { full: true, claims_revision: 90, ..RunSet::default() }
}

fn reported(revision: i64) -> RunSet {
    let report = StatusReport {
        instance: ID.to_owned(),
        token: Some(token(revision)),
        state: InstanceState::Ready.into(),
        pid: 7,
        ..StatusReport::default()
    };
    RunSet { statuses: vec![report], ..runs(revision) }
}

fn kinds(snapshot: &Snapshot, set: &RunSet) -> Vec<Kind> {
    differences(snapshot, "a", set).into_keys().map(|(_, kind)| kind).collect()
}

#[test]
fn what_agrees_is_no_difference() {
    let mut snapshot = store();
    claim(&mut snapshot, "a", 10);
    status(&mut snapshot, 10, InstanceState::Ready);
    record(&mut snapshot, "a", 10);
    assert_eq!(kinds(&snapshot, &reported(10)), []);
    assert_eq!(kinds(&store(), &nothing()), []);
}

#[test]
fn each_kind_is_told_from_the_others() {
    let owned = |node: &str, revision| {
        let mut snapshot = store();
        claim(&mut snapshot, node, revision);
        snapshot
    };
    assert_eq!(kinds(&owned("a", 10), &nothing()), [Kind::ClaimWithoutRun]);
    assert_eq!(kinds(&store(), &runs(10)), [Kind::RunWithoutClaim]);
    assert_eq!(kinds(&owned("b", 12), &runs(10)), [Kind::RunSuperseded]);
    assert_eq!(kinds(&owned("a", 12), &runs(10)), [Kind::TokenBehind]);
    assert_eq!(kinds(&owned("a", 10), &runs(12)), [Kind::TokenAhead]);
    let mut unwanted = store();
    unwanted.instances.insert(ID.to_owned(), stored(record::Instance::default(), 5));
    assert_eq!(kinds(&unwanted, &runs(10)), [Kind::RunUnwanted]);
    let mut gone = store();
    gone.instances.clear();
    assert_eq!(kinds(&gone, &runs(10)), [Kind::RunUnwanted]);
    // Made before this store, or in one that is ahead of it, or in another generation.
    assert_eq!(kinds(&gone, &runs(2)), [Kind::ForeignRun]);
    assert_eq!(kinds(&gone, &runs(101)), [Kind::ForeignRun]);
    gone.schema = Some(stored(record::Schema { generation: 2, ..record::Schema::default() }, 2));
    assert_eq!(kinds(&gone, &runs(10)), [Kind::ForeignRun]);
}

#[test]
fn a_state_that_was_acknowledged_must_be_there_under_the_same_token() {
    let mut snapshot = store();
    claim(&mut snapshot, "a", 10);
    assert_eq!(kinds(&snapshot, &reported(10)), [Kind::Status], "it is lost");
    status(&mut snapshot, 10, InstanceState::Loading);
    let found = differences(&snapshot, "a", &reported(10));
    let text = found[&(ID.to_owned(), Kind::Status)].to_string();
    assert_eq!(text, "the node: ready, pid 7, token 1.10; the store: loading, pid 7, token 1.10");
    claim(&mut snapshot, "b", 12);
    assert_eq!(kinds(&snapshot, &reported(10)), [Kind::RunSuperseded], "what it says of a claim that is gone is void");
}

#[test]
fn the_record_of_a_run_that_is_no_more_is_removed_and_no_other() {
    let mut snapshot = store();
    claim(&mut snapshot, "a", 10);
    record(&mut snapshot, "a", 4);
    record(&mut snapshot, "a", 10);
    record(&mut snapshot, "b", 6);
    let mut set = RunSet { statuses: reported(10).statuses, ..nothing() };
    status(&mut snapshot, 10, InstanceState::Ready);
    assert_eq!(run_records(&snapshot, "a", &set), [(ID.to_owned(), token(4))]);
    assert_eq!(kinds(&snapshot, &set), [Kind::RunRecord]);
    set.runs = runs(10).runs;
    assert!(run_records(&snapshot, "a", &set).is_empty(), "a process may still be that run");
    record(&mut snapshot, "a", 95);
    assert_eq!(run_records(&snapshot, "a", &nothing()), [(ID.to_owned(), token(4))], "newer than what it knows");
}

#[test]
fn what_has_changed_since_the_node_knew_is_not_compared() {
    let mut snapshot = store();
    claim(&mut snapshot, "a", 95);
    assert_eq!(kinds(&snapshot, &nothing()), []);
    assert_eq!(kinds(&snapshot, &runs(10)), []);
}

#[tokio::test(start_paused = true)]
async fn what_heals_by_itself_is_told_when_it_stays_and_what_does_not_at_once() {
    let one = |kind| {
        let both = Difference { node: "x".to_owned(), store: "y".to_owned() };
        Differences::from([((ID.to_owned(), kind), both)])
    };
    let told = |news: &News| (news.found.len(), news.over.len(), news.look_again);
    let mut seen = Reconcile::default();
    assert_eq!(told(&seen.take(one(Kind::RunWithoutClaim), Instant::now())), (0, 0, true));
    assert_eq!(told(&seen.take(Differences::new(), Instant::now())), (0, 0, false), "nobody needs to know");
    assert_eq!(told(&seen.take(one(Kind::RunWithoutClaim), Instant::now())), (0, 0, true));
    assert_eq!(told(&seen.take(one(Kind::RunWithoutClaim), Instant::now())), (1, 0, false));
    assert_eq!(told(&seen.take(one(Kind::RunWithoutClaim), Instant::now())), (0, 0, false), "told once");
    tokio::time::advance(Duration::from_secs(9)).await;
    let over = seen.take(one(Kind::Status), Instant::now());
    assert_eq!(told(&over), (1, 1, true));
    assert_eq!(over.over[0].2, Duration::from_secs(9));
}
