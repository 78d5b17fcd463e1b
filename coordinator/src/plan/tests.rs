//! Planning, by hand-made snapshots and by random ones.

mod freeze;
mod ownership;
mod progress;
mod room;

use super::{
    Action, Held, Input, Plan, Replacements, Settings, avoid, plan,
    snapshot::{Snapshot, Stored},
};
use drover_proto::{
    store::v1 as record,
    v1::{Capacity, DeploymentSpec, InstanceState, ModelFile, ModelInventory, Token},
};
use proptest::prelude::*;
use std::{collections::BTreeMap, sync::Arc};

const NOW: i64 = 1_000_000;
const GIB: i64 = 1 << 30;

fn settings() -> Settings {
    Settings {
        candidates: 3,
        offer_deadline_ms: 5000,
        grace_ms: 10_000,
        revisions_kept: 3,
        freeze_share_percent: 55,
        progress_deadline_ms: 60_000,
        give_up_after_ms: 30_000,
        avoid: avoid::Delays { first_ms: 20_000, max_ms: 100_000 },
    }
}

fn stored<T>(value: T, mod_revision: i64) -> Arc<Stored<T>> {
    Arc::new(Stored { value, create_revision: mod_revision, mod_revision })
}

struct Fleet {
    snapshot: Snapshot,
    unclaimed_for: BTreeMap<String, i64>,
    joined_for: BTreeMap<String, i64>,
    held_for: BTreeMap<String, Held>,
    settled_for: i64,
    replacements: Replacements,
}

impl Fleet {
    fn new() -> Self {
        let snapshot = Snapshot {
            revision: 100,
            schema: Some(stored(
                record::Schema { generation: 1, format: 1, oldest_writer: 1, ..record::Schema::default() },
                1,
            )),
            ..Snapshot::default()
        };
        Self {
            snapshot,
            unclaimed_for: BTreeMap::new(),
            joined_for: BTreeMap::new(),
            held_for: BTreeMap::new(),
            settled_for: i64::MAX,
            replacements: Replacements::UNLIMITED,
        }
    }

    /// A node that has had its session for an hour and has said that it runs nothing without a claim.
    fn node(mut self, name: &str, memory: i64) -> Self {
        let models = ModelInventory {
            roots: vec!["/models".to_owned()],
            files: vec![ModelFile { path: "/models/m.gguf".to_owned(), size_bytes: GIB }],
            truncated: false,
        };
        let node = record::Node {
            capacity: Some(Capacity { memory_bytes: memory, cpus: 8, gpus: vec![] }),
            models: Some(models),
            inventory_of: format!("s-{name}"),
            ..record::Node::default()
        };
        self.snapshot.nodes.insert(name.to_owned(), stored(node, 2));
        let session = record::Session { session_id: format!("s-{name}"), ..record::Session::default() };
        self.snapshot.sessions.insert(name.to_owned(), stored(session, 3));
        self.joined_for.insert(name.to_owned(), 3_600_000);
        self
    }

    fn deployment(mut self, name: &str, replicas: i32, revision: u64) -> Self {
        let spec = DeploymentSpec {
            name: name.to_owned(),
            model_path: "m.gguf".to_owned(),
            memory_bytes: Some(GIB),
            ..DeploymentSpec::default()
        };
        for n in 1..=revision {
            let revision = record::Revision { spec: Some(spec.clone()), created_at: None };
            self.snapshot.revisions.insert(format!("{name}/{n:020}"), stored(revision, 5));
        }
        let deployment =
            record::Deployment { spec: Some(spec), replicas, revision, generation: 1, ..record::Deployment::default() };
        self.snapshot.deployments.insert(name.to_owned(), stored(deployment, 6));
        self
    }

    fn deleting(mut self, name: &str) -> Self {
        let mut deployment = self.snapshot.deployments[name].as_ref().clone();
        deployment.value.deleting = true;
        self.snapshot.deployments.insert(name.to_owned(), Arc::new(deployment));
        self
    }

    fn instance(mut self, id: &str, revision: u64, wanted: bool) -> Self {
        let deployment = id.rsplit_once('-').unwrap().0.to_owned();
        let instance = record::Instance { deployment, revision, wanted, ..record::Instance::default() };
        self.snapshot.instances.insert(id.to_owned(), stored(instance, 10));
        self
    }

