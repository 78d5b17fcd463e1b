//! Whose room is promised to whom, who makes way, and who is asked.

use super::*;
use drover_proto::{PROTOCOL_LEASE_LOST, v1::OnLeaseLost};

/// A spec of a deployment's second revision that differs from the first by the memory that it needs.
fn needing(mut fleet: Fleet, bytes: i64) -> Fleet {
    let key = format!("m/{:020}", 2);
    let mut revision = fleet.snapshot.revisions[&key].as_ref().clone();
    revision.value.spec.as_mut().unwrap().memory_bytes = Some(bytes);
    fleet.snapshot.revisions.insert(key, Arc::new(revision));
    fleet
}

fn offered_to(mut fleet: Fleet, id: &str, revision: u64, candidates: &[&str], deadline_ms: i64) -> Fleet {
    let offer = record::Offer {
        candidates: candidates.iter().map(ToString::to_string).collect(),
        deadline: Some(prost_types::Timestamp { seconds: deadline_ms / 1000, nanos: 0 }),
        halt_generation: 0,
    };
    let deployment = id.rsplit_once('-').unwrap().0.to_owned();
    let instance =
        record::Instance { deployment, revision, wanted: true, offer: Some(offer), ..record::Instance::default() };
    fleet.snapshot.instances.insert(id.to_owned(), stored(instance, 10));
    fleet
}

#[test]
fn nothing_makes_way_under_a_halt() {
    let fleet = Fleet::new().node("a", 8 * GIB).deployment("m", 1, 2);
    let mut fleet = fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "a", InstanceState::Ready);
    fleet.snapshot.halt = Some(stored(record::Halt { level: "claims".to_owned(), generation: 4 }, 30));
    assert_eq!(stopped(&fleet.plan()), [""; 0]);
}

#[test]
fn nothing_makes_way_for_what_would_not_fit_even_then() {
    let fleet = needing(Fleet::new().node("a", 4 * GIB).deployment("m", 2, 2), 5 * GIB);
    let fleet = fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "a", InstanceState::Ready);
    let fleet = fleet.instance("m-cccccc", 1, true).owned("m-cccccc", "a", InstanceState::Ready);
    let plan = fleet.plan();
    assert_eq!(stopped(&plan), [""; 0], "a new revision that no node can take leaves the old one serving");
    assert!(!plan.unplaced.is_empty());
}

#[test]
fn several_old_instances_make_way_for_a_larger_one_after_each_other() {
    let fleet = needing(Fleet::new().node("a", 2 * GIB).deployment("m", 2, 2), 2 * GIB);
    let fleet = fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "a", InstanceState::Ready);
    let fleet = fleet.instance("m-cccccc", 1, true).owned("m-cccccc", "a", InstanceState::Ready);
    assert_eq!(stopped(&fleet.plan()), ["m-bbbbbb"]);
}

#[test]
fn an_old_instance_makes_way_also_when_the_new_one_was_offered_in_vain_before() {
    let fleet = Fleet::new().node("a", GIB).deployment("m", 1, 2);
    let fleet = fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "a", InstanceState::Ready);
    let fleet = offered_to(fleet, "m-cccccc", 2, &["gone"], NOW - 1000);
    assert_eq!(stopped(&fleet.plan()), ["m-bbbbbb"]);
}

#[test]
fn a_deployment_that_is_removed_is_not_trimmed_as_well() {
    let plan = Fleet::new().deployment("m", 1, 9).deleting("m").plan();
    assert!(matches!(&plan.actions[..], [Action::RemoveDeployment { .. }]), "{plan:?}");
}

#[test]
fn what_standing_offers_promise_is_not_promised_again() {
    let fleet = Fleet::new().node("a", 2 * GIB).node("b", 2 * GIB).deployment("m", 2, 1);
    let fleet = offered_to(fleet, "m-bbbbbb", 1, &["a", "b"], NOW + 3000);
    for seed in 0..8 {
        let plan = fleet.plan_with(seed);
        assert_eq!(offered(&plan)[0].1[0], "b", "spread counts the offer that stands: {plan:?}");
    }
    let full = Fleet::new().node("a", GIB).deployment("m", 2, 1);
    let full = offered_to(full, "m-bbbbbb", 1, &["a"], NOW + 3000);
    assert_eq!(offered(&full.plan()), [], "its room is promised");
}

