//! PURE: the invariants of claiming, judged from the store's own history, from what nodes were told and from what hosts did.
//!
//! One implementation for everybody who wants to know: the simulation gives it everything, a test over real parts gives it
//! the store's history. No I/O, no clock but an argument. S is the state directly before a revision R; "in R" are the changes
//! of that revision, which one transaction has made. [`Rule`] says what each rule demands.
//!
//! Must never: know why a transaction was made. What looks right in the history is right.

mod claims;
mod effects;
mod history;
mod hosts;
mod rule;
mod told;

#[cfg(test)]
mod tests;

pub use hosts::{HostEvent, Process};
pub use rule::{Rule, Violation};
pub use told::Said;

use crate::{
    plan::snapshot::{Snapshot, Stored},
    store::{Changes, Listing, keys, records},
};
use drover_proto::{store::v1 as record, v1::Token};
use history::{Made, Transaction};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

/// Violations that are kept in words; all are counted.
const KEPT_MAX: usize = 100;
/// Claims of the past that are remembered for what comes late.
const CLAIMS_MAX: usize = 10_000;
/// States of the past that are remembered, where orders are judged.
const STATES_MAX: usize = 1024;

/// How exactly time may be judged.
#[derive(Debug, Clone, Copy, Default)]
pub struct Settings {
    /// Time that a node is given to come back, in milliseconds.
    pub grace_ms: i64,
    /// Longest lag of a view and difference of clocks that is not held against anybody, in milliseconds.
    pub slack_ms: i64,
    /// Remember states of the past, to judge orders by the revision that they name.
    pub orders: bool,
}

/// Judges.
#[derive(Debug, Default)]
pub struct Checker {
    settings: Settings,
    /// S, then the state after it.
    state: Snapshot,
    /// How many instances of a deployment's revision are wanted.
    wanted: BTreeMap<(String, u64), usize>,
    /// Memory that claims reserve.
    reserved: history::Reserved,
    /// Largest capacity that a node has named since its session was opened, in bytes.
    capacities: BTreeMap<String, i64>,
    /// Sessions of nodes in which it was seen what runs there: the id of the last one, by node.
    told_inventory: BTreeMap<String, String>,
    /// Claims by instance and token, and in the order in which they were made.
    made: BTreeMap<(String, Token), Made>,
    order: VecDeque<(String, Token)>,
    /// States after revisions of the past.
    past: VecDeque<Snapshot>,
    /// Hellos that were delivered and not answered, by node and stream: the session that each named, the store's revision then,
    /// and the id of the session that stood.
    hellos: BTreeMap<(String, u64), told::Hello>,
    /// Session revisions that nodes were welcomed with.
    welcomed: BTreeSet<(String, i64)>,
    /// Renewals of a node's session less what asked for one.
    renewals: BTreeMap<String, i64>,
    hosts: hosts::Hosts,
    violations: Vec<Violation>,
    counts: BTreeMap<Rule, u64>,
}

impl Checker {
    /// Judges nothing yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }

    /// Takes the store as it is, without a verdict: to begin with, and after a gap in the history.
    pub fn begin(&mut self, listing: &Listing) {
        let items = listing.items.iter().filter(|kv| is_judged(&kv.key)).cloned().collect();
        self.state = records::snapshot(&Listing { items, revision: listing.revision }).0;
        for name in self.state.nodes.keys().cloned().collect::<Vec<_>>() {
            self.state.nodes.get_mut(&name).map(without_models);
        }
        self.capacities.clear();
        // What a session that stands has said before is not known.
        let sessions = self.state.sessions.iter();
        self.told_inventory = sessions.map(|(node, s)| (node.clone(), s.value.session_id.clone())).collect();
        self.wanted.clear();
        for instance in self.state.instances.values().map(|i| &i.value).filter(|i| i.wanted) {
            *self.wanted.entry((instance.deployment.clone(), instance.revision)).or_default() += 1;
        }
        self.reserved = history::Reserved::of(&self.state);
        let standing: Vec<_> = self.state.claims.iter().map(|(id, claim)| (id.clone(), claim.clone())).collect();
        for (id, claim) in standing {
            let token = Token { generation: self.state.generation(), revision: claim.mod_revision };
            self.remember(id, token, &claim.value);
        }
    }