    fn owned(mut self, id: &str, node: &str, state: InstanceState) -> Self {
        let claim = record::Claim { node: node.to_owned(), memory_bytes: GIB, ..record::Claim::default() };
        self.snapshot.claims.insert(id.to_owned(), stored(claim, 20));
        self.snapshot
            .taken
            .insert(id.to_owned(), stored(record::Taken { node: node.to_owned(), ..record::Taken::default() }, 20));
        let token = Some(Token { generation: 1, revision: 20 });
        let progressed_at = Some(prost_types::Timestamp::default());
        let status = record::Status { token, state: state.into(), progressed_at, ..record::Status::default() };
        self.snapshot.statuses.insert(id.to_owned(), stored(status, 21));
        self
    }

    /// The claim vanished with its node's lease.
    fn lost(mut self, id: &str, for_ms: i64) -> Self {
        self.snapshot.claims.remove(id);
        self.unclaimed_for.insert(id.to_owned(), for_ms);
        self
    }

    fn plan(&self) -> Plan {
        self.plan_with(7)
    }

    fn plan_with(&self, seed: u64) -> Plan {
        plan(&Input {
            snapshot: &self.snapshot,
            now_ms: NOW,
            settled_for_ms: self.settled_for,
            unclaimed_for_ms: &self.unclaimed_for,
            joined_for_ms: &self.joined_for,
            held_for: &self.held_for,
            replacements: self.replacements,
            seed,
            settings: &settings(),
        })
    }
}

#[test]
fn nothing_follows_from_a_record_that_can_not_be_read() {
    let plan = |key: &str, fleet: Fleet| {
        let mut fleet = fleet.node("a", 64 * GIB);
        fleet.snapshot.unreadable.insert(key.to_owned());
        fleet.plan().actions
    };
    let two = || {
        Fleet::new().deployment("m", 2, 1).instance("m-222222", 1, true).owned("m-222222", "a", InstanceState::Ready)
    };
    assert_eq!(plan("instances/m-333333", two()), [], "the second one is there: no third is made");
    assert_eq!(plan("instances/other-m-333333", two()).len(), 1, "another deployment's is none of its own");
    let gone = || Fleet::new().instance("m-222222", 1, true).owned("m-222222", "a", InstanceState::Ready);
    assert_eq!(plan("deployments/m", gone()), [], "its deployment is there");
    assert_eq!(stopped(&Plan { actions: plan("deployments/n", gone()), ..Plan::default() }), ["m-222222"]);
    let unwanted = || Fleet::new().instance("m-222222", 1, false);
    assert_eq!(plan("deployments/m", unwanted()), [], "nor is anything collected");
}

fn stopped(plan: &Plan) -> Vec<&str> {
    plan.actions.iter().filter_map(|a| if let Action::Stop { id, .. } = a { Some(id.as_str()) } else { None }).collect()
}

fn offered(plan: &Plan) -> Vec<(&str, Vec<&str>)> {
    let offer = |a| match a {
        &Action::Create { ref id, offer: Some(ref offer), .. }
        | &Action::GiveUp { ref id, offer: Some(ref offer), .. }
        | &Action::Offer { ref id, ref offer, .. } => {
            Some((id.as_str(), offer.candidates.iter().map(String::as_str).collect()))
        }
        _ => None,
    };
    plan.actions.iter().filter_map(offer).collect()
}

#[test]
fn new_instances_are_spread_over_the_nodes_that_have_room() {
    let plan = Fleet::new().node("a", 8 * GIB).node("b", 8 * GIB).node("full", GIB / 2).deployment("m", 4, 1).plan();
    let firsts: Vec<&str> = offered(&plan).iter().map(|(_, nodes)| nodes[0]).collect();
    assert_eq!(firsts.len(), 4);
    for node in ["a", "b"] {
        assert_eq!(firsts.iter().filter(|n| **n == node).count(), 2, "{firsts:?}");
    }
}

#[test]
fn what_no_node_can_take_is_created_without_an_offer_and_the_reasons_are_told() {
    let plan = Fleet::new().node("a", GIB / 2).deployment("m", 1, 1).plan();
    assert!(matches!(&plan.actions[..], [Action::Create { offer: None, .. }]), "{plan:?}");
    assert!(plan.unplaced[0].why.contains("a has") && plan.unplaced[0].why.contains("needed"), "{plan:?}");
}

