//! PURE. The claims of one call: what the view refuses, the transaction for the others, what became of each.

use super::{Refused, refused};
use crate::{
    control::{clock, mutant, shares::Shares},
    plan::{avoid, snapshot::Snapshot},
    store::{self, Compare, Op, Txn, keys, records},
};
use drover_proto::{
    limits,
    status::reason,
    store::v1 as record,
    v1::{ClaimItem, ClaimManyRequest, ClaimResult, DeploymentSpec, Token},
};

/// How often a re-claim goes on after the instance's record was written meanwhile, as an offer is.
const ROUNDS_MAX: u32 = 3;

/// Claims of one node under way.
pub(super) struct Batch<'a> {
    snapshot: &'a Snapshot,
    node: &'a str,
    request: &'a ClaimManyRequest,
    /// One for each claim of the request.
    results: Vec<ClaimResult>,
    /// Those that may still be won.
    open: Vec<Open<'a>>,
}

/// A claim that the view does not refuse.
struct Open<'a> {
    /// Its place in the request.
    place: usize,
    item: &'a ClaimItem,
    /// Revision of the instance's record.
    instance_revision: i64,
    /// How often that was read anew.
    rounds: u32,
    /// The spec, and its revision.
    spec: &'a DeploymentSpec,
    revision: u64,
}

impl Open<'_> {
    /// A re-claim does not hang on an offer: that the record was written meanwhile, to offer the instance to others, must not
    /// let them win. False when nothing was written, or this has happened too often.
    fn renew(&mut self, node: &str, instance: Option<&store::KeyValue>) -> bool {
        let Some(now) = instance.filter(|now| now.mod_revision != self.instance_revision) else { return false };
        let may = |instance: &record::Instance| instance.wanted && avoided(instance, node).is_none();
        let may = records::decode::<record::Instance>(now).is_ok_and(|instance| may(&instance));
        if self.item.recorded_token.is_none() || !may || self.rounds == ROUNDS_MAX {
            return false;
        }
        (self.instance_revision, self.rounds) = (now.mod_revision, self.rounds + 1);
        true
    }
}

impl<'a> Batch<'a> {
    /// Refuses what the view shows lost, before the store is asked. `Err` refuses all.
    pub(super) fn check(
        snapshot: &'a Snapshot,
        shares: &Shares,
        node: &'a str,
        request: &'a ClaimManyRequest,
    ) -> Result<Self, Refused> {
        check_session(snapshot, node, request)?;
        let (mut results, mut open) = (Vec::new(), Vec::new());
        let record = snapshot.nodes.get(node).map(|stored| &stored.value);
        let capacity = record.and_then(|record| record.capacity.as_ref()).map_or(0, |capacity| capacity.memory_bytes);
        let unclaimed = record.map_or(0, |record| snapshot.unclaimed_bytes(node, record));
        let mut free = capacity.saturating_sub(shares.claimed_bytes(node)).saturating_sub(unclaimed);
        for (place, item) in request.claims.iter().enumerate() {
            let mut result = ClaimResult { instance: item.instance.clone(), ..ClaimResult::default() };
            match check(snapshot, node, place, item, free) {
                Ok(one) => {
                    free = free.saturating_sub(item.memory_bytes.saturating_sub(counted(snapshot, node, item)));
                    open.push(one);
                }
                Err(why) => refuse(&mut result, why),
            }
            results.push(result);
        }
        Ok(Self { snapshot, node, request, results, open })
    }

    /// Whether each claim was made or refused.
    pub(super) fn is_settled(&self) -> bool {
        self.open.is_empty()
    }

    /// One for each claim of the request, in its order.
    pub(super) fn into_results(self) -> Vec<ClaimResult> {
        self.results
    }

