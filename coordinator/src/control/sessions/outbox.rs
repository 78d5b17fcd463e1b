//! PURE. What a node is to be told, from a snapshot and what it was told before. Level-triggered: the whole set of claims
//! is sent when it differs from the last one sent.

use crate::{control::clock, plan::snapshot::Snapshot};
use drover_proto::v1::{
    ClaimSet, EndRun, InstanceState, Offer, OwnedClaim, RecordedRun, SessionResponse, Token, session_response::Message,
};
use std::collections::BTreeMap;

/// Memory of one session's stream.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    claims: Option<(Vec<OwnedClaim>, Vec<EndRun>, i64)>,
    /// Revision of the last offer sent, by instance.
    offers: BTreeMap<String, i64>,
    /// Runs that the node has on record, as far as they have not been reported as ended.
    runs: Vec<RecordedRun>,
}

impl Outbox {
    pub(super) fn new(runs: Vec<RecordedRun>) -> Self {
        Self { runs, ..Self::default() }
    }

    /// The node has reported the end of a run.
    pub(super) fn ended(&mut self, instance: &str) {
        self.runs.retain(|r| r.instance != instance);
    }

    /// Runs that are alive and not owned: they count as reserved on the node.
    pub(super) fn unclaimed(&self, snapshot: &Snapshot, node: &str) -> Vec<drover_proto::store::v1::UnclaimedRun> {
        let owned = |id: &str| snapshot.claims.get(id).is_some_and(|c| c.value.node == node);
        let free = self.runs.iter().filter(|r| r.alive && !owned(&r.instance));
        free.map(|r| drover_proto::store::v1::UnclaimedRun {
            instance: r.instance.clone(),
            memory_bytes: r.memory_bytes,
        })
        .collect()
    }

    /// The set of claims, whether or not it has changed; remembered as sent.
    pub(super) fn claim_set(&mut self, snapshot: &Snapshot, node: &str) -> ClaimSet {
        let set = claim_set(snapshot, node, &self.runs);
        self.claims = Some((set.claims.clone(), set.end_runs.clone(), set.session_revision));
        set
    }

    /// What to send now.
    pub(super) fn due(&mut self, snapshot: &Snapshot, node: &str, now_ms: i64) -> Vec<SessionResponse> {
        let mut messages = Vec::new();
        let set = claim_set(snapshot, node, &self.runs);
        let told = self.claims.as_ref().is_some_and(|(claims, ends, revision)| {
            *claims == set.claims && *ends == set.end_runs && *revision == set.session_revision
        });
        if !told {
            self.claims = Some((set.claims.clone(), set.end_runs.clone(), set.session_revision));
            messages.push(Message::Claims(set));
        }
        self.offers.retain(|id, _| snapshot.instances.contains_key(id));
        for offer in offers(snapshot, node, now_ms) {
            if self.offers.get(&offer.instance) != Some(&offer.offer_revision) {
                self.offers.insert(offer.instance.clone(), offer.offer_revision);
                messages.push(Message::Offer(offer));
            }
        }
        messages.into_iter().map(|message| SessionResponse { message: Some(message) }).collect()
    }
}

fn claim_set(snapshot: &Snapshot, node: &str, runs: &[RecordedRun]) -> ClaimSet {
    let claims = snapshot.claims_of(node).map(|(id, claim)| {
        let instance = snapshot.instances.get(id);
        OwnedClaim {
            instance: id.clone(),
            token: Some(Token { generation: snapshot.generation(), revision: claim.mod_revision }),
            wanted: instance.is_some_and(|i| i.value.wanted),
            spec: instance.and_then(|i| snapshot.spec_of(&i.value)).cloned(),
            revision: claim.value.revision,
            memory_bytes: claim.value.memory_bytes,
            traceparent: instance.map(|i| i.value.traceparent.clone()).unwrap_or_default(),
        }
    });
    ClaimSet {
        claims: claims.collect(),
        revision: snapshot.revision,
        session_revision: snapshot.sessions.get(node).map_or(0, |s| s.mod_revision),
        end_runs: runs.iter().filter_map(|run| end_run(snapshot, node, run)).collect(),
    }
}

/// A run that the node does not own ends when nobody wants the instance, or when a higher token is ready elsewhere.
fn end_run(snapshot: &Snapshot, node: &str, run: &RecordedRun) -> Option<EndRun> {
    let order = |yields_to| Some(EndRun { instance: run.instance.clone(), yields_to });
    let wanted = snapshot.instances.get(&run.instance).is_some_and(|i| i.value.wanted);
    match snapshot.claims.get(&run.instance) {
        Some(claim) if claim.value.node == node => None,
        Some(_) => {
            let token = snapshot.token(&run.instance);
            let higher = token > run.token;
            (higher && snapshot.state(&run.instance) == InstanceState::Ready).then(|| order(token)).flatten()
        }
        None if wanted => None,
        None => order(None),
    }
}

/// Offers to this node that still stand and have not been used.
fn offers(snapshot: &Snapshot, node: &str, now_ms: i64) -> impl Iterator<Item = Offer> {
    snapshot.instances.iter().filter_map(move |(id, instance)| {
        let offer = instance.value.offer.as_ref()?;
        let stands = instance.value.wanted
            && offer.candidates.iter().any(|c| c == node)
            && offer.deadline.as_ref().map_or(0, clock::millis) > now_ms
            && !snapshot.claims.contains_key(id)
            && snapshot.taken.get(id).is_none_or(|t| t.mod_revision < instance.mod_revision);
        if !stands {
            return None;
        }
        let spec = snapshot.spec_of(&instance.value)?.clone();
        Some(Offer {
            instance: id.clone(),
            offer_revision: instance.mod_revision,
            memory_bytes: spec.memory_bytes.unwrap_or(0),
            spec: Some(spec),
            revision: instance.value.revision,
            deadline: offer.deadline,
            halt_generation: offer.halt_generation,
            traceparent: instance.value.traceparent.clone(),
        })
    })
}
