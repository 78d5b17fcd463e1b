//! Claims that get nowhere are given up, and who held them is avoided for a while.

use super::*;
use InstanceState::{Backoff, Claimed, Draining, Failed, Loading, Ready, Starting, Suspect};

const ID: &str = "m-bbbbbb";
const DEADLINE: i64 = 60_000;
const GIVE_UP_AFTER: i64 = 30_000;
/// A deployment that says nothing of it.
const LOAD_TIMEOUT: i64 = 300_000;

impl Fleet {
    fn idle(mut self, idle_ms: i64) -> Self {
        self.held_for.insert(ID.to_owned(), Held { idle_ms, ..Held::default() });
        self
    }

    fn failing(mut self, failing_ms: i64) -> Self {
        self.held_for.insert(ID.to_owned(), Held { failing_ms: Some(failing_ms), ..Held::default() });
        self
    }

    fn status(mut self, change: impl FnOnce(&mut record::Status)) -> Self {
        let mut status = self.snapshot.statuses[ID].as_ref().clone();
        change(&mut status.value);
        self.snapshot.statuses.insert(ID.to_owned(), Arc::new(status));
        self
    }

    /// A node is avoided, as if it had failed with the instance so long ago.
    fn avoided(mut self, node: &str, ago_ms: i64) -> Self {
        let mut instance = self.snapshot.instances[ID].as_ref().clone();
        let why = "it did nothing".to_owned();
        instance.value.avoid = avoid::with(&instance.value, node, why, NOW - ago_ms, settings().avoid);
        self.snapshot.instances.insert(ID.to_owned(), Arc::new(instance));
        self
    }
}

/// Owned by a; b could take it.
fn owned_by_a(state: InstanceState) -> Fleet {
    let fleet = Fleet::new().node("a", 8 * GIB).node("b", 8 * GIB).deployment("m", 1, 1);
    fleet.instance(ID, 1, true).owned(ID, "a", state)
}

fn given_up(plan: &Plan) -> bool {
    matches!(&plan.actions[..], [Action::GiveUp { .. }])
}

#[test]
fn a_claim_without_progress_is_given_up_and_offered_to_another() {
    for (state, limit) in [(Claimed, DEADLINE), (Starting, DEADLINE), (Loading, DEADLINE + LOAD_TIMEOUT)] {
        let early = owned_by_a(state).idle(limit - 1).plan();
        assert!(early.actions.is_empty() && early.wake_in_ms == Some(1), "{state:?}: {early:?}");
        let plan = owned_by_a(state).idle(limit).plan();
        let [Action::GiveUp { id, expect, claim, status, node, why, offer, avoid }] = &plan.actions[..] else {
            panic!("{state:?}: {plan:?}")
        };
        assert_eq!((id.as_str(), *expect, *claim, *status, node.as_str()), (ID, 10, 20, 21, "a"));
        assert_eq!(offer.as_ref().unwrap().candidates, ["b"]);
        assert!(why.contains(&format!("without progress for {} s", limit / 1000)), "{why}");
        assert_eq!((avoid.len(), avoid[0].node.as_str(), avoid[0].delay_ms), (1, "a", 20_000));
        assert_eq!(plan.replacements, 1, "it counts as every other replacement");
    }
}

#[test]
fn one_of_which_nothing_was_heard_at_all_is_given_up_too() {
    let mut fleet = owned_by_a(Claimed).idle(DEADLINE);
    fleet.snapshot.statuses.clear();
    let plan = fleet.plan();
    assert!(matches!(&plan.actions[..], [Action::GiveUp { status: 0, .. }]), "{plan:?}");
}

#[test]
fn what_serves_or_may_is_never_given_up() {
    for state in [Ready, Suspect, Draining] {
        let fleet = owned_by_a(state).idle(i64::MAX / 2).plan();
        assert!(fleet.actions.is_empty(), "{state:?}: {fleet:?}");
    }
    assert!(owned_by_a(Ready).failing(i64::MAX / 2).plan().actions.is_empty());
}

