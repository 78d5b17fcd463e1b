//! The metrics page. Every series is made from counts and the snapshot at the time of asking; label sets are fixed.

use super::Probe;
use crate::{gateway::Counts, plan::snapshot::Snapshot};
use drover_proto::v1::InstanceState;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Class {
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Rule {
    rule: String,
}

const STATES: [InstanceState; 10] = [
    InstanceState::Pending,
    InstanceState::Claimed,
    InstanceState::Starting,
    InstanceState::Loading,
    InstanceState::Ready,
    InstanceState::Draining,
    InstanceState::Stopped,
    InstanceState::Backoff,
    InstanceState::Failed,
    InstanceState::Suspect,
];

/// The page, in the OpenMetrics text format.
pub(super) fn text(counts: &Counts, snapshot: &Snapshot, probe: &dyn Probe) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("drover");
    let answers = Family::<Class, Counter>::default();
    for (class, &count) in counts.answers.iter().enumerate().skip(2) {
        answers.get_or_create(&Class { code: format!("{class}xx") }).inc_by(count);
    }
    registry.register("gateway_requests", "Requests answered, by class of the status", answers);
    let counter = |registry: &mut Registry, name: &str, help: &str, value: u64| {
        let counter = Counter::<u64>::default();
        counter.inc_by(value);
        registry.register(name, help, counter);
    };
    counter(&mut registry, "gateway_retries", "Second attempts", counts.retries);
    counter(&mut registry, "gateway_broken_answers", "Answers that broke off after they had begun", counts.broken);
    counter(&mut registry, "gateway_abandoned_answers", "Answers whose client left", counts.abandoned);
    counter(&mut registry, "spans_received", "Spans received from agents and others", probe.spans_received());
    let violations = Family::<Rule, Counter>::default();
    for (rule, count) in probe.violations() {
        violations.get_or_create(&Rule { rule }).inc_by(count);
    }
    let help =
        "Invariants that the store's history shows broken, by rule: 0, else something is wrong with Drover itself";
    registry.register("invariant_violations", help, violations);
    let gauge = |registry: &mut Registry, name: &str, help: &str, value: i64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    let whole = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    let lost = probe.store_lost();
    let lost_seconds = lost.as_ref().map_or(0, |lost| i64::try_from(lost.elapsed.as_secs()).unwrap_or(i64::MAX));
    gauge(&mut registry, "store_reachable", "1 while the store answers and the view follows it", lost.is_none().into());
    gauge(&mut registry, "store_lost_seconds", "For how long the store has been out of reach", lost_seconds);
    let full_help = "1 while the store refuses every change because it is out of space";
    gauge(&mut registry, "store_out_of_space", full_help, probe.store_out_of_space().into());
    let in_flight = i64::try_from(counts.in_flight).unwrap_or(i64::MAX);
    gauge(&mut registry, "gateway_in_flight", "Requests handed to an instance and not finished", in_flight);
    gauge(&mut registry, "deployments", "Deployments", whole(snapshot.deployments.len()));
    gauge(&mut registry, "sessions", "Nodes that hold a session", whole(snapshot.sessions.len()));
    let freeze = probe.freeze(snapshot);
    let seen_help = "Nodes that have a session or had one within the last hour";
    gauge(&mut registry, "nodes_seen", seen_help, whole(freeze.seen));
    gauge(&mut registry, "nodes_lost", "Those of them that have none now", whole(freeze.lost));
    let frozen_help = "1 while nothing is replaced because too many nodes are lost at once, else 0";
    gauge(&mut registry, "frozen", frozen_help, i64::from(freeze.frozen()));
    gauge(&mut registry, "snapshot_revision", "Store revision of the view", snapshot.revision);
    let instances = Family::<State, Gauge>::default();
    for state in STATES {
        let name = state.as_str_name().trim_start_matches("INSTANCE_STATE_").to_ascii_lowercase();
        let count = snapshot.instances.keys().filter(|id| snapshot.state(id) == state).count();
        instances.get_or_create(&State { state: name }).set(whole(count));
    }
    registry.register("instances", "Instances, by state", instances);
    let mut page = String::new();
    encode(&mut page, &registry)?;
    Ok(page)
}
