//! Claims and sessions: invariant 1.

use super::{Checker, Rule, history::Transaction};
use crate::store::{KeyValue, keys};
use drover_proto::{
    store::v1 as record,
    v1::{InstanceState, Token},
};

type Broken = (Rule, String, String);

pub(super) fn judge(checker: &Checker, transaction: &Transaction) -> Vec<Broken> {
    let mut broken = Vec::new();
    for (id, kv, claim) in transaction.puts::<record::Claim>(keys::CLAIMS) {
        let made = made(checker, transaction, id, kv, &claim);
        broken.extend(made.into_iter().map(|(rule, message)| (rule, kv.key.clone(), message)));
    }
    for (node, kv, session) in transaction.puts::<record::Session>(keys::SESSIONS) {
        if let Some(message) = rewritten(checker, node, kv, &session) {
            broken.push((Rule::SessionRewritten, kv.key.clone(), message));
        }
    }
    for id in transaction.deletes(keys::CLAIMS) {
        if let Some(message) = vanished(checker, transaction, id) {
            broken.push((Rule::ClaimVanished, keys::claim(id), message));
        }
    }
    broken
}

/// What is wrong with a claim that was put.
fn made(
    checker: &Checker,
    transaction: &Transaction,
    id: &str,
    kv: &KeyValue,
    claim: &record::Claim,
) -> Vec<(Rule, String)> {
    let before = &checker.state;
    let node = &claim.node;
    let mut broken = Vec::new();
    if let Some(standing) = before.claims.get(id) {
        broken.push((
            Rule::SecondClaim,
            format!("{} owned it already, since {}", standing.value.node, standing.mod_revision),
        ));
    }
    let session = before.sessions.get(node);
    let bumped = transaction.put::<record::Session>(&keys::session(node)).is_some_and(|(_, after)| {
        session.is_some_and(|s| s.value.session_id == after.session_id && s.value.version + 1 == after.version)
    });
    let marked = transaction
        .put::<record::Taken>(&keys::taken(id))
        .is_some_and(|(kv, taken)| kv.lease == 0 && taken.node == *node && taken.nonce == claim.nonce);
    if !bumped || !marked {
        broken.push((
            Rule::ClaimNotByTransaction,
            format!("session of {node} bumped: {bumped}, taken/{id} written: {marked}"),
        ));
    }
    let lease = session.map_or(0, |s| s.value.lease);
    if kv.lease == 0 || kv.lease != lease {
        broken.push((
            Rule::ClaimWithoutLease,
            format!("it hangs on lease {}, the session of {node} on {lease}", kv.lease),
        ));
    }
    // A coordinator that is one version older does not say what was named.
    let named = claim.session_revision;
    if named != 0 && session.is_none_or(|s| s.value.session_id != claim.session_id || s.mod_revision != named) {
        let at = session.map_or(0, |s| s.mod_revision);
        broken.push((
            Rule::ClaimOfMovedSession,
            format!("the request named revision {named}, the session of {node} is at {at}"),
        ));
    }
    let instance = before.instances.get(id);
    let offered = claim.offer_revision > 0;
    let stands = instance.is_some_and(|i| {
        let named = i.value.offer.as_ref().is_some_and(|offer| offer.candidates.iter().any(|c| c == node));
        i.value.wanted && (!offered || named && i.mod_revision == claim.offer_revision)
    });
    if !stands {
        let at = instance.map_or(0, |i| i.mod_revision);
        let message = format!(
            "offer {}: {id} is at {at}, wanted {}",
            claim.offer_revision,
            instance.is_some_and(|i| i.value.wanted)
        );
        broken.push((Rule::ClaimNotOffered, message));
    }
    if let Some(taken) = before.taken.get(id).filter(|t| offered && t.mod_revision >= claim.offer_revision) {
        let message = format!("the offer of revision {} was used at {}", claim.offer_revision, taken.mod_revision);
        broken.push((Rule::OfferServedTwice, message));
    }
    let level = before.halt.as_ref().map_or("none", |halt| halt.value.level.as_str());
    if !(matches!(level, "" | "none") || level == "claims" && !offered) {
        broken.push((Rule::ClaimUnderHalt, format!("the halt is at level {level}")));
    }
    if let Some(capacity) = checker.capacities.get(node).filter(|_| offered) {
        let standing = checker.reserved.bytes(node);
        let with = transaction.puts::<record::Claim>(keys::CLAIMS).filter(|(_, _, c)| c.node == *node);
        let total = with.map(|(_, _, c)| c.memory_bytes).fold(standing, i64::saturating_add);
        if total > *capacity {
            broken.push((Rule::Oversold, format!("claims of {node} take {total} bytes of {capacity}")));
        }
    }
    broken
}

fn rewritten(checker: &Checker, node: &str, kv: &KeyValue, session: &record::Session) -> Option<String> {
    let Some(before) = checker.state.sessions.get(node) else {
        return (kv.version != 1).then(|| "it was written over one that the history does not show".to_owned());
    };
    let (id, version) = (&before.value.session_id, before.value.version);
    (*id != session.session_id || version + 1 != session.version).then(|| {
        format!(
            "session {id} of version {version} was followed by {} of version {}",
            session.session_id, session.version
        )
    })
}

fn vanished(checker: &Checker, transaction: &Transaction, id: &str) -> Option<String> {
    let claim = checker.state.claims.get(id)?;
    let token = Token { generation: checker.state.generation(), revision: claim.mod_revision };
    let with_session = transaction.deleted(&keys::session(&claim.value.node));
    let stopped = transaction
        .put::<record::Status>(&keys::status(id))
        .is_some_and(|(_, s)| s.state() == InstanceState::Stopped && s.token == Some(token));
    // Offered to others by the same transaction it was taken from its owner; without an offer it is wanted no more, or an
    // operator has released it.
    let given_up = transaction.put::<record::Instance>(&keys::instance(id));
    let serves =
        matches!(checker.state.state(id), InstanceState::Ready | InstanceState::Suspect | InstanceState::Draining);
    let offered = given_up.as_ref().is_some_and(|(_, instance)| instance.wanted && instance.offer.is_some());
    if serves && offered {
        return Some(format!("it was taken from {}, where it serves", claim.value.node));
    }
    let given_up = given_up.is_some();
    let raised = transaction
        .put::<record::Schema>(keys::SCHEMA)
        .is_some_and(|(_, schema)| schema.generation > checker.state.generation());
    let why = with_session || stopped || given_up || raised;
    (!why).then(|| format!("the claim of {} under {token} went by itself", claim.value.node))
}
