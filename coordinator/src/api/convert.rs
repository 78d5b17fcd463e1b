//! PURE. Records of the store as messages of the API.

use crate::plan::snapshot::{Snapshot, Stored};
use drover_proto::status::{reason, with_reason};
use drover_proto::{
    limits::defaults,
    store::v1 as record,
    v1::{self, InstanceState},
};
use prost_types::Timestamp;
use tonic::{Code, Status};

/// A deployment.
pub(super) fn deployment(snapshot: &Snapshot, stored: &record::Deployment) -> v1::Deployment {
    let name = stored.spec.as_ref().map_or("", |s| s.name.as_str());
    let wanted: Vec<_> = snapshot.instances_of(name).filter(|(_, i)| i.value.wanted).collect();
    let count =
        |f: &dyn Fn(&str) -> bool| i32::try_from(wanted.iter().filter(|(id, _)| f(id)).count()).unwrap_or(i32::MAX);
    let ready = count(&|id| snapshot.state(id) == InstanceState::Ready);
    v1::Deployment {
        spec: stored.spec.clone(),
        generation: stored.generation,
        revision: stored.revision,
        replicas: stored.replicas,
        ready_replicas: ready,
        claimed_replicas: count(&|id| snapshot.claims.contains_key(id)),
        deleting: stored.deleting,
        created_at: stored.created_at,
        updated_at: stored.updated_at,
        message: deployment_message(snapshot, stored, name, ready),
    }
}

fn deployment_message(snapshot: &Snapshot, stored: &record::Deployment, name: &str, ready: i32) -> String {
    if stored.deleting {
        return format!("being deleted; {} instances left", snapshot.instances_of(name).count());
    }
    if let Some(unplaced) = snapshot.unplaced.get(name) {
        return format!("no node can take an instance: {}", unplaced.value.why);
    }
    let failed =
        snapshot.instances_of(name).find(|(id, i)| i.value.wanted && snapshot.state(id) == InstanceState::Failed);
    if let Some((id, _)) = failed {
        let why = snapshot.statuses.get(id).map(|s| s.value.message.clone()).unwrap_or_default();
        return format!("{id} failed: {why}");
    }
    if ready >= stored.replicas {
        return String::new();
    }
    format!("{ready} of {} ready", stored.replicas)
}

/// An instance.
pub(super) fn instance(snapshot: &Snapshot, id: &str, stored: &Stored<record::Instance>) -> v1::Instance {
    let spec = snapshot.spec_of(&stored.value);
    let token = snapshot.token(id);
    let status = snapshot.statuses.get(id).map(|s| &s.value).filter(|s| s.token == token && token.is_some());
    let model = spec.map(|s| if s.model.is_empty() { s.name.clone() } else { s.model.clone() });
    let message = match status {
        Some(s) => s.message.clone(),
        None => waiting_for(snapshot, id, &stored.value),
    };
    v1::Instance {
        id: id.to_owned(),
        deployment: stored.value.deployment.clone(),
        model: model.unwrap_or_default(),
        revision: stored.value.revision,
        state: snapshot.state(id).into(),
        node: snapshot.claims.get(id).map(|c| c.value.node.clone()).unwrap_or_default(),
        token,
        pid: status.map_or(0, |s| s.pid),
        restarts: status.map_or(0, |s| s.restarts),
        slots: spec.and_then(|s| s.slots).unwrap_or(defaults::SLOTS),
        since: status.and_then(|s| s.since).or(stored.value.created_at),
        message,
        wanted: stored.value.wanted,
        unowned_node: unowned_node(snapshot, id, &stored.value).unwrap_or_default().to_owned(),
    }
}

/// The node whose server answers for an instance without being its owner.
fn unowned_node<'a>(snapshot: &'a Snapshot, id: &str, stored: &record::Instance) -> Option<&'a str> {
    let run = snapshot.answering(id).filter(|_| stored.wanted && snapshot.state(id) != InstanceState::Ready);
    run.map(|run| run.node.as_str())
}

fn waiting_for(snapshot: &Snapshot, id: &str, stored: &record::Instance) -> String {
    if let Some(node) = unowned_node(snapshot, id, stored) {
        let next = match snapshot.claims.get(id) {
            Some(claim) => format!("{} has claimed it", claim.value.node),
            None => "it is claimed again when its node is back, or claimed by another".to_owned(),
        };
        return format!("its server on {node} answers without an owner; {next}");
    }
    match (&stored.offer, snapshot.claims.contains_key(id)) {
        (_, true) => String::new(),
        (None, false) => "no node can take it".to_owned(),
        (Some(offer), false) => format!("offered to {}", offer.candidates.join(", ")),
    }
}

/// A node.
pub(super) fn node(snapshot: &Snapshot, name: &str, stored: &Stored<record::Node>) -> v1::Node {
    let session = snapshot.sessions.get(name);
    let absent_until = session.filter(|s| s.value.stream.is_empty()).and_then(|s| s.value.absent_until);
    let since: Option<Timestamp> = session.and_then(|s| s.value.opened_at).or(stored.value.joined_at);
    v1::Node {
        name: name.to_owned(),
        connected: session.is_some(),
        labels: stored.value.labels.clone(),
        capacity: stored.value.capacity.clone(),
        reserved_bytes: snapshot.reserved_bytes(name),
        instances: i32::try_from(snapshot.claims_of(name).count()).unwrap_or(i32::MAX),
        agent_version: stored.value.agent_version.clone(),
        proxy_address: stored.value.proxy_address.clone(),
        since,
        message: match (session, &absent_until) {
            (None, _) => "no session: its lease ran out".to_owned(),
            (Some(_), Some(until)) => {
                let until = Timestamp { nanos: 0, ..*until };
                format!("its agent has left and means to be back until {until}: its session is kept so long")
            }
            (Some(_), None) => String::new(),
        },
        absent_until,
    }
}

/// NOT_FOUND for an instance.
pub(super) fn no_instance(id: &str) -> Status {
    with_reason(Code::NotFound, reason::NOT_FOUND, format!("there is no instance {id}"))
}