#[test]
fn a_model_that_loads_for_as_long_as_its_deployment_allows_is_left_alone() {
    let mut slow = owned_by_a(Loading).idle(DEADLINE + LOAD_TIMEOUT);
    let key = format!("m/{:020}", 1);
    let mut revision = slow.snapshot.revisions[&key].as_ref().clone();
    revision.value.spec.as_mut().unwrap().load_timeout_ms = Some(3_600_000);
    slow.snapshot.revisions.insert(key, Arc::new(revision));
    assert!(!given_up(&slow.plan()));
    assert!(given_up(&slow.idle(DEADLINE + 3_600_000).plan()));
}

#[test]
fn an_older_agent_that_tells_no_progress_is_judged_by_what_fails_alone() {
    let older = |state| owned_by_a(state).status(|status| status.progressed_at = None);
    assert!(!given_up(&older(Loading).idle(i64::MAX / 2).plan()));
    assert!(given_up(&older(Failed).failing(GIVE_UP_AFTER).plan()));
}

#[test]
fn what_fails_again_and_again_is_given_up_some_time_after_it_failed_first() {
    for state in [Backoff, Failed] {
        let early = owned_by_a(state).failing(GIVE_UP_AFTER - 1).idle_too().plan();
        assert!(early.actions.is_empty() && early.wake_in_ms == Some(1), "{state:?}: {early:?}");
        assert!(given_up(&owned_by_a(state).failing(GIVE_UP_AFTER).plan()), "{state:?}");
    }
    // A further attempt that makes progress is waited for; its end decides.
    assert!(!given_up(&owned_by_a(Loading).failing(GIVE_UP_AFTER * 10).plan()));
}

impl Fleet {
    /// However long it has been idle besides.
    fn idle_too(mut self) -> Self {
        self.held_for.get_mut(ID).unwrap().idle_ms = i64::MAX / 2;
        self
    }
}

#[test]
fn with_no_other_node_it_stays_where_it_is_and_the_reason_is_told() {
    let alone = |state| {
        let fleet = Fleet::new().node("a", 8 * GIB).node("full", GIB / 2).deployment("m", 1, 1);
        fleet.instance(ID, 1, true).owned(ID, "a", state)
    };
    let plan = alone(Claimed).idle(i64::MAX / 2).plan();
    assert!(plan.actions.is_empty(), "{plan:?}");
    let why = &plan.unplaced[0].why;
    assert!(why.contains("m-bbbbbb stays with a: it makes no progress there (claimed)"), "{why}");
    assert!(why.contains("full has") && !why.contains("a owns it"), "{why}");
    let plan =
        alone(Failed).status(|status| status.message = "no such library".to_owned()).failing(i64::MAX / 2).plan();
    assert!(
        plan.actions.is_empty() && plan.unplaced[0].why.contains("it has failed there: no such library"),
        "{plan:?}"
    );
}