    /// Takes the store as it is after it was set back to a copy: its revisions come again, and what was true of sessions and
    /// claims is not. Tokens of before are remembered.
    pub fn restored(&mut self, at_ms: i64, listing: &Listing) {
        let highest = self.made.keys().map(|(_, token)| token.generation).fold(self.state.generation(), u64::max);
        self.made.values_mut().filter(|made| made.gone.is_none()).for_each(|made| made.gone = Some((at_ms, false)));
        self.begin(listing);
        self.hellos.clear();
        self.welcomed.clear();
        self.past.clear();
        let (generation, sessions, claims) =
            (self.state.generation(), self.state.sessions.len(), self.state.claims.len());
        if generation <= highest || sessions + claims > 0 {
            let message =
                format!("generation {generation} after {highest}, {sessions} sessions and {claims} claims are left");
            self.violation(Rule::RestoredAsItWas, listing.revision, at_ms, "store".to_owned(), message);
        }
    }

    /// Takes changes of the history, in their order; `at_ms` is when they were made, in milliseconds since the epoch.
    pub fn store(&mut self, at_ms: i64, changes: &Changes) {
        for transaction in Transaction::split(changes) {
            self.count_wanted(&transaction);
            self.judge(at_ms, &transaction);
            for change in transaction.changes.iter().filter(|change| is_judged(change.key())) {
                // What can't be decoded is the business of whoever reads it.
                let _ = records::apply(&mut self.state, change);
                if let Some(node) = change.key().strip_prefix(keys::NODES)
                    && let Some(stored) = self.state.nodes.get_mut(node)
                {
                    without_models(stored);
                }
            }
            self.state.revision = transaction.revision;
            self.after(at_ms, &transaction);
        }
        self.state.revision = self.state.revision.max(changes.revision);
    }

    fn judge(&mut self, at_ms: i64, transaction: &Transaction) {
        for (rule, object, message) in
            claims::judge(self, transaction).into_iter().chain(effects::judge(self, at_ms, transaction))
        {
            self.violation(rule, transaction.revision, at_ms, object, message);
        }
    }

    fn after(&mut self, at_ms: i64, transaction: &Transaction) {
        self.follow(at_ms, transaction);
        if self.settings.orders {
            self.past.push_back(self.state.clone());
            if self.past.len() > STATES_MAX {
                self.past.pop_front();
            }
        }
    }

    fn violation(&mut self, rule: Rule, revision: i64, at_ms: i64, object: String, message: String) {
        *self.counts.entry(rule).or_default() += 1;
        if self.violations.len() < KEPT_MAX {
            self.violations.push(Violation { rule, revision, at_ms, object, message });
        }
    }

    /// Forgets what other rules were broken: for a part of the world on its own, where they say nothing.
    pub fn forget_all_but(&mut self, rule: Rule) {
        self.violations.retain(|violation| violation.rule == rule);
        self.counts.retain(|broken, _| *broken == rule);
    }

    /// The state after all that was taken.
    #[must_use]
    pub fn state(&self) -> &Snapshot {
        &self.state
    }

    /// The first violations, in order.
    #[must_use]
    pub fn violations(&self) -> &[Violation] {
        &self.violations
    }

    /// How many there were, by rule.
    #[must_use]
    pub fn counts(&self) -> &BTreeMap<Rule, u64> {
        &self.counts
    }
}

/// Whether a key is one that a rule looks at: of the others nothing is kept.
fn is_judged(key: &str) -> bool {
    const NOT: [&str; 4] = [keys::EVENTS, keys::UNPLACED, keys::COMMANDS, keys::ANSWERS];
    !NOT.iter().any(|prefix| key.starts_with(prefix))
}

/// The list of model files is most of a node's record, and no rule looks at it.
fn without_models(node: &mut Arc<Stored<record::Node>>) {
    Arc::make_mut(node).value.models = None;
}
