//! For how long the leader has seen things as they are, by a clock that only goes forward. A new leader begins anew: whatever
//! is waited for then takes longer after a change of leader, never shorter.

mod held;

use super::mutant;
use crate::plan::{Freeze, Held, Replacements, snapshot::Snapshot};
use std::collections::BTreeMap;
use tokio::time::Instant;

/// How many replacements may begin at once, and how many a second on the average: instances of one lost host are all claimed
/// elsewhere at once, those of many hosts one after the other.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// At once.
    pub burst: u32,
    /// A second.
    pub per_s: u32,
}

/// What is left of a rate.
#[derive(Debug)]
struct Budget {
    left: f64,
    at: Instant,
}

/// What a term remembers from one plan to the next.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Instances that were owned and have no claim: revision of the last claim, and since when that is gone.
    unclaimed: BTreeMap<String, (i64, Instant)>,
    /// Nodes with a session: the revision that made it, and since when it is there. Not its id: an agent whose session ran out
    /// before it was told of it asks for another by the same id.
    joined: BTreeMap<String, (i64, Instant)>,
    /// The standing claims.
    held: held::Claims,
    budget: Option<Budget>,
    /// Whether replacement is frozen, as was seen last.
    pub(super) frozen: bool,
    /// When that was over, unless an operator has ended it: nodes that come back do not come all in one moment.
    thawed: Option<Instant>,
}

/// Durations for a plan, in milliseconds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Durations {
    /// For how long this coordinator has led, seen the store without a break, and not found too many nodes lost.
    pub(super) settled_ms: i64,
    /// For how long each instance that was owned has been without a claim.
    pub(super) unclaimed_ms: BTreeMap<String, i64>,
    /// For how long each node has had its present session.
    pub(super) joined_ms: BTreeMap<String, i64>,
    /// For how long each standing claim has been as it is.
    pub(super) held: BTreeMap<String, Held>,
}

impl Seen {
    /// How many replacements may begin now.
    pub(super) fn replacements(&mut self, rate: Rate) -> Replacements {
        if mutant::on(mutant::name::NO_RATE_LIMIT) {
            return Replacements::UNLIMITED;
        }
        let (now, burst, per_s) = (Instant::now(), f64::from(rate.burst), f64::from(rate.per_s.max(1)));
        let budget = self.budget.get_or_insert(Budget { left: burst, at: now });
        budget.left = (budget.left + per_s * now.duration_since(budget.at).as_secs_f64()).min(burst);
        budget.at = now;
        // Between nothing and the burst, which is a u32.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let (now, next_in_ms) = (budget.left as usize, ((1.0 - budget.left.fract()) * 1000.0 / per_s).ceil() as i64);
        Replacements { now, next_in_ms }
    }

    /// So many have begun.
    pub(super) fn replaced(&mut self, count: usize) {
        if let Some(budget) = &mut self.budget {
            budget.left = (budget.left - count as f64).max(0.0);
        }
    }