#[test]
fn who_runs_it_already_is_asked_alone_and_needs_no_room_for_it() {
    // b has run it until it lost its session, and a got nowhere with it. b has room for nothing else; c has more than both.
    let runs_on_b = |fleet: Fleet| {
        let mut fleet = fleet;
        let mut b = fleet.snapshot.nodes["b"].as_ref().clone();
        b.value.unclaimed = vec![record::UnclaimedRun { instance: ID.to_owned(), memory_bytes: GIB }];
        fleet.snapshot.nodes.insert("b".to_owned(), Arc::new(b));
        fleet
    };
    let fleet = || {
        let fleet = Fleet::new().node("a", 8 * GIB).node("b", GIB).node("c", 64 * GIB).deployment("m", 1, 1);
        runs_on_b(fleet.instance(ID, 1, true).owned(ID, "a", Claimed)).idle(DEADLINE)
    };
    let asked = |plan: &Plan| match &plan.actions[..] {
        [Action::GiveUp { offer: Some(offer), .. }] => offer.candidates.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(asked(&fleet().plan()), ["b"], "re-adoption comes before replacement");
    assert_eq!(asked(&fleet().avoided("b", 0).plan()), ["c"], "not when it has got nowhere with it either");
    let mut another = fleet();
    let mut b = another.snapshot.nodes["b"].as_ref().clone();
    b.value.unclaimed[0].instance = "m-dddddd".to_owned();
    another.snapshot.nodes.insert("b".to_owned(), Arc::new(b));
    assert_eq!(asked(&another.plan()), ["c"], "what runs there of another one takes room");
}

#[test]
fn nothing_that_serves_makes_way_for_what_fails_where_it_is() {
    // A roll: the new one fails on b, the old one serves on a. There is no other place for the new one.
    let fleet = Fleet::new().node("a", GIB).node("b", GIB).deployment("m", 1, 2);
    let fleet = fleet.instance("m-cccccc", 1, true).owned("m-cccccc", "a", Ready);
    let plan = fleet.instance(ID, 2, true).owned(ID, "b", Failed).failing(GIVE_UP_AFTER).plan();
    assert!(plan.actions.is_empty() && plan.unplaced[0].owned, "{plan:?}");
}

#[test]
fn nothing_is_given_up_by_a_fresh_leader_under_a_halt_or_a_freeze_or_beyond_the_rate() {
    let idle = || owned_by_a(Claimed).idle(i64::MAX / 2);
    let mut fresh = idle();
    fresh.settled_for = 9000;
    assert!(fresh.plan().actions.is_empty() && fresh.plan().wake_in_ms == Some(1000));
    let mut halted = idle();
    halted.snapshot.halt = Some(stored(record::Halt { level: "claims".to_owned(), generation: 4 }, 30));
    assert!(!given_up(&halted.plan()));
    let mut frozen = idle().node("c", GIB).node("d", GIB).node("e", GIB);
    for node in ["c", "d", "e"] {
        frozen.snapshot.sessions.remove(node);
    }
    assert!(!given_up(&frozen.plan()));
    let mut busy = idle();
    busy.replacements = Replacements { now: 0, next_in_ms: 77 };
    assert!(busy.plan().actions.is_empty() && busy.plan().wake_in_ms == Some(77));
    assert!(given_up(&idle().plan()));
}

#[test]
fn what_is_wanted_no_more_is_given_up_without_an_offer_when_its_owner_does_nothing_about_it() {
    for state in [Claimed, Loading, Failed] {
        let fleet = || owned_by_a(state).instance(ID, 1, false);
        assert!(fleet().idle(DEADLINE - 1).plan().actions.iter().all(|a| !matches!(a, Action::GiveUp { .. })));
        let plan = fleet().idle(DEADLINE + LOAD_TIMEOUT).plan();
        let found = plan.actions.iter().find(|a| matches!(a, Action::GiveUp { .. }));
        assert!(matches!(found, Some(Action::GiveUp { offer: None, .. })), "{state:?}: {plan:?}");
    }
}

#[test]
fn what_is_to_end_and_never_does_is_given_up_when_an_end_in_order_would_be_over() {
    // The drain and the grace of a deployment that says nothing of them.
    let limit = DEADLINE + 30_000 + 10_000;
    for state in [Ready, Suspect, Draining] {
        let fleet = |idle_ms| owned_by_a(state).instance(ID, 1, false).idle(idle_ms);
        let early = fleet(limit - 1).plan();
        assert!(early.actions.iter().all(|a| !matches!(a, Action::GiveUp { .. })), "{state:?}: {early:?}");
        let plan = fleet(limit).plan();
        let found = plan.actions.iter().find(|a| matches!(a, Action::GiveUp { .. }));
        assert!(matches!(found, Some(Action::GiveUp { offer: None, .. })), "{state:?}: {plan:?}");
    }
    let mut slow = owned_by_a(Draining).instance(ID, 1, false).idle(limit);
    let key = format!("m/{:020}", 1);
    let mut revision = slow.snapshot.revisions[&key].as_ref().clone();
    revision.value.spec.as_mut().unwrap().drain_timeout_ms = Some(600_000);
    slow.snapshot.revisions.insert(key, Arc::new(revision));
    assert!(slow.plan().actions.iter().all(|a| !matches!(a, Action::GiveUp { .. })), "its streams may take longer");
}

#[test]
fn an_avoided_node_is_offered_it_again_when_its_time_is_over_and_told_of_until_then() {
    let waiting = |ago_ms| {
        let fleet = Fleet::new().node("a", 8 * GIB).deployment("m", 1, 1).instance(ID, 1, true);
        fleet.avoided("a", ago_ms).plan()
    };
    let plan = waiting(5000);
    assert!(plan.actions.is_empty() && plan.wake_in_ms == Some(15_000), "{plan:?}");
    let why = &plan.unplaced[0].why;
    assert!(why.contains("a is AVOIDED until 1970-01-01T00:16:55Z") && why.contains("it did nothing"), "{why}");
    assert_eq!(offered(&waiting(20_000)), [(ID, vec!["a"])]);
}

#[test]
fn of_several_that_are_avoided_the_first_whose_time_is_over_is_waited_for() {
    let fleet = Fleet::new().node("a", 8 * GIB).node("b", 8 * GIB).deployment("m", 1, 1).instance(ID, 1, true);
    let plan = fleet.avoided("a", 2000).avoided("b", 12_000).plan();
    assert!(plan.actions.is_empty() && plan.wake_in_ms == Some(8000), "{plan:?}");
}

#[test]
fn who_is_avoided_is_not_waited_for_to_claim_it_again() {
    let lost = || {
        let mut fleet = owned_by_a(Loading).lost(ID, 0);
        let mut a = fleet.snapshot.nodes["a"].as_ref().clone();
        a.value.unclaimed = vec![record::UnclaimedRun { instance: ID.to_owned(), memory_bytes: GIB }];
        fleet.snapshot.nodes.insert("a".to_owned(), Arc::new(a));
        fleet
    };
    let plan = lost().plan();
    assert_eq!(plan.actions, [], "a may claim again what it still runs");
    assert_eq!(offered(&lost().avoided("a", 0).plan()), [(ID, vec!["b"])]);
}

#[test]
fn others_of_the_same_deployment_are_placed_elsewhere_first() {
    // b has less room, so that a would be the better one.
    let fleet = || Fleet::new().node("a", 64 * GIB).node("b", 8 * GIB).deployment("m", 2, 1);
    assert_eq!(offered(&fleet().instance(ID, 1, true).owned(ID, "b", Loading).plan())[0].1[0], "a");
    let plan = fleet().instance(ID, 1, true).owned(ID, "b", Loading).avoided("a", 0).plan();
    assert_eq!(offered(&plan)[0].1, ["b", "a"], "not never: it may be able to take the others");
}

#[test]
fn a_node_that_has_served_it_for_a_while_is_forgiven() {
    let served = |ready_ms| {
        let mut fleet = owned_by_a(Ready).avoided("a", 50_000).avoided("b", 50_000);
        fleet.held_for.insert(ID.to_owned(), Held { ready_ms: Some(ready_ms), ..Held::default() });
        fleet.plan()
    };
    let early = served(DEADLINE - 5);
    assert!(early.actions.is_empty() && early.wake_in_ms == Some(5), "one that answers once is not one that serves");
    let forgive = Action::Forgive { id: ID.to_owned(), expect: 10, node: "a".to_owned() };
    assert_eq!(served(DEADLINE).actions, [forgive]);
    assert!(owned_by_a(Ready).plan().actions.is_empty(), "there is nothing to forgive");
}