    /// The claim transaction of what is open.
    pub(super) fn transaction(&self) -> Result<Txn, Refused> {
        let (Some(session), Some(schema)) = (self.snapshot.sessions.get(self.node), self.snapshot.schema.as_ref())
        else {
            return Err(refused(reason::SESSION_MOVED, "the view has changed meanwhile"));
        };
        let lease = session.value.lease;
        let bumped = record::Session { version: session.value.version + 1, ..session.value.clone() };
        let named = if mutant::on(mutant::name::SESSION_REVISION_RE_READ) {
            session.mod_revision
        } else {
            self.request.session_revision
        };
        let mut txn = Txn {
            compare: vec![
                Compare::ModRevision(keys::session(self.node), named),
                Compare::ModRevision(keys::SCHEMA.to_owned(), schema.mod_revision),
                Compare::ModRevision(keys::HALT.to_owned(), self.snapshot.halt.as_ref().map_or(0, |h| h.mod_revision)),
            ],
            then: vec![records::put(keys::session(self.node), &bumped, lease)],
            otherwise: vec![Op::Get(keys::session(self.node))],
        };
        if mutant::on(mutant::name::CLAIM_WITHOUT_SESSION_COMPARE) {
            txn.compare.remove(0);
        }
        for Open { item, instance_revision, revision, .. } in &self.open {
            let id = &item.instance;
            txn.compare.push(Compare::ModRevision(keys::instance(id), *instance_revision));
            if !mutant::on(mutant::name::CLAIM_WITHOUT_CREATE_COMPARE) {
                txn.compare.push(Compare::CreateRevision(keys::claim(id), 0));
            }
            if item.recorded_token.is_none() && !mutant::on(mutant::name::OFFER_SERVED_TWICE) {
                txn.compare.push(Compare::ModRevisionBelow(keys::taken(id), item.offer_revision));
            }
            let claim = record::Claim {
                node: self.node.to_owned(),
                session_id: self.request.session_id.clone(),
                nonce: item.nonce.clone(),
                memory_bytes: item.memory_bytes,
                gpus: vec![],
                revision: *revision,
                session_revision: self.request.session_revision,
                offer_revision: if item.recorded_token.is_none() { item.offer_revision } else { 0 },
                made_at: Some(clock::now()),
            };
            let taken = record::Taken { node: self.node.to_owned(), nonce: item.nonce.clone() };
            let leased = if mutant::on(mutant::name::CLAIM_WITHOUT_LEASE) { 0 } else { lease };
            txn.then.push(records::put(keys::claim(id), &claim, leased));
            txn.then.push(records::put(keys::taken(id), &taken, 0));
            txn.otherwise.extend([keys::claim(id), keys::instance(id), keys::taken(id)].map(Op::Get));
        }
        if mutant::on(mutant::name::CLAIM_BY_BLIND_PUT) {
            txn.compare.clear();
        }
        Ok(txn)
    }

    /// The transaction has made all that were open.
    pub(super) fn made(&mut self, token: Token) {
        for Open { place, spec, revision, .. } in self.open.drain(..) {
            let result = &mut self.results[place];
            (result.token, result.spec, result.revision) = (Some(token), Some(spec.clone()), revision);
        }
    }

    /// The transaction has failed: refuses those whose compares did not hold, as what it read shows. `Err` refuses all that
    /// are open.
    pub(super) fn lost(&mut self, reads: &[Vec<store::KeyValue>]) -> Result<(), Refused> {
        let read = |n: usize| reads.get(n).and_then(|r| r.first());
        if read(0).is_none_or(|s| s.mod_revision != self.request.session_revision) {
            let message = format!("the session of {} has moved on: resume it", self.node);
            return Err(refused(reason::SESSION_MOVED, message));
        }
        let mut kept = Vec::new();
        let before = self.open.len();
        let mut renewed = false;
        for (n, mut one) in self.open.drain(..).enumerate() {
            let [claim, instance, taken] = [1, 2, 3].map(|k| read(3 * n + k));
            renewed |= claim.is_none() && one.renew(self.node, instance);
            match why_lost(&one, claim, instance, taken) {
                Some(why) => refuse(&mut self.results[one.place], why),
                None => kept.push(one),
            }
        }
        if kept.len() == before && !renewed {
            // It concerns none of them alone.
            let why = "a halt was set or lifted, or the store was opened anew, meanwhile: ask again";
            kept.drain(..).for_each(|one| refuse(&mut self.results[one.place], refused(reason::OFFER_GONE, why)));
        }
        self.open = kept;
        Ok(())
    }
}

fn refuse(result: &mut ClaimResult, why: Refused) {
    (result.reason, result.message) = (why.reason.to_owned(), why.message);
}

fn check_session(snapshot: &Snapshot, node: &str, request: &ClaimManyRequest) -> Result<(), Refused> {
    use mutant::name::{CLAIM_BY_BLIND_PUT, CLAIM_WITHOUT_SESSION_COMPARE, SESSION_REVISION_RE_READ};
    let any = [CLAIM_WITHOUT_SESSION_COMPARE, CLAIM_BY_BLIND_PUT, SESSION_REVISION_RE_READ].into_iter().any(mutant::on);
    match snapshot.sessions.get(node).filter(|s| s.value.session_id == request.session_id) {
        None => Err(refused(reason::SESSION_MOVED, format!("{node} has no session {}: open one", request.session_id))),
        Some(s) if s.mod_revision != request.session_revision && !any => Err(refused(
            reason::SESSION_MOVED,
            format!("the session is at revision {}, the request names {}", s.mod_revision, request.session_revision),
        )),
        Some(_) => Ok(()),
    }
}