    /// Looks at a snapshot, and at how many nodes are lost by it. `live_since` is when the view was last mended; `None` while it
    /// is broken.
    pub(super) fn note(
        &mut self,
        snapshot: &Snapshot,
        leading_since: Instant,
        live_since: Option<Instant>,
        freeze: Freeze,
    ) -> Durations {
        let now = Instant::now();
        let thaws = std::mem::replace(&mut self.frozen, freeze.frozen()) && !freeze.over;
        if freeze.frozen() || thaws {
            self.thawed = Some(now);
        } else if freeze.over {
            self.thawed = None;
        }
        let settled_since = self.thawed.map_or(leading_since, |thawed| thawed.max(leading_since));
        let orphaned = |id: &str| snapshot.instances.contains_key(id) && !snapshot.claims.contains_key(id);
        let last_claim = |id: &str| snapshot.taken.get(id).filter(|_| orphaned(id)).map(|taken| taken.mod_revision);
        // A claim that was made and lost between two snapshots is another one: its node's time begins anew.
        self.unclaimed.retain(|id, (revision, _)| last_claim(id) == Some(*revision));
        for id in snapshot.instances.keys() {
            if let Some(revision) = last_claim(id) {
                self.unclaimed.entry(id.clone()).or_insert((revision, now));
            }
        }
        let made = |node: &str| snapshot.sessions.get(node).map(|session| session.create_revision);
        self.joined.retain(|node, (revision, _)| made(node) == Some(*revision));
        for (node, session) in &snapshot.sessions {
            self.joined.entry(node.clone()).or_insert((session.create_revision, now));
        }
        let ms = |since: Instant| i64::try_from(now.duration_since(since).as_millis()).unwrap_or(i64::MAX);
        let mut settled_ms = live_since.map_or(0, |live| ms(live.max(settled_since)));
        let mut unclaimed_ms: BTreeMap<_, _> =
            self.unclaimed.iter().map(|(id, (_, since))| (id.clone(), ms(*since))).collect();
        let mut joined_ms: BTreeMap<_, _> =
            self.joined.iter().map(|(node, (_, since))| (node.clone(), ms(*since))).collect();
        if mutant::on(mutant::name::OFFERS_BEFORE_INVENTORY) {
            joined_ms.values_mut().for_each(|ms| *ms = i64::MAX);
        }
        if mutant::on(mutant::name::NO_GRACE_PERIOD) {
            settled_ms = i64::MAX;
            unclaimed_ms.values_mut().for_each(|ms| *ms = i64::MAX);
        }
        let mut held = self.held.note(snapshot, live_since, now);
        if mutant::on(mutant::name::NOTHING_IS_GIVEN_UP) {
            held.clear();
        }
        Durations { settled_ms, unclaimed_ms, joined_ms, held }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::snapshot::Stored;
    use drover_proto::store::v1 as record;
    use std::{sync::Arc, time::Duration};

    const CALM: Freeze = Freeze { lost: 0, seen: 3, over: false, override_until_ms: 0 };

    fn stored<T>(value: T, mod_revision: i64) -> Arc<Stored<T>> {
        Arc::new(Stored { value, create_revision: mod_revision, mod_revision })
    }

    fn lost(revision: i64) -> Snapshot {
        let mut snapshot = Snapshot::default();
        snapshot.instances.insert("m-222222".to_owned(), stored(record::Instance::default(), 1));
        snapshot.taken.insert("m-222222".to_owned(), stored(record::Taken::default(), revision));
        snapshot
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_made_and_lost_between_two_looks_gives_its_node_its_time_anew() {
        let (mut seen, begun) = (Seen::default(), Instant::now());
        let mut note = |snapshot: &Snapshot| seen.note(snapshot, begun, Some(begun), CALM).unclaimed_ms;
        assert_eq!(note(&lost(5)), BTreeMap::from([("m-222222".to_owned(), 0)]));
        tokio::time::advance(Duration::from_millis(700)).await;
        assert_eq!(note(&lost(5)), BTreeMap::from([("m-222222".to_owned(), 700)]));
        assert_eq!(note(&lost(9)), BTreeMap::from([("m-222222".to_owned(), 0)]));
        let mut owned = lost(9);
        owned.claims.insert("m-222222".to_owned(), stored(record::Claim::default(), 9));
        assert!(note(&owned).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_opens_another_session_has_joined_anew_whatever_its_id_is() {
        let (mut seen, begun) = (Seen::default(), Instant::now());
        let mut joined = |create_revision, mod_revision| {
            let mut snapshot = Snapshot::default();
            let value = record::Session { session_id: "one".to_owned(), ..record::Session::default() };
            let session = Stored { value, create_revision, mod_revision };
            snapshot.sessions.insert("a".to_owned(), Arc::new(session));
            seen.note(&snapshot, begun, Some(begun), CALM).joined_ms["a"]
        };
        assert_eq!(joined(5, 5), 0);
        tokio::time::advance(Duration::from_millis(300)).await;
        assert_eq!((joined(5, 7), joined(9, 9)), (300, 0), "by the same id, after the first has run out");
    }

    #[tokio::test(start_paused = true)]
    async fn replacements_begin_in_a_burst_and_then_at_a_rate() {
        let (mut seen, rate) = (Seen::default(), Rate { burst: 50, per_s: 10 });
        assert_eq!(seen.replacements(rate).now, 50);
        seen.replaced(50);
        assert_eq!(seen.replacements(rate), Replacements { now: 0, next_in_ms: 100 });
        let mut begun = 0;
        for _ in 0..30 {
            tokio::time::advance(Duration::from_millis(100)).await;
            let now = seen.replacements(rate).now;
            seen.replaced(now);
            begun += now;
        }
        assert!((29..=30).contains(&begun), "{begun} in 3 s");
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(seen.replacements(rate).now, 50, "what was not used is no reserve beyond the burst");
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_freeze_the_nodes_that_come_back_later_than_the_first_have_their_time_too() {
        let (mut seen, begun) = (Seen::default(), Instant::now());
        let mut settled = |lost, override_until_ms| {
            let freeze = Freeze { lost, seen: 3, over: lost > 1, override_until_ms };
            seen.note(&Snapshot::default(), begun, Some(begun), freeze).settled_ms
        };
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!((settled(1, 0), settled(2, 0)), (60_000, 0));
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_eq!(settled(1, 0), 0, "one is back: one more may be in a moment");
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(settled(1, 0), 3000);
        assert_eq!(settled(2, 0), 0);
        assert_eq!(settled(2, 1), 93_000, "an operator says that they are gone");
        assert_eq!(settled(1, 0), 93_000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_break_in_the_view_begins_the_grace_period_anew_and_while_it_lasts_nothing_is_settled() {
        let (mut seen, leading) = (Seen::default(), Instant::now());
        tokio::time::advance(Duration::from_secs(60)).await;
        let mut settled = |live| seen.note(&Snapshot::default(), leading, live, CALM).settled_ms;
        assert_eq!(settled(Some(leading)), 60_000);
        assert_eq!(settled(None), 0);
        let mended = Instant::now();
        tokio::time::advance(Duration::from_secs(4)).await;
        assert_eq!(settled(Some(mended)), 4000);
        // The view was there before this coordinator led.
        let mut fresh = Seen::default();
        assert_eq!(fresh.note(&Snapshot::default(), mended, Some(leading), CALM).settled_ms, 4000);
    }
}