#[test]
fn when_the_best_candidates_decline_every_other_node_is_asked_in_the_end() {
    let mut fleet = Fleet::new().deployment("m", 1, 1);
    for n in 0..12 {
        fleet = fleet.node(&format!("n{n:02}"), (30 - n) * GIB);
    }
    // All but the node that fits worst by its score decline, offer by offer.
    let mut asked: Vec<String> = vec!["n00".to_owned(), "n01".to_owned(), "n02".to_owned()];
    for seed in 0..200 {
        let names: Vec<&str> = asked.iter().map(String::as_str).collect();
        fleet = offered_to(fleet, "m-bbbbbb", 1, &names, NOW - 1000);
        let plan = fleet.plan_with(seed);
        asked = offered(&plan)[0].1.iter().map(ToString::to_string).collect();
        if asked.iter().any(|n| n == "n11") {
            return;
        }
    }
    panic!("n11 was never asked");
}

#[test]
fn absurd_numbers_of_a_node_neither_overflow_nor_make_room() {
    let fleet = Fleet::new().node("a", 8 * GIB).deployment("m", 3, 1);
    let fleet = fleet.instance("m-bbbbbb", 1, true).owned("m-bbbbbb", "a", InstanceState::Ready);
    let mut fleet = fleet.instance("m-cccccc", 1, true).owned("m-cccccc", "a", InstanceState::Ready);
    for id in ["m-bbbbbb", "m-cccccc"] {
        let claim = record::Claim { node: "a".to_owned(), memory_bytes: i64::MAX, ..record::Claim::default() };
        fleet.snapshot.claims.insert(id.to_owned(), stored(claim, 20));
    }
    let mut node = fleet.snapshot.nodes["a"].as_ref().clone();
    node.value.unclaimed = vec![record::UnclaimedRun { instance: "x-bbbbbb".to_owned(), memory_bytes: i64::MAX }];
    node.value.models.as_mut().unwrap().files[0].size_bytes = i64::MAX;
    fleet.snapshot.nodes.insert("a".to_owned(), Arc::new(node));
    let key = format!("m/{:020}", 1);
    let mut revision = fleet.snapshot.revisions[&key].as_ref().clone();
    revision.value.spec.as_mut().unwrap().memory_bytes = None;
    fleet.snapshot.revisions.insert(key, Arc::new(revision));
    assert_eq!(offered(&fleet.plan()), []);
}

#[test]
fn the_reasons_why_nothing_fits_stay_short_in_a_large_fleet() {
    let mut fleet = Fleet::new().deployment("m", 1, 1);
    for n in 0..500 {
        fleet = fleet.node(&format!("n{n}"), GIB / 2);
    }
    let why = &fleet.plan().unplaced[0].why;
    assert!(why.len() < 1000 && why.contains("n0 has") && why.contains("more"), "{why}");
}

/// With room counted anew for every node and instance this took minutes.
#[test]
fn a_plan_for_a_large_fleet_is_made_in_time() {
    let mut fleet = Fleet::new().deployment("m", 1000, 1);
    for n in 0..1000 {
        fleet = fleet.node(&format!("n{n}"), 100 * GIB);
    }
    for n in 0..10_000 {
        let id = format!("z-{n:06}");
        fleet = fleet.instance(&id, 1, true).owned(&id, &format!("n{}", n % 1000), InstanceState::Ready);
    }
    #[allow(clippy::disallowed_methods)] // measured is what it really takes
    let begun = std::time::Instant::now();
    assert_eq!(offered(&fleet.plan()).len(), 1000);
    let took = begun.elapsed();
    assert!(took.as_secs() < 30, "{took:?}");
    println!("1000 instances placed on 1000 nodes that own 10,000: {took:?}");
}

#[test]
fn what_ends_with_its_lease_is_offered_to_agents_that_know_how() {
    let mut fleet = Fleet::new().node("a", 8 * GIB).node("b", 8 * GIB).deployment("m", 1, 1);
    for key in fleet.snapshot.revisions.clone().keys() {
        let spec = Arc::make_mut(&mut fleet.snapshot.revisions[key]).value.spec.as_mut().unwrap();
        spec.on_lease_lost = OnLeaseLost::Stop.into();
    }
    let why = &fleet.plan().unplaced[0].why;
    assert!(why.contains("a has an agent that does not know on_lease_lost"), "{why}");
    let node = fleet.snapshot.nodes.get_mut("b").unwrap();
    Arc::make_mut(node).value.protocol = PROTOCOL_LEASE_LOST;
    let created = fleet.plan();
    let offers: Vec<_> = created.actions.iter().map(|action| format!("{action:?}")).collect();
    assert!(offers.iter().any(|a| a.contains("\"b\"")) && !offers.iter().any(|a| a.contains("\"a\"")), "{offers:?}");
}
