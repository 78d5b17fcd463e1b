//! PURE. What a node is to be told, from a snapshot and what it was told before. Level-triggered: the whole set of claims
//! is sent when it differs from the last one sent.

use super::shares::Shares;
use crate::{
    control::mutant,
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
use std::collections::{BTreeMap, BTreeSet};

/// Time that an offer's best candidate has before the others are told, in milliseconds: placement is meant, and a few
/// round trips of the best node are worth waiting for.
const HEAD_START_MS: i64 = 250;

/// What became of an offer on this stream.
#[derive(Debug, Default)]
struct Seen {
    revision: i64,
    /// When it was first seen, by this coordinator's clock.
    first_ms: i64,
    sent: bool,
}

/// Memory of one session's stream.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    claims: Option<(Vec<OwnedClaim>, Vec<EndRun>, i64)>,
    /// The last offer seen, by instance.
    offers: BTreeMap<String, Seen>,
    /// Runs that the node has on record, as it said last.
    runs: Vec<RecordedRun>,
    /// Commands that were sent on this stream and still stand.
    commands: BTreeSet<String>,
}

impl Outbox {
    pub(super) fn new(runs: Vec<RecordedRun>) -> Self {
        Self { runs, ..Self::default() }
    }

    /// The node has said anew what runs on it.
    pub(super) fn set_runs(&mut self, runs: Vec<RecordedRun>) {
        self.runs = runs;
    }

