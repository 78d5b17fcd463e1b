//! Claims: made by one transaction of the store, and by nothing else.
//!
//! The transaction is that of the design ("Claiming"): it compares the offer, that there is no claim, that the offer has
//! not served before, the session at the revision that the *request* names, the schema, and the halt as read.

use super::{
    clock,
    events::Events,
    mutant,
    view::{Behind, View},
};
use crate::{
    plan::snapshot::Snapshot,
    store::{self, Compare, Op, Store, Txn, keys, records},
};
use drover_proto::{
    limits,
    status::reason,
    store::v1 as record,
    v1::{ClaimRequest, ClaimResponse, Severity, Token},
};
use std::time::Duration;

/// Longest wait for this coordinator's view to reach what the request refers to.
const CATCH_UP: Duration = Duration::from_secs(2);

/// Why a claim was not made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is lost; `reason` is one of `drover_proto::status::reason`.
    #[error("{message}")]
    Refused {
        /// Word for programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// This coordinator does not know enough yet.
    #[error(transparent)]
    Behind(#[from] Behind),
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
}

fn refused(reason: &'static str, message: impl Into<String>) -> Error {
    Error::Refused { reason, message: message.into() }
}

/// Makes claims.
#[derive(Debug, Clone)]
pub struct Claims {
    store: Store,
    view: View,
    events: Events,
}

impl Claims {
    /// Over this store and view.
    #[must_use]
    pub fn new(store: Store, view: View, events: Events) -> Self {
        Self { store, view, events }
    }

    /// Claims an instance for a node.
    pub async fn claim(&self, node: &str, request: &ClaimRequest) -> Result<ClaimResponse, Error> {
        let known = request.session_revision.max(request.offer_revision);
        let snapshot = self.view.at_least(known, CATCH_UP).await?;
        let instance = check(&snapshot, node, request)?;
        let spec = snapshot.spec_of(&instance).cloned().ok_or_else(|| {
            refused(reason::OFFER_GONE, format!("revision {} of {} is gone", instance.revision, instance.deployment))
        })?;
        let outcome = self.store.txn(transaction(&snapshot, node, request, &instance)?).await?;
        if !outcome.succeeded {
            return Err(why_lost(&outcome.reads, node, request));
        }
        let token = Token { generation: snapshot.generation(), revision: outcome.revision };
        let what = if request.recorded_token.is_some() { "ReClaimed" } else { "Claimed" };
        let message = format!("by {node} with token {token}");
        // A node that is back claims again all that it has: that it is back is told once.
        let on = request.recorded_token.is_none().then_some(node);
        self.events.record_on_node(on, &request.instance, what, Severity::Info, message);
        Ok(ClaimResponse {
            token: Some(token),
            session_revision: outcome.revision,
            spec: Some(spec),
            revision: instance.revision,
        })
    }
}

/// What can be told from the view before the store is asked: cheap refusals, and the node's capacity.
fn check(snapshot: &Snapshot, node: &str, request: &ClaimRequest) -> Result<record::Instance, Error> {
    let session = snapshot.sessions.get(node).filter(|s| s.value.session_id == request.session_id);
    match session {
        None => {
            return Err(refused(
                reason::SESSION_MOVED,
                format!("{node} has no session {}: open one", request.session_id),
            ));
        }
        Some(s) if s.mod_revision != request.session_revision => {
            let message = format!(
                "the session is at revision {}, the request names {}",
                s.mod_revision, request.session_revision
            );
            return Err(refused(reason::SESSION_MOVED, message));
        }
        Some(_) => {}
    }
    let gone = |what: String| refused(reason::OFFER_GONE, what);
    let stored = snapshot
        .instances
        .get(&request.instance)
        .filter(|i| i.value.wanted)
        .ok_or_else(|| gone(format!("{} is not wanted any more", request.instance)))?;
    let again = request.recorded_token.is_some();
    if !again {
        let offer = stored.value.offer.as_ref().filter(|_| stored.mod_revision == request.offer_revision);
        let offer = offer.ok_or_else(|| gone(format!("the offer of {} was replaced", request.instance)))?;
        if !offer.candidates.iter().any(|c| c == node) {
            return Err(gone(format!("{} was not offered to {node}", request.instance)));
        }
        if offer.deadline.as_ref().map_or(0, clock::millis) < clock::now_ms() {
            return Err(gone(format!("the offer of {} has run out", request.instance)));
        }
    }
    if let Some(claim) = snapshot.claims.get(&request.instance)
        && !mutant::on(mutant::name::CLAIM_WITHOUT_CREATE_COMPARE)
    {
        return Err(refused(reason::ALREADY_CLAIMED, format!("{} is owned by {}", request.instance, claim.value.node)));
    }
    if snapshot.halted() && !(again && snapshot.halt.as_ref().is_some_and(|h| h.value.level == "claims")) {
        return Err(refused(reason::HALTED, "claiming is halted"));
    }
    if !(0..=limits::MEMORY_BYTES_MAX).contains(&request.memory_bytes) {
        let (bytes, max) = (request.memory_bytes, limits::MEMORY_BYTES_MAX);
        return Err(refused(reason::INVALID_FIELD, format!("memory_bytes = {bytes} is not allowed: use 0 to {max}")));
    }
    if !again {
        let capacity = snapshot.nodes.get(node).and_then(|n| n.value.capacity.as_ref()).map_or(0, |c| c.memory_bytes);
        let free = capacity.saturating_sub(snapshot.reserved_bytes(node));
        if free < request.memory_bytes {
            let message = format!("{node} has {free} bytes of memory left, {} are needed", request.memory_bytes);
            return Err(refused(reason::NO_CAPACITY, message));
        }
    }
    Ok(stored.value.clone())
}

/// The claim transaction.
fn transaction(
    snapshot: &Snapshot,
    node: &str,
    request: &ClaimRequest,
    instance: &record::Instance,
) -> Result<Txn, Error> {
    let id = &request.instance;
    let again = request.recorded_token.is_some();
    let (Some(session), Some(stored), Some(schema)) =
        (snapshot.sessions.get(node), snapshot.instances.get(id), snapshot.schema.as_ref())
    else {
        return Err(refused(reason::SESSION_MOVED, "the view has changed meanwhile"));
    };
    let mut compare = vec![
        Compare::ModRevision(keys::instance(id), stored.mod_revision),
        Compare::ModRevision(keys::session(node), request.session_revision),
        Compare::ModRevision(keys::SCHEMA.to_owned(), schema.mod_revision),
        Compare::ModRevision(keys::HALT.to_owned(), snapshot.halt.as_ref().map_or(0, |h| h.mod_revision)),
    ];
    if !mutant::on(mutant::name::CLAIM_WITHOUT_CREATE_COMPARE) {
        compare.push(Compare::CreateRevision(keys::claim(id), 0));
    }
    if !again {
        compare.push(Compare::ModRevisionBelow(keys::taken(id), request.offer_revision));
    }
    let lease = session.value.lease;
    let claim = record::Claim {
        node: node.to_owned(),
        session_id: request.session_id.clone(),
        nonce: request.nonce.clone(),
        memory_bytes: request.memory_bytes,
        gpus: vec![],
        revision: instance.revision,
    };
    let bumped = record::Session { version: session.value.version + 1, ..session.value.clone() };
    let taken = record::Taken { node: node.to_owned(), nonce: request.nonce.clone() };
    Ok(Txn {
        compare,
        then: vec![
            records::put(keys::claim(id), &claim, lease),
            records::put(keys::session(node), &bumped, lease),
            records::put(keys::taken(id), &taken, 0),
        ],
        otherwise: vec![Op::Get(keys::claim(id)), Op::Get(keys::session(node)), Op::Get(keys::instance(id))],
    })
}

/// Tells from what the failed transaction read which compare did not hold.
fn why_lost(reads: &[Vec<store::KeyValue>], node: &str, request: &ClaimRequest) -> Error {
    let read = |n: usize| reads.get(n).and_then(|r| r.first());
    if let Some(claim) = read(0) {
        let owner = records::decode::<record::Claim>(claim).map(|c| c.node).unwrap_or_default();
        return refused(reason::ALREADY_CLAIMED, format!("{} is owned by {owner}", request.instance));
    }
    if read(1).is_none_or(|s| s.mod_revision != request.session_revision) {
        return refused(reason::SESSION_MOVED, format!("the session of {node} has moved on: resume it"));
    }
    refused(
        reason::OFFER_GONE,
        format!("the offer of {} was replaced, used or withdrawn, or a halt was set", request.instance),
    )
}