#[test]
fn scaling_down_stops_those_that_do_not_serve_first() {
    let fleet = Fleet::new().node("a", 8 * GIB).deployment("m", 1, 1);
    let fleet = fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "a", InstanceState::Ready);
    let plan = fleet.instance("m-cccccc", 1, true).owned("m-cccccc", "a", InstanceState::Loading).plan();
    assert_eq!(stopped(&plan), ["m-cccccc"]);
}

#[test]
fn a_new_revision_replaces_instances_only_as_new_ones_become_ready() {
    let fleet = Fleet::new().node("a", 8 * GIB).deployment("m", 1, 2);
    let fleet = fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "a", InstanceState::Ready);
    let plan = fleet.plan();
    assert_eq!(stopped(&plan), [""; 0]);
    assert_eq!(offered(&plan).len(), 1);
    let fleet = fleet.instance("m-cccccc", 2, true).owned("m-cccccc", "a", InstanceState::Loading);
    assert!(fleet.plan().actions.is_empty());
    let plan = fleet.owned("m-cccccc", "a", InstanceState::Ready).plan();
    assert_eq!(stopped(&plan), ["m-bbbbbb"]);
}

#[test]
fn without_room_for_both_an_old_instance_makes_way() {
    let fleet = Fleet::new().node("a", GIB).deployment("m", 1, 2);
    let plan = fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "a", InstanceState::Ready).plan();
    assert_eq!(stopped(&plan), ["m-bbbbbb"]);
}

#[test]
fn a_deleted_deployment_is_stopped_collected_and_removed_in_this_order() {
    let fleet = Fleet::new().node("a", 8 * GIB).deployment("m", 1, 1).deleting("m");
    let owned = fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "a", InstanceState::Ready);
    assert_eq!(stopped(&owned.plan()), ["m-bbbbbb"]);
    let stopping = owned.instance("m-bbbbbb", 1, false);
    assert!(stopping.plan().actions.is_empty(), "its owner has not stopped it yet");
    let mut freed = stopping.lost("m-bbbbbb", 0);
    assert!(matches!(&freed.plan().actions[..], [Action::Collect { .. }]));
    freed.snapshot.instances.clear();
    assert!(matches!(&freed.plan().actions[..], [Action::RemoveDeployment { .. }]));
}

#[test]
fn a_standing_offer_is_not_rewritten_before_its_deadline() {
    let mut fleet = Fleet::new().node("a", 8 * GIB).deployment("m", 1, 1).instance("m-bbbbbb", 1, true);
    let deadline = |ms: i64| {
        let offer = record::Offer {
            candidates: vec!["a".to_owned()],
            deadline: Some(prost_types::Timestamp { seconds: ms / 1000, nanos: 0 }),
            halt_generation: 0,
        };
        let instance = record::Instance {
            deployment: "m".to_owned(),
            revision: 1,
            wanted: true,
            offer: Some(offer),
            ..record::Instance::default()
        };
        stored(instance, 10)
    };
    fleet.snapshot.instances.insert("m-bbbbbb".to_owned(), deadline(NOW + 2000));
    let plan = fleet.plan();
    assert!(plan.actions.is_empty() && plan.wake_in_ms == Some(2000), "{plan:?}");
    fleet.snapshot.instances.insert("m-bbbbbb".to_owned(), deadline(NOW - 1000));
    assert_eq!(offered(&fleet.plan()).len(), 1);
    fleet.snapshot.instances.insert("m-bbbbbb".to_owned(), deadline(NOW + 3_600_000));
    assert_eq!(offered(&fleet.plan()).len(), 1, "the wall clock was put back by an hour");
}

#[test]
fn under_a_halt_nothing_is_offered() {
    let mut fleet = Fleet::new().node("a", 8 * GIB).deployment("m", 2, 1);
    fleet.snapshot.halt = Some(stored(record::Halt { level: "claims".to_owned(), generation: 4 }, 30));
    let plan = fleet.plan();
    assert_eq!(offered(&plan), []);
    assert!(plan.unplaced[0].why.contains("halted"));
}

