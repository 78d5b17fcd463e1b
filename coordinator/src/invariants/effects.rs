//! What is written about instances: invariant 2, and what the reconciler may do.

use super::{Checker, Rule, history::Transaction};
use crate::{plan::snapshot::millis, store::keys};
use drover_proto::{store::v1 as record, v1::Token};

type Broken = (Rule, String, String);

pub(super) fn judge(checker: &Checker, at_ms: i64, transaction: &Transaction) -> Vec<Broken> {
    let before = &checker.state;
    let mut broken = Vec::new();
    let stands = |id: &str, node: &str, token: Token| {
        before.token(id) == Some(token) && before.claims.get(id).is_some_and(|claim| claim.value.node == node)
    };
    let standing = |id: &str| match before.claims.get(id) {
        Some(claim) => format!("{} owns it under {}.{}", claim.value.node, before.generation(), claim.mod_revision),
        None => "nobody owns it".to_owned(),
    };
    for (id, kv, status) in transaction.puts::<record::Status>(keys::STATUS) {
        let token = status.token.unwrap_or_default();
        if !stands(id, &status.node, token) {
            let message =
                format!("{} of {} under {token}, and {}", status.state().as_str_name(), status.node, standing(id));
            broken.push((Rule::StaleEffect, kv.key.clone(), message));
        }
        let stream = status.stream_revision;
        let known = before.statuses.get(id).filter(|known| known.value.token == status.token);
        if let Some(newer) =
            known.map(|known| known.value.stream_revision).filter(|known| stream != 0 && *known > stream)
        {
            let message = format!(
                "{} of {} by its stream of revision {stream}, after one by its stream of revision {newer}",
                status.state().as_str_name(),
                status.node
            );
            broken.push((Rule::OlderReport, kv.key.clone(), message));
        }
    }
    for (name, kv, run) in transaction.puts::<record::Run>(keys::RUNS) {
        let token = run.token.unwrap_or_default();
        let id = name.split_once('/').map_or("", |(id, _)| id);
        if !stands(id, &run.node, token) || name != format!("{id}/{token}") {
            let message = format!("a run of {} under {token}, and {}", run.node, standing(id));
            broken.push((Rule::StaleRun, kv.key.clone(), message));
        }
    }
    for name in transaction.deletes(keys::RUNS) {
        if let Some(message) = removed(checker, transaction, name) {
            broken.push((Rule::RunRemoved, format!("{}{name}", keys::RUNS), message));
        }
    }
    for (id, kv, instance) in transaction.puts::<record::Instance>(keys::INSTANCES) {
        if let Some(message) = surplus(checker, id, &instance) {
            broken.push((Rule::SurplusInstance, kv.key.clone(), message));
        }
        if let Some(message) = too_soon(checker, at_ms, id, &instance) {
            broken.push((Rule::ReplacedInGrace, kv.key.clone(), message));
        }
        if let Some(message) = before_inventory(checker, at_ms, id, &instance) {
            broken.push((Rule::OfferedBeforeInventory, kv.key.clone(), message));
        }
    }
    broken
}

/// A run's record goes with a report of its node that stands, with its instance or its node, or once no claim covers it.
fn removed(checker: &Checker, transaction: &Transaction, name: &str) -> Option<String> {
    let run = &checker.state.runs.get(name)?.value;
    let id = name.split_once('/').map_or("", |(id, _)| id);
    let reported = transaction
        .put::<record::Status>(&keys::status(id))
        .is_some_and(|(_, status)| status.node == run.node && status.token >= run.token);
    let with = transaction.deleted(&keys::instance(id)) || transaction.deleted(&keys::node(&run.node));
    // Closed by its node, or by the leader for a node that has said that it has ended: nobody's report, and nobody's claim.
    let closed = transaction.put::<record::Status>(&keys::status(id)).is_none() && checker.state.token(id) != run.token;
    (!(reported || with || closed)).then(|| format!("of {}, with neither its report nor its instance", run.node))
}

fn surplus(checker: &Checker, id: &str, instance: &record::Instance) -> Option<String> {
    let before = &checker.state;
    if before.instances.contains_key(id) || !instance.wanted {
        return None;
    }
    let deployment = before.deployments.get(&instance.deployment)?;
    if deployment.value.revision != instance.revision {
        return None;
    }
    let asked = if deployment.value.deleting { 0 } else { usize::try_from(deployment.value.replicas).unwrap_or(0) };
    let wanted = checker.wanted.get(&(instance.deployment.clone(), instance.revision)).copied().unwrap_or(0);
    (wanted > asked)
        .then(|| format!("{wanted} instances of revision {} are wanted, {asked} were asked for", instance.revision))
}

/// An instance that was owned is offered anew within the grace period of its leader.
fn too_soon(checker: &Checker, at_ms: i64, id: &str, instance: &record::Instance) -> Option<String> {
    let before = &checker.state;
    let offer = instance.offer.as_ref()?;
    let known = before.instances.get(id)?;
    if known.value.offer.as_ref() == Some(offer) || before.claims.contains_key(id) {
        return None;
    }
    let taken = before.taken.get(id)?;
    let since = before.leader.as_ref().and_then(|leader| leader.value.since.as_ref()).map(millis)?;
    let until = since + checker.settings.grace_ms - checker.settings.slack_ms;
    (at_ms < until).then(|| {
        format!(
            "{} had it; it is offered {} ms after the leader began, to {}",
            taken.value.node,
            at_ms - since,
            offer.candidates.join(", ")
        )
    })
}

/// A node is offered something before it has said, in its present session, what runs on it. One that never says it is waited
/// for as long as the grace period.
fn before_inventory(checker: &Checker, at_ms: i64, id: &str, instance: &record::Instance) -> Option<String> {
    let before = &checker.state;
    let offer = instance.offer.as_ref()?;
    if before.instances.get(id).is_some_and(|known| known.value.offer.as_ref() == Some(offer)) {
        return None;
    }
    offer.candidates.iter().find_map(|node| {
        let session = &before.sessions.get(node)?.value;
        let opened_ms = millis(session.opened_at.as_ref()?);
        let until = opened_ms + checker.settings.grace_ms - checker.settings.slack_ms;
        let waits = checker.told_inventory.get(node) != Some(&session.session_id) && at_ms < until;
        waits.then(|| {
            format!("offered to {node}, which joined {} ms ago and has not said what runs there", at_ms - opened_ms)
        })
    })
}
