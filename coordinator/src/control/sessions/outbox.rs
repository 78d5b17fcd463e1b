//! PURE. What a node is to be told, from a snapshot and what it was told before. Level-triggered: the whole set of claims
//! is sent when it differs from the last one sent.

use crate::{
    control::{mutant, shares::Shares},
    plan::snapshot::{Snapshot, millis},
};
use drover_proto::{
    limits,
    store::v1::UnclaimedRun,
    v1::{
        ClaimSet, EndRun, InstanceState, Offer, OwnedClaim, RecordedRun, SessionResponse, Token,
        session_response::Message,
    },
};
use imbl::{OrdMap, ordmap::DiffItem};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// Time that an offer's best candidate has before the others are told, in milliseconds: placement is meant, and a few
/// round trips of the best node are worth waiting for.
const HEAD_START_MS: i64 = 250;

/// Shortest time between two sets of claims of which the second only has more: a node has the answers to its own claims, and
/// the set repeats them. In milliseconds.
const MORE_CLAIMS_MS: i64 = 100;

/// An offer that was not sent yet.
#[derive(Debug)]
struct Waiting {
    /// Revision of the instance's record.
    revision: i64,
    /// When it was first seen, by this coordinator's clock.
    first_ms: i64,
}

/// Memory of one session's stream.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    claims: Option<Told>,
    /// The version of the shares that was looked at last; `None` to look whatever that is.
    looked: Option<u64>,
    /// When to look again though nothing has changed.
    again_ms: Option<i64>,
    /// The offers of that version, each with the revision of its instance's record, and those of them that were not sent.
    offers: OrdMap<Arc<str>, i64>,
    waiting: BTreeMap<Arc<str>, Waiting>,
    /// Runs that the node has on record, as it said last.
    runs: Vec<RecordedRun>,
    /// Some of them it does not own: what becomes of these hangs on what others do.
    strays: bool,
    /// Commands that were sent on this stream and still stand.
    commands: BTreeSet<String>,
}

/// A set of claims as it was sent.
#[derive(Debug)]
struct Told {
    claims: Vec<OwnedClaim>,
    end_runs: Vec<EndRun>,
    session_revision: i64,
    at_ms: i64,
}

impl Told {
    fn of(set: &ClaimSet, at_ms: i64) -> Self {
        let (claims, end_runs) = (set.claims.clone(), set.end_runs.clone());
        Self { claims, end_runs, session_revision: set.session_revision, at_ms }
    }

    fn is(&self, set: &ClaimSet) -> bool {
        self.claims == set.claims && self.end_runs == set.end_runs && self.session_revision == set.session_revision
    }

    /// Whether a set says nothing against this one.
    fn is_part_of(&self, set: &ClaimSet) -> bool {
        // Both are in the order of their ids.
        let mut theirs = set.claims.iter();
        self.end_runs == set.end_runs && self.claims.iter().all(|mine| theirs.any(|claim| claim == mine))
    }
}

impl Outbox {
    pub(super) fn new(runs: Vec<RecordedRun>) -> Self {
        Self { runs, ..Self::default() }
    }

    /// The node has said anew what runs on it.
    pub(super) fn set_runs(&mut self, runs: Vec<RecordedRun>) {
        (self.runs, self.looked) = (runs, None);
    }

    /// The set of claims, whether or not it has changed; remembered as sent.
    pub(super) fn claim_set(&mut self, snapshot: &Snapshot, shares: &Shares, node: &str, now_ms: i64) -> ClaimSet {
        let set = claim_set(snapshot, shares, node, &self.runs);
        self.claims = Some(Told::of(&set, now_ms));
        set
    }

    /// What to send now, and when (in milliseconds since the epoch) to ask again though nothing has changed.
    pub(super) fn due(
        &mut self,
        snapshot: &Snapshot,
        shares: &Shares,
        node: &str,
        now_ms: i64,
    ) -> (Vec<SessionResponse>, Option<i64>) {
        let news = self.strays || self.looked.is_none_or(|version| shares.changed(node) > version);
        // Nothing waits longer than a head start: a time further off was meant before the clock was put back.
        let waits = |at: i64| at > now_ms && at - now_ms <= HEAD_START_MS;
        if !news && self.again_ms.is_none_or(waits) {
            return (Vec::new(), self.again_ms);
        }
        (self.looked, self.again_ms) = (Some(shares.version()), None);
        let mut messages = Vec::new();
        self.say_claims(snapshot, shares, node, now_ms, &mut messages);
        self.say_offers(snapshot, shares, node, now_ms, &mut messages);
        self.commands.retain(|key| snapshot.commands.contains_key(key));
        for (key, asked) in snapshot.commands_to(node) {
            if let (Some(command), true) = (&asked.command, self.commands.insert(key.clone())) {
                messages.push(Message::Command(command.clone()));
            }
        }
        (messages.into_iter().map(|message| SessionResponse { message: Some(message) }).collect(), self.again_ms)
    }

    fn again_at(&mut self, ms: i64) {
        self.again_ms = Some(self.again_ms.map_or(ms, |at| at.min(ms)));
    }

    fn say_claims(
        &mut self,
        snapshot: &Snapshot,
        shares: &Shares,
        node: &str,
        now_ms: i64,
        messages: &mut Vec<Message>,
    ) {
        let set = claim_set(snapshot, shares, node, &self.runs);
        let owned = |id: &str| snapshot.claims.get(id).is_some_and(|claim| claim.value.node == node);
        self.strays = self.runs.iter().any(|run| !owned(&run.instance));
        if let Some(told) = &self.claims {
            if told.is(&set) {
                return;
            }
            let not_before_ms = told.at_ms + MORE_CLAIMS_MS;
            // A clock that was put back makes nobody wait.
            if (told.at_ms..not_before_ms).contains(&now_ms) && told.is_part_of(&set) {
                return self.again_at(not_before_ms);
            }
        }
        self.claims = Some(Told::of(&set, now_ms));
        messages.push(Message::Claims(set));
    }

