//! What was owned and has no claim now: who is waited for, and what of it may not be stopped.

use super::*;

impl Fleet {
    /// The last run of an instance under its claim, as its owner reported it.
    fn ran(mut self, id: &str, node: &str, ready: bool) -> Self {
        let token = Some(Token { generation: 1, revision: 20 });
        let run = record::Run { node: node.to_owned(), token, ready, ..record::Run::default() };
        self.snapshot.runs.insert(format!("{id}/1.20"), stored(run, 21));
        self
    }

    /// The session of a node has run out, as the reconciler has noted.
    fn gone(mut self, node: &str) -> Self {
        let mut record = self.snapshot.nodes[node].as_ref().clone();
        record.value.lost_at = Some(prost_types::Timestamp { seconds: NOW / 1000, nanos: 0 });
        self.snapshot.nodes.insert(node.to_owned(), Arc::new(record));
        self.snapshot.sessions.remove(node);
        self
    }

    /// A node has joined anew, and not said yet that what it names is all.
    fn joined(mut self, node: &str, for_ms: i64, runs: &[&str]) -> Self {
        self.joined_for.insert(node.to_owned(), for_ms);
        self.tells(node, "", runs)
    }

    /// A node has said in its present session what it runs.
    fn has_told(self, node: &str, runs: &[&str]) -> Self {
        self.tells(node, &format!("s-{node}"), runs)
    }

    fn tells(mut self, node: &str, inventory_of: &str, runs: &[&str]) -> Self {
        let mut record = self.snapshot.nodes[node].as_ref().clone();
        inventory_of.clone_into(&mut record.value.inventory_of);
        let run = |id: &&str| record::UnclaimedRun { instance: (*id).to_owned(), memory_bytes: GIB };
        record.value.unclaimed = runs.iter().map(run).collect();
        self.snapshot.nodes.insert(node.to_owned(), Arc::new(record));
        self
    }

    fn settled_for(mut self, ms: i64) -> Self {
        self.settled_for = ms;
        self
    }
}

fn lost_by_a() -> Fleet {
    let fleet = Fleet::new().node("a", 8 * GIB).node("b", 8 * GIB).node("c", 8 * GIB).deployment("m", 1, 1);
    fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "a", InstanceState::Ready).lost("m-bbbbbb", 3000)
}

fn waits(fleet: &Fleet) -> Option<i64> {
    let plan = fleet.plan();
    assert_eq!(plan.wake_in_ms.is_some(), plan.actions.is_empty(), "{plan:?}");
    plan.wake_in_ms
}

#[test]
fn what_was_owned_is_offered_again_at_once_when_its_node_is_gone_but_not_by_a_fresh_leader() {
    let gone = lost_by_a().gone("a");
    assert_eq!(offered(&gone.plan())[0].0, "m-bbbbbb");
    assert_eq!(waits(&gone.settled_for(1)), Some(9999), "all nodes have one time to live to come back");
}

#[test]
fn a_node_that_is_back_has_its_time_until_it_has_said_that_it_runs_nothing() {
    assert_eq!(waits(&lost_by_a().joined("a", 400, &[])), Some(9600), "it has joined, and tells in a moment");
    assert_eq!(waits(&lost_by_a().joined("a", 60_000, &[])), Some(7000), "an older agent, which never tells");
    assert_eq!(waits(&lost_by_a().has_told("a", &["m-bbbbbb"])), Some(7000), "it runs there");
    assert_eq!(waits(&lost_by_a().has_told("a", &[])), None, "there is nothing to wait for");
}

#[test]
fn whoever_still_runs_it_is_waited_for_though_another_has_owned_it_since() {
    // b took it over from a and lost it before it was ready; a's server answers still, and is claimed again.
    let fleet = || lost_by_a().owned("m-bbbbbb", "b", InstanceState::Loading).lost("m-bbbbbb", 3000).gone("b");
    assert_eq!(waits(&fleet().has_told("a", &["m-bbbbbb"])), Some(7000));
    assert_eq!(waits(&fleet().joined("a", 400, &["m-bbbbbb"])), Some(9600));
    assert_eq!(waits(&fleet().has_told("a", &[])), None);
    assert_eq!(waits(&fleet().has_told("a", &["m-bbbbbb"]).lost("m-bbbbbb", 10_000)), None, "not for ever");
}

#[test]
fn a_node_is_offered_nothing_before_it_has_said_what_runs_on_it() {
    let fleet = || Fleet::new().node("a", 8 * GIB).deployment("m", 1, 1).instance("m-bbbbbb", 1, true);
    let plan = fleet().joined("a", 100, &[]).plan();
    assert!(offered(&plan).is_empty() && plan.unplaced[0].why.contains("not said yet what runs on it"), "{plan:?}");
    assert_eq!(plan.wake_in_ms, Some(9900), "an agent that never says so is not waited for without an end");
    assert_eq!(offered(&fleet().joined("a", 10_000, &[]).plan()).len(), 1);
    assert_eq!(offered(&fleet().has_told("a", &[]).plan()).len(), 1);
}