    /// The set of claims, whether or not it has changed; remembered as sent.
    pub(super) fn claim_set(&mut self, snapshot: &Snapshot, shares: &Shares, node: &str) -> ClaimSet {
        let set = claim_set(snapshot, shares, node, &self.runs);
        self.claims = Some((set.claims.clone(), set.end_runs.clone(), set.session_revision));
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
        let mut again = None;
        let mut messages = Vec::new();
        let set = claim_set(snapshot, shares, node, &self.runs);
        let told = self.claims.as_ref().is_some_and(|(claims, ends, revision)| {
            *claims == set.claims && *ends == set.end_runs && *revision == set.session_revision
        });
        if !told {
            self.claims = Some((set.claims.clone(), set.end_runs.clone(), set.session_revision));
            messages.push(Message::Claims(set));
        }
        self.offers.retain(|id, _| snapshot.instances.contains_key(id));
        for (offer, rank) in offers(snapshot, shares, node, now_ms) {
            let seen = self.offers.entry(offer.instance.clone()).or_default();
            if seen.revision != offer.offer_revision {
                *seen = Seen { revision: offer.offer_revision, first_ms: now_ms, sent: false };
            }
            let not_before_ms = seen.first_ms + if rank == 0 { 0 } else { HEAD_START_MS };
            if seen.sent {
                continue;
            }
            if not_before_ms > now_ms {
                again = Some(again.map_or(not_before_ms, |at: i64| at.min(not_before_ms)));
                continue;
            }
            seen.sent = true;
            messages.push(Message::Offer(offer));
        }
        self.commands.retain(|key| snapshot.commands.contains_key(key));
        for (key, asked) in snapshot.commands_to(node) {
            if let (Some(command), true) = (&asked.command, self.commands.insert(key.clone())) {
                messages.push(Message::Command(command.clone()));
            }
        }
        (messages.into_iter().map(|message| SessionResponse { message: Some(message) }).collect(), again)
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
    let owned = shares.claims(node).iter().filter_map(|id| Some((id, snapshot.claims.get(id)?)));
    let claims = owned.map(|(id, claim)| {
        let instance = snapshot.instances.get(id);
        OwnedClaim {
            instance: id.clone(),
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

/// Offers to this node that still stand and have not been used, each with the node's rank among the candidates.
fn offers(snapshot: &Snapshot, shares: &Shares, node: &str, now_ms: i64) -> impl Iterator<Item = (Offer, usize)> {
    shares.offers(node).iter().filter_map(move |id| {
        let instance = snapshot.instances.get(id)?;
        let offer = snapshot.standing_offer(id, instance, now_ms)?;
        let rank = offer.candidates.iter().position(|c| c == node)?;
        let spec = snapshot.spec_of(&instance.value)?.clone();
        let told = Offer {
            instance: id.clone(),
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
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{control::clock, plan::snapshot::Stored};
    use drover_proto::{store::v1 as record, v1::DeploymentSpec};
    use std::sync::Arc;

    const NOW: i64 = 1_000_000;

    fn stored<T>(value: T, mod_revision: i64) -> Arc<Stored<T>> {
        Arc::new(Stored { value, create_revision: 1, mod_revision })
    }

    fn offered(revision: i64) -> Snapshot {
        let mut snapshot = Snapshot::default();
        let spec = Some(DeploymentSpec { name: "m".to_owned(), ..DeploymentSpec::default() });
        snapshot.revisions.insert(format!("m/{:020}", 1), stored(record::Revision { spec, created_at: None }, 1));
        let offer = record::Offer {
            candidates: vec!["a".to_owned(), "b".to_owned()],
            deadline: Some(clock::timestamp(NOW + 5000)),
            halt_generation: 0,
        };
        let instance = record::Instance {
            deployment: "m".to_owned(),
            revision: 1,
            wanted: true,
            offer: Some(offer),
            ..record::Instance::default()
        };
        snapshot.instances.insert("m-222222".to_owned(), stored(instance, revision));
        snapshot
    }

    fn offers_in(messages: &[SessionResponse]) -> usize {
        messages.iter().filter(|m| matches!(m.message, Some(Message::Offer(_)))).count()
    }

    #[test]
    fn the_best_candidate_has_a_head_start_and_each_offer_is_sent_once() {
        let snapshot = offered(7);
        let (mut best, mut other) = (Outbox::new(vec![]), Outbox::new(vec![]));
        assert_eq!(offers_in(&best.due(&snapshot, &Shares::of(&snapshot), "a", NOW).0), 1);
        assert_eq!(offers_in(&best.due(&snapshot, &Shares::of(&snapshot), "a", NOW + 1).0), 0);
        let (messages, again) = other.due(&snapshot, &Shares::of(&snapshot), "b", NOW);
        assert_eq!((offers_in(&messages), again), (0, Some(NOW + HEAD_START_MS)));
        let (messages, again) = other.due(&snapshot, &Shares::of(&snapshot), "b", NOW + HEAD_START_MS);
        assert_eq!((offers_in(&messages), again), (1, None));
        assert_eq!(
            offers_in(&Outbox::new(vec![]).due(&snapshot, &Shares::of(&snapshot), "c", NOW).0),
            0,
            "it names a and b"
        );
        assert_eq!(offers_in(&best.due(&offered(9), &Shares::of(&offered(9)), "a", NOW).0), 1, "another offer");
    }

    #[test]
    fn a_run_is_ended_only_when_superseded_by_a_ready_one_or_wanted_no_more() {
        let run = RecordedRun {
            instance: "m-222222".to_owned(),
            token: Some(Token { generation: 1, revision: 5 }),
            alive: true,
            memory_bytes: 1,
            ..RecordedRun::default()
        };
        let ends =
            |snapshot: &Snapshot| claim_set(snapshot, &Shares::of(snapshot), "a", std::slice::from_ref(&run)).end_runs;
        let mut snapshot = offered(7);
        snapshot.schema =
            Some(stored(record::Schema { generation: 1, format: 1, oldest_writer: 1, ..record::Schema::default() }, 1));
        assert_eq!(ends(&snapshot), [], "wanted, and nobody else has it");
        let claim = record::Claim { node: "b".to_owned(), ..record::Claim::default() };
        snapshot.claims.insert("m-222222".to_owned(), stored(claim, 9));
        assert_eq!(ends(&snapshot), [], "another owner, not ready yet");
        let token = Token { generation: 1, revision: 9 };
        let status =
            record::Status { token: Some(token), state: InstanceState::Ready.into(), ..record::Status::default() };
        let mut unwanted = snapshot.clone();
        let instance = record::Instance { wanted: false, ..snapshot.instances["m-222222"].value.clone() };
        unwanted.instances.insert("m-222222".to_owned(), stored(instance, 10));
        assert_eq!(
            ends(&unwanted),
            [EndRun { instance: "m-222222".to_owned(), yields_to: None }],
            "wanted no more: the owner need not be ready first"
        );
        snapshot.statuses.insert("m-222222".to_owned(), stored(status, 10));
        assert_eq!(ends(&snapshot), [EndRun { instance: "m-222222".to_owned(), yields_to: Some(token) }]);
        snapshot.claims.clear();
        assert_eq!(
            ends(&snapshot),
            [],
            "the claim that it was to yield to has vanished: what was said under it is nothing"
        );
        snapshot.instances.clear();
        assert_eq!(ends(&snapshot), [EndRun { instance: "m-222222".to_owned(), yields_to: None }]);
    }

    #[test]
    fn what_the_store_never_knew_or_can_not_read_is_not_ended() {
        let run = |generation, revision| RecordedRun {
            instance: "m-222222".to_owned(),
            token: Some(Token { generation, revision }),
            alive: true,
            memory_bytes: 1,
            ..RecordedRun::default()
        };
        let ends = |snapshot: &Snapshot, run: RecordedRun| {
            !claim_set(snapshot, &Shares::of(snapshot), "a", &[run]).end_runs.is_empty()
        };
        let mut snapshot = Snapshot { revision: 90, ..Snapshot::default() };
        let schema = record::Schema { generation: 2, ..record::Schema::default() };
        let begun_at =
            |revision| Some(Arc::new(Stored { value: schema.clone(), create_revision: revision, mod_revision: 70 }));
        snapshot.schema = begun_at(1);
        assert!(ends(&snapshot, run(2, 50)), "it was claimed here, and is gone since");
        assert!(!ends(&snapshot, run(1, 50)), "it was claimed before a restore");
        assert!(!ends(&snapshot, run(3, 50)), "it was claimed in a store that is newer");
        snapshot.schema = begun_at(60);
        assert!(!ends(&snapshot, run(2, 50)), "it was claimed before this store was begun");
        snapshot.schema = begun_at(1);
        snapshot.unreadable.insert("instances/m-222222".to_owned());
        assert!(!ends(&snapshot, run(2, 50)), "its record is there");
        // Of one that is owned nobody has said that it is to stop.
        let claim = record::Claim { node: "a".to_owned(), ..record::Claim::default() };
        snapshot.claims.insert("m-222222".to_owned(), stored(claim, 50));
        let wanted = |snapshot: &Snapshot| claim_set(snapshot, &Shares::of(snapshot), "a", &[]).claims[0].wanted;
        assert!(wanted(&snapshot));
        snapshot.unreadable.clear();
        assert!(!wanted(&snapshot));
    }

    #[test]
    fn every_node_of_a_large_fleet_is_told_about_a_change_in_time() {
        let mut snapshot = offered(7);
        for n in 0..10_000 {
            let id = format!("z-{n:06}");
            let instance = snapshot.instances["m-222222"].as_ref().clone();
            snapshot.instances.insert(id.clone(), Arc::new(instance));
            let claim = record::Claim { node: format!("n{}", n % 1000), ..record::Claim::default() };
            snapshot.claims.insert(id, stored(claim, 9));
        }
        #[allow(clippy::disallowed_methods)] // measured is what it really takes
        let begun = std::time::Instant::now();
        let shares = Shares::of(&snapshot);
        let told: usize = (0..1000)
            .map(|n| Outbox::new(vec![]).due(&snapshot, &shares, &format!("n{n}"), NOW).0)
            .map(|messages| match &messages[..] {
                [SessionResponse { message: Some(Message::Claims(set)) }] => set.claims.len(),
                other => panic!("{other:?}"),
            })
            .sum();
        let took = begun.elapsed();
        println!("1000 nodes that own 10,000 were told in {took:?}");
        assert!(took.as_millis() < 1500, "{took:?}: looking through all claims for every node took 3.9 s");
        assert_eq!(told, 10_000);
    }

    #[test]
    fn a_command_is_told_once_on_a_stream_and_only_to_its_node() {
        let mut snapshot = Snapshot::default();
        let asked = |id: &str| {
            let command = Some(drover_proto::v1::NodeCommand { id: id.to_owned(), command: None });
            stored(record::Command { command, lease: 1 }, 3)
        };
        snapshot.commands.insert("a/1".to_owned(), asked("1"));
        snapshot.commands.insert("ab/2".to_owned(), asked("2"));
        let mut outbox = Outbox::new(vec![]);
        let mut told = |snapshot: &Snapshot| {
            let (due, _) = outbox.due(snapshot, &Shares::of(snapshot), "a", NOW);
            let ids = due.into_iter().filter_map(|m| match m.message {
                Some(Message::Command(command)) => Some(command.id),
                _ => None,
            });
            ids.collect::<Vec<_>>()
        };
        assert_eq!(told(&snapshot), ["1"]);
        assert!(told(&snapshot).is_empty());
        assert_eq!(
            Outbox::new(vec![]).due(&snapshot, &Shares::of(&snapshot), "b", NOW).0.len(),
            1,
            "the set of claims"
        );
    }
}