    fn say_offers(
        &mut self,
        snapshot: &Snapshot,
        shares: &Shares,
        node: &str,
        now_ms: i64,
        messages: &mut Vec<Message>,
    ) {
        let offers = shares.offers(node);
        for item in self.offers.diff(&offers) {
            match item {
                DiffItem::Add(id, revision) | DiffItem::Update { new: (id, revision), .. } => {
                    self.waiting.insert(id.clone(), Waiting { revision: *revision, first_ms: now_ms });
                }
                DiffItem::Remove(id, _) => drop(self.waiting.remove(id)),
            }
        }
        self.offers = offers;
        let mut again_ms = None;
        self.waiting.retain(|id, waiting| {
            let Some((offer, rank)) = offer(snapshot, id, node, now_ms) else { return true };
            let not_before_ms = waiting.first_ms + if rank == 0 { 0 } else { HEAD_START_MS };
            // It is that of the diff, since both are of one snapshot.
            debug_assert_eq!(offer.offer_revision, waiting.revision);
            if (waiting.first_ms..not_before_ms).contains(&now_ms) {
                again_ms = Some(again_ms.map_or(not_before_ms, |at: i64| at.min(not_before_ms)));
                return true;
            }
            messages.push(Message::Offer(offer));
            false
        });
        again_ms.into_iter().for_each(|ms| self.again_at(ms));
    }
}

/// Runs that are alive, as the node's record keeps them: all of them, since a claim that stands now may be gone in a moment.
pub(super) fn alive(runs: &[RecordedRun]) -> Vec<UnclaimedRun> {
    let alive = runs.iter().filter(|run| run.alive).map(|run| UnclaimedRun {
        instance: run.instance.clone(),
        memory_bytes: run.memory_bytes.clamp(0, limits::MEMORY_BYTES_MAX),
    });
    alive.collect()
}

fn claim_set(snapshot: &Snapshot, shares: &Shares, node: &str, runs: &[RecordedRun]) -> ClaimSet {
    let owned = shares.claims(node).filter_map(|id| Some((id, snapshot.claims.get(id)?)));
    let claims = owned.map(|(id, claim)| {
        let instance = snapshot.instances.get(id);
        OwnedClaim {
            instance: id.to_owned(),
            token: Some(Token {
                generation: mutant::told_generation(snapshot.generation()),
                revision: claim.mod_revision,
            }),
            // What nobody has withdrawn goes on: a record that can't be read is not one that says no.
            wanted: instance.map_or_else(|| snapshot.is_unreadable(id), |i| i.value.wanted),
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
        store_generation: snapshot.generation(),
        end_runs: runs.iter().filter_map(|run| end_run(snapshot, node, run)).collect(),
    }
}

/// A run that the node does not own ends when nobody wants the instance, or when a higher token is ready elsewhere. Of an
/// instance that the store does not know, only this store can say so: a run that was claimed in another one, or before this
/// one was begun, is none of its business.
fn end_run(snapshot: &Snapshot, node: &str, run: &RecordedRun) -> Option<EndRun> {
    let order = |yields_to| Some(EndRun { instance: run.instance.clone(), yields_to });
    let wanted = match snapshot.instances.get(&run.instance) {
        Some(instance) => instance.value.wanted,
        None => snapshot.is_unreadable(&run.instance) || !claimed_here(snapshot, run),
    };
    match snapshot.claims.get(&run.instance) {
        Some(claim) if claim.value.node == node => None,
        // Whoever holds the claim will never be ready in its place.
        Some(_) if snapshot.instances.contains_key(&run.instance) && !wanted => order(None),
        Some(_) => {
            let token = snapshot.token(&run.instance);
            let higher = token > run.token;
            let ready =
                snapshot.state(&run.instance) == InstanceState::Ready || mutant::on(mutant::name::DRAIN_BEFORE_READY);
            let token = if mutant::on(mutant::name::DRAIN_ORDER_WITHOUT_TOKEN) { None } else { token };
            (higher && ready).then(|| order(token)).flatten()
        }
        None if wanted => None,
        None => order(None),
    }
}

/// Whether this store can have made the token of a run.
fn claimed_here(snapshot: &Snapshot, run: &RecordedRun) -> bool {
    let begun = snapshot.schema.as_ref().map_or(i64::MAX, |schema| schema.create_revision);
    let token = run.token.unwrap_or_default();
    (token.generation == snapshot.generation() && token.revision > begun)
        || mutant::on(mutant::name::ENDS_WHAT_IT_NEVER_KNEW)
}

/// The offer of an instance to this node, while it stands and was not used, with the node's rank among the candidates.
fn offer(snapshot: &Snapshot, id: &str, node: &str, now_ms: i64) -> Option<(Offer, usize)> {
    let instance = snapshot.instances.get(id)?;
    let offer = snapshot.standing_offer(id, instance, now_ms)?;
    let rank = offer.candidates.iter().position(|c| c == node)?;
    let spec = snapshot.spec_of(&instance.value)?.clone();
    let told = Offer {
        instance: id.to_owned(),
        offer_revision: instance.mod_revision,
        memory_bytes: spec.memory_bytes.unwrap_or(0),
        spec: Some(spec),
        revision: instance.value.revision,
        deadline: offer.deadline,
        valid_ms: offer.deadline.as_ref().map_or(0, |deadline| millis(deadline).saturating_sub(now_ms)),
        halt_generation: offer.halt_generation,
        traceparent: instance.value.traceparent.clone(),
    };
    Some((told, rank))
}

#[cfg(test)]
mod tests;