/// Half of a roll, when the store loses all sessions: nothing has a claim, the new one has not been ready yet.
fn rolling() -> Fleet {
    let fleet = Fleet::new().node("a", 8 * GIB).node("b", 8 * GIB).deployment("m", 1, 2);
    let fleet = fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "a", InstanceState::Ready);
    let fleet = fleet.ran("m-bbbbbb", "a", true).lost("m-bbbbbb", 0);
    let fleet = fleet.instance("m-cccccc", 2, true).owned("m-cccccc", "b", InstanceState::Loading);
    fleet.ran("m-cccccc", "b", false).lost("m-cccccc", 0)
}

#[test]
fn an_old_instance_whose_claim_was_lost_in_a_roll_is_not_stopped_while_it_may_answer() {
    for settled in [1, 60_000] {
        assert_eq!(stopped(&rolling().gone("a").gone("b").settled_for(settled).plan()), [""; 0], "nobody is back");
        let back = rolling().settled_for(settled).joined("a", 10, &[]);
        assert_eq!(stopped(&back.plan()), [""; 0], "a is back and has not told what it runs");
        let told = rolling().settled_for(settled).has_told("a", &["m-bbbbbb"]);
        assert_eq!(stopped(&told.plan()), [""; 0], "a says it runs");
    }
    assert_eq!(stopped(&rolling().plan()), ["m-bbbbbb"], "a says it does not run any more");
    let ready = rolling().gone("a").owned("m-cccccc", "b", InstanceState::Ready);
    assert_eq!(stopped(&ready.plan()), ["m-bbbbbb"], "enough serve without it");
    let mut taken_over = rolling().gone("a").owned("m-bbbbbb", "b", InstanceState::Ready);
    let token = Some(Token { generation: 1, revision: 19 });
    taken_over.snapshot.statuses.insert("m-bbbbbb".to_owned(), {
        let status = record::Status { token, state: InstanceState::Ready.into(), ..record::Status::default() };
        stored(status, 21)
    });
    assert_eq!(stopped(&taken_over.plan()), [""; 0], "its new owner loads, the old one serves meanwhile");
}

#[test]
fn what_never_was_ready_is_stopped_at_once_in_a_roll_and_what_nobody_asks_for_too() {
    let loading = rolling().ran("m-bbbbbb", "a", false).owned("m-bbbbbb", "a", InstanceState::Loading);
    assert_eq!(stopped(&loading.lost("m-bbbbbb", 0).plan()), ["m-bbbbbb"]);
    let mut none = rolling().gone("a").gone("b").settled_for(1);
    let mut deployment = none.snapshot.deployments["m"].as_ref().clone();
    deployment.value.replicas = 0;
    none.snapshot.deployments.insert("m".to_owned(), Arc::new(deployment));
    assert_eq!(stopped(&none.plan()), ["m-cccccc", "m-bbbbbb"], "somebody has scaled it to none");
}

#[test]
fn nothing_makes_way_in_the_grace_period_since_nodes_that_come_back_may_have_room() {
    let fleet = || {
        let fleet = Fleet::new().node("a", GIB).node("b", GIB).deployment("m", 1, 2);
        fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "a", InstanceState::Ready).gone("b")
    };
    assert_eq!(stopped(&fleet().plan()), ["m-bbbbbb"]);
    assert_eq!(stopped(&fleet().settled_for(9999).plan()), [""; 0]);
}

#[test]
fn the_record_of_a_run_goes_when_its_node_runs_it_no_more_and_nobody_has_reported_that() {
    let closed = |fleet: Fleet| {
        let plan = fleet.plan();
        let closed =
            plan.actions.iter().filter(|a| matches!(a, Action::CloseRun { key, .. } if key == "m-bbbbbb/1.20"));
        closed.count()
    };
    let taken_over = || {
        let fleet = lost_by_a().ran("m-bbbbbb", "a", true);
        fleet.owned("m-bbbbbb", "b", InstanceState::Ready)
    };
    assert_eq!(closed(taken_over()), 1, "its node has said what it runs");
    assert_eq!(closed(taken_over().has_told("a", &["m-bbbbbb"])), 0, "it still runs");
    assert_eq!(closed(taken_over().joined("a", 10, &[])), 0, "it has not said everything yet");
    assert_eq!(closed(taken_over().gone("a")), 0, "it is away");
    assert_eq!(closed(taken_over().owned("m-bbbbbb", "a", InstanceState::Ready)), 0, "it owns it: it reports the end");
}

#[test]
fn of_two_that_are_not_ready_the_one_that_may_answer_stays() {
    let fleet = Fleet::new().node("a", 8 * GIB).node("b", 8 * GIB).deployment("m", 1, 1);
    let fleet = fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "a", InstanceState::Ready);
    let fleet = fleet.ran("m-bbbbbb", "a", true).lost("m-bbbbbb", 0).gone("a");
    let fleet = fleet.instance("m-cccccc", 1, true).owned("m-cccccc", "b", InstanceState::Loading);
    assert_eq!(stopped(&fleet.plan()), ["m-cccccc"]);
}
