//! How much is replaced at once, and when nothing is.

use super::*;
use crate::plan::Freeze;

impl Fleet {
    /// The session of a node ran out so long ago, as the reconciler has noted.
    fn lost_for(mut self, node: &str, ms: i64) -> Self {
        let mut record = self.snapshot.nodes[node].as_ref().clone();
        let at = (NOW_MS - ms).div_euclid(1000);
        record.value.lost_at = Some(prost_types::Timestamp { seconds: at, nanos: 0 });
        self.snapshot.nodes.insert(node.to_owned(), Arc::new(record));
        self.snapshot.sessions.remove(node);
        self
    }

    fn overridden(mut self, until_ms: i64) -> Self {
        let override_until = Some(prost_types::Timestamp { seconds: until_ms / 1000, nanos: 0 });
        let freeze = record::Freeze { override_until, ..record::Freeze::default() };
        self.snapshot.freeze = Some(stored(freeze, 90));
        self
    }

    fn frozen(&self) -> bool {
        let freeze = Freeze::of(&self.snapshot, NOW_MS, 55);
        assert_eq!(freeze.seen, freeze.lost + self.snapshot.sessions.len());
        freeze.frozen()
    }
}

/// Late enough that an hour before it is a time.
const NOW_MS: i64 = 10_000_000;
const HOUR: i64 = 3_600_000;

fn nodes(names: &[&str]) -> Fleet {
    names.iter().fold(Fleet::new(), |fleet, name| fleet.node(name, 8 * GIB))
}

#[test]
fn more_than_the_share_of_the_nodes_of_the_last_hour_has_to_be_lost() {
    assert!(!nodes(&["a", "b"]).lost_for("a", 1000).frozen(), "1 of 2");
    assert!(nodes(&["a", "b", "c"]).lost_for("a", 1000).lost_for("b", 2000).frozen(), "2 of 3");
    let old = nodes(&["a", "b", "c"]).lost_for("a", 1000).lost_for("b", HOUR + 1000);
    assert!(!old.frozen(), "of those of the last hour 1 of 2");
    let mut removed = nodes(&["a", "b", "c"]).lost_for("a", 1000).lost_for("b", 2000);
    removed.snapshot.nodes.remove("b");
    assert!(!removed.frozen(), "one was removed on purpose");
    let mut unnoted = nodes(&["a", "b", "c"]).lost_for("a", 1000);
    unnoted.snapshot.sessions.remove("b");
    assert!(unnoted.frozen(), "what nobody has noted yet was lost a moment ago");
    let fleet = nodes(&["a", "b", "c"]).lost_for("a", 1000).lost_for("b", 2000);
    assert!(!fleet.overridden(NOW_MS + 60_000).frozen());
    let fleet = nodes(&["a", "b", "c"]).lost_for("a", 1000).lost_for("b", 2000);
    assert!(fleet.overridden(NOW_MS - 1000).frozen(), "the operator's word has run out");
}

/// Three nodes with an instance each, of which two are lost.
fn two_of_three_lost() -> Fleet {
    let fleet = nodes(&["a", "b", "c"]).deployment("m", 3, 1);
    let owners = [("m-bbbbbb", "a"), ("m-cccccc", "b"), ("m-dddddd", "c")];
    let fleet = owners
        .iter()
        .fold(fleet, |fleet, (id, node)| fleet.instance(id, 1, true).owned(id, node, InstanceState::Ready));
    fleet.lost("m-bbbbbb", 60_000).lost("m-cccccc", 60_000).lost_now("a").lost_now("b")
}

impl Fleet {
    fn lost_now(mut self, node: &str) -> Self {
        self.snapshot.sessions.remove(node);
        self
    }

    fn scaled(mut self, replicas: i32) -> Self {
        let mut deployment = self.snapshot.deployments["m"].as_ref().clone();
        deployment.value.replicas = replicas;
        self.snapshot.deployments.insert("m".to_owned(), Arc::new(deployment));
        self
    }
}

#[test]
fn frozen_nothing_is_replaced_and_what_an_operator_asks_for_goes_on() {
    for settled_for in [0, i64::MAX] {
        let plan = Fleet { settled_for, ..two_of_three_lost() }.plan();
        assert_eq!(offered(&plan), []);
        assert!(plan.unplaced[0].why.contains("2 of 3 nodes seen in the last hour are lost"), "{plan:?}");
    }
    let plan = two_of_three_lost().plan();
    let noted = plan.actions.iter().filter(|a| matches!(a, Action::NoteLost { at_ms: NOW, .. })).count();
    assert_eq!(noted, 2, "since when, in the store, for the next leader: {plan:?}");
    assert_eq!(offered(&two_of_three_lost().overridden(NOW + 60_000).plan()).len(), 2);
    assert_eq!(offered(&two_of_three_lost().scaled(4).plan()).len(), 1, "another one is started");
    assert_eq!(stopped(&two_of_three_lost().scaled(2).plan()).len(), 1, "and one stopped");
    let one_lost = two_of_three_lost().node("b", 8 * GIB);
    assert_eq!(offered(&one_lost.plan()).len(), 2, "one is back, and has said that it runs nothing");
}

#[test]
fn frozen_no_roll_goes_on_at_the_expense_of_what_serves() {
    let rolling = || {
        let fleet = nodes(&["a", "b", "c"]).deployment("m", 1, 2).lost_now("a").lost_now("b");
        fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "c", InstanceState::Ready)
    };
    let ready = || rolling().instance("m-cccccc", 2, true).owned("m-cccccc", "c", InstanceState::Ready);
    assert_eq!(stopped(&ready().plan()), [""; 0]);
    assert_eq!(stopped(&ready().overridden(NOW + 60_000).plan()), ["m-bbbbbb"]);
    let full = || {
        let mut fleet = rolling();
        let mut node = fleet.snapshot.nodes["c"].as_ref().clone();
        node.value.capacity.as_mut().unwrap().memory_bytes = GIB;
        fleet.snapshot.nodes.insert("c".to_owned(), Arc::new(node));
        fleet
    };
    assert_eq!(stopped(&full().plan()), [""; 0], "nothing makes way");
    assert_eq!(stopped(&full().overridden(NOW + 60_000).plan()), ["m-bbbbbb"]);
}

#[test]
fn what_was_owned_is_given_to_others_in_small_numbers() {
    let mut fleet = nodes(&["a", "b", "c"]).deployment("m", 20, 1).lost_now("a");
    for n in 0..20_u8 {
        let id = format!("m-bbbbb{}", char::from(b'b' + n));
        fleet = fleet.instance(&id, 1, true).owned(&id, "a", InstanceState::Ready).lost(&id, 60_000);
    }
    let plan = fleet.plan();
    assert_eq!((offered(&plan).len(), plan.replacements), (16, 16), "what has room");
    fleet.replacements = Replacements { now: 3, next_in_ms: 70 };
    let plan = fleet.plan();
    assert_eq!((offered(&plan).len(), plan.replacements, plan.wake_in_ms), (3, 3, Some(70)));
    fleet.replacements = Replacements { now: 0, next_in_ms: 70 };
    let fleet = fleet.instance("m-new234", 1, true);
    assert_eq!(offered(&fleet.plan()).len(), 1, "what is new is no replacement");
}