/// What can be told of one claim from the view: cheap refusals, and whether it fits into the `free` bytes that the node and
/// the claims before it in the call leave.
fn check<'a>(
    snapshot: &'a Snapshot,
    node: &str,
    place: usize,
    item: &'a ClaimItem,
    free: i64,
) -> Result<Open<'a>, Refused> {
    let id = &item.instance;
    let gone = |what: String| refused(reason::OFFER_GONE, what);
    let stored = snapshot
        .instances
        .get(id)
        .filter(|i| i.value.wanted)
        .ok_or_else(|| gone(format!("{id} is not wanted any more")))?;
    let again = item.recorded_token.is_some();
    if !again {
        let offer = stored.value.offer.as_ref().filter(|_| stored.mod_revision == item.offer_revision);
        let offer = offer.ok_or_else(|| gone(format!("the offer of {id} was replaced")))?;
        if !offer.candidates.iter().any(|c| c == node) {
            return Err(gone(format!("{id} was not offered to {node}")));
        }
        if offer.deadline.as_ref().map_or(0, clock::millis) < clock::now_ms() {
            return Err(gone(format!("the offer of {id} has run out")));
        }
    }
    if let Some(claim) = snapshot.claims.get(id)
        && !mutant::on(mutant::name::CLAIM_WITHOUT_CREATE_COMPARE)
    {
        return Err(refused(reason::ALREADY_CLAIMED, format!("{id} is owned by {}", claim.value.node)));
    }
    if again && let Some(why) = avoided(&stored.value, node) {
        return Err(refused(reason::AVOIDED, format!("{id} is not to be claimed by {node} yet: {why}")));
    }
    if snapshot.halted() && !(again && snapshot.halt.as_ref().is_some_and(|h| h.value.level == "claims")) {
        return Err(refused(reason::HALTED, "claiming is halted"));
    }
    if !(0..=limits::MEMORY_BYTES_MAX).contains(&item.memory_bytes) {
        let (bytes, max) = (item.memory_bytes, limits::MEMORY_BYTES_MAX);
        return Err(refused(reason::INVALID_FIELD, format!("memory_bytes = {bytes} is not allowed: use 0 to {max}")));
    }
    if !again && free < item.memory_bytes {
        let message = format!("{node} has {free} bytes of memory left, {} are needed", item.memory_bytes);
        return Err(refused(reason::NO_CAPACITY, message));
    }
    let revision = stored.value.revision;
    let spec = snapshot
        .spec_of(&stored.value)
        .ok_or_else(|| gone(format!("revision {revision} of {} is gone", stored.value.deployment)))?;
    Ok(Open { place, item, instance_revision: stored.mod_revision, rounds: 0, spec, revision })
}

/// Why a node may not claim an instance again yet, if it may not: it had claimed it in vain. Its offer names it when it may.
fn avoided(instance: &record::Instance, node: &str) -> Option<String> {
    let avoid = avoid::in_force(instance, node, clock::now_ms())?;
    let until = avoid.until.map(|until| until.to_string()).unwrap_or_default();
    let why = || format!("it is avoided until {until} ({})", avoid.why);
    (!mutant::on(mutant::name::AVOIDED_CLAIMS_AGAIN)).then(why)
}

/// Memory of a run to be claimed again that counts as reserved already, in bytes.
fn counted(snapshot: &Snapshot, node: &str, item: &ClaimItem) -> i64 {
    let unclaimed = snapshot.nodes.get(node).into_iter().flat_map(|node| &node.value.unclaimed);
    let counted = unclaimed.filter(|run| item.recorded_token.is_some() && run.instance == item.instance);
    counted.map(|run| run.memory_bytes).fold(0, i64::saturating_add)
}

/// Which of a claim's own compares did not hold, if one did not.
fn why_lost(
    one: &Open<'_>,
    claim: Option<&store::KeyValue>,
    instance: Option<&store::KeyValue>,
    taken: Option<&store::KeyValue>,
) -> Option<Refused> {
    let id = &one.item.instance;
    if let Some(claim) = claim {
        let owner = records::decode::<record::Claim>(claim).map(|c| c.node).unwrap_or_default();
        return Some(refused(reason::ALREADY_CLAIMED, format!("{id} is owned by {owner}")));
    }
    if instance.is_none_or(|i| i.mod_revision != one.instance_revision) {
        return Some(refused(reason::OFFER_GONE, format!("the offer of {id} was replaced or withdrawn")));
    }
    let served = one.item.recorded_token.is_none() && taken.is_some_and(|t| t.mod_revision >= one.item.offer_revision);
    served.then(|| refused(reason::OFFER_GONE, format!("the offer of {id} has been used")))
}