#[test]
fn old_revisions_go_but_none_that_is_in_use() {
    let fleet = Fleet::new().node("a", 8 * GIB).deployment("m", 0, 6);
    let plan = fleet.instance("m-bbbbbb", 2, false).owned("m-bbbbbb", "a", InstanceState::Draining).plan();
    let Some(Action::TrimRevisions { keys, .. }) =
        plan.actions.iter().find(|a| matches!(a, Action::TrimRevisions { .. }))
    else {
        panic!("{plan:?}");
    };
    assert_eq!(keys, &[format!("m/{:020}", 1), format!("m/{:020}", 3)]);
}

proptest! {
    /// Whatever the fleet looks like: the same input gives the same plan, no instance gets two actions, offers name only
    /// connected nodes with room, and what is promised to a first candidate fits into it. However long a claim has been held:
    /// what serves is given up never, and the offer that goes with it does not name who had it.
    #[test]
    fn plans_keep_their_post_conditions(
        seed: u64,
        memories in prop::collection::vec(0..6_i64, 0..6),
        replicas in prop::collection::vec(0..5_i32, 0..4),
        instances in prop::collection::vec((0..4_usize, 0..3_u64, any::<bool>(), 0..8_usize, 0..11_i32), 0..12),
        held_ms in 0..200_000_i64,
    ) {
        let mut fleet = Fleet::new();
        for (n, gib) in memories.iter().enumerate() {
            fleet = fleet.node(&format!("n{n}"), gib * GIB);
        }
        for (n, replicas) in replicas.iter().enumerate() {
            fleet = fleet.deployment(&format!("d{n}"), *replicas, 2);
        }
        for (n, (deployment, revision, wanted, node, state)) in instances.iter().enumerate() {
            let id = format!("d{deployment}-bbbbb{}", char::from(b'b' + u8::try_from(n).unwrap()));
            fleet = fleet.instance(&id, *revision, *wanted);
            if *node < memories.len() {
                fleet = fleet.owned(&id, &format!("n{node}"), InstanceState::try_from(*state).unwrap());
                let held = Held { idle_ms: held_ms, failing_ms: Some(held_ms), ready_ms: Some(held_ms) };
                fleet.held_for.insert(id, held);
            }
        }
        let plan = fleet.plan_with(seed);
        prop_assert_eq!(&plan, &fleet.plan_with(seed));

        let mut acted = std::collections::BTreeSet::new();
        let mut promised: BTreeMap<&str, i64> = BTreeMap::new();
        for action in &plan.actions {
            if let Action::Create { id, .. } | Action::Offer { id, .. } | Action::Stop { id, .. } | Action::Collect { id, .. }
                | Action::GiveUp { id, .. } | Action::Forgive { id, .. } = action
            {
                prop_assert!(acted.insert(id.clone()), "two actions on {}", id);
            }
            if let Action::Offer { id, .. } | Action::Collect { id, .. } = action {
                prop_assert!(!fleet.snapshot.claims.contains_key(id), "{} is owned", id);
            }
            if let Action::GiveUp { id, node, offer, .. } = action {
                use InstanceState::{Draining, Ready, Stopped, Suspect};
                let (state, wanted) = (fleet.snapshot.state(id), fleet.snapshot.instances[id].value.wanted);
                prop_assert!(!wanted || ![Ready, Suspect, Draining, Stopped].contains(&state), "{} is {:?}", id, state);
                prop_assert_eq!(offer.is_some(), wanted);
                prop_assert!(offer.iter().all(|offer| !offer.candidates.contains(node)), "{} has had {}", node, id);
            }
        }
        for (_, nodes) in offered(&plan) {
            *promised.entry(nodes[0]).or_default() += GIB;
            for node in nodes {
                let capacity = fleet.snapshot.nodes[node].value.capacity.as_ref().unwrap().memory_bytes;
                prop_assert!(capacity - fleet.snapshot.reserved_bytes(node) >= GIB);
            }
        }
        for (node, bytes) in promised {
            let capacity = fleet.snapshot.nodes[node].value.capacity.as_ref().unwrap().memory_bytes;
            prop_assert!(fleet.snapshot.reserved_bytes(node) + bytes <= capacity, "{} is promised too much", node);
        }
    }
}
