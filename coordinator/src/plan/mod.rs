//! PURE: snapshot → plan. No I/O, no clock but an argument, no randomness but a seed. See README.md beside this file.
//!
//! Owns the decisions: which instances must exist, who may claim them, which must stop, what is to be collected.
//! A plan is a value; carrying it out decides nothing.

pub mod avoid;
mod freeze;
mod holders;
mod place;
mod progress;
mod rules;
pub mod snapshot;
#[cfg(test)]
mod tests;

pub use freeze::Freeze;
pub(crate) use place::names_file;
pub use progress::Held;
pub use rules::plan;

use drover_proto::store::v1 as record;
use snapshot::{Snapshot, millis};
use std::collections::BTreeMap;

/// How far the clocks of two coordinators may be apart, in milliseconds.
const CLOCK_SKEW_MS: i64 = 5000;

/// Settings of planning.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Most candidates that an offer names.
    pub candidates: usize,
    /// Time from an offer to its deadline, in milliseconds.
    pub offer_deadline_ms: i64,
    /// Time that a node is given to come back for what it owned, in milliseconds: the time to live of a session.
    pub grace_ms: i64,
    /// Revisions of a spec that are kept.
    pub revisions_kept: usize,
    /// Share of the nodes seen in the last hour that may be lost before nothing is replaced any more, in percent.
    pub freeze_share_percent: u32,
    /// Time without progress after which a claim of what is not ready is given up, in milliseconds. A loading model has what
    /// its deployment allows for besides.
    pub progress_deadline_ms: i64,
    /// Time after its first failure in which what was claimed has to become ready, in milliseconds: after that the claim is
    /// given up, if another node can take it.
    pub give_up_after_ms: i64,
    /// How long a node is avoided for what it had claimed and got nowhere with.
    pub avoid: avoid::Delays,
}

/// What a plan is made from.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// The store.
    pub snapshot: &'a Snapshot,
    /// Now, in milliseconds since the epoch: for the deadlines of offers alone, which are written into the store. A wall clock
    /// steps; everything else is counted by one that does not.
    pub now_ms: i64,
    /// For how long this coordinator has led, seen the store without a break, and not found too many nodes lost, in milliseconds.
    pub settled_for_ms: i64,
    /// For how long each instance that was claimed before has been seen without a claim, in milliseconds.
    pub unclaimed_for_ms: &'a BTreeMap<String, i64>,
    /// For how long each node has had its present session, in milliseconds.
    pub joined_for_ms: &'a BTreeMap<String, i64>,
    /// For how long each standing claim has been as it is.
    pub held_for: &'a BTreeMap<String, Held>,
    /// Instances that were owned which may be offered now to others, and when the next one may be, in milliseconds: whatever
    /// goes wrong, it goes wrong slowly.
    pub replacements: Replacements,
    /// Source of ids and of the order among equals.
    pub seed: u64,
    /// Settings.
    pub settings: &'a Settings,
}

/// How many replacements may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replacements {
    /// Now.
    pub now: usize,
    /// Time until there is room for another one, in milliseconds.
    pub next_in_ms: i64,
}

impl Replacements {
    /// As many as there are.
    pub const UNLIMITED: Self = Self { now: usize::MAX, next_in_ms: 0 };
}

impl Input<'_> {
    /// Whether the grace period is over: before, what has no claim may be claimed again by whoever still has it running.
    fn settled(&self) -> bool {
        self.settled_for_ms >= self.settings.grace_ms
    }

    /// For how long a node has had its session, in milliseconds.
    fn joined_for(&self, node: &str) -> i64 {
        self.joined_for_ms.get(node).copied().unwrap_or(0)
    }

    /// How much longer an instance's offer is not to be rewritten, in milliseconds. A deadline further off than any that this
    /// coordinator gives was written before the wall clock was put back: it has run out.
    fn offer_left_ms(&self, instance: &record::Instance) -> i64 {
        let deadline = instance.offer.as_ref().and_then(|offer| offer.deadline.as_ref()).map_or(0, millis);
        let left = deadline.saturating_sub(self.now_ms);
        if left > self.settings.offer_deadline_ms.saturating_add(CLOCK_SKEW_MS) { 0 } else { left.max(0) }
    }
}

/// A proposal to some nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Best first.
    pub candidates: Vec<String>,
    /// Not to be claimed after, in milliseconds since the epoch.
    pub deadline_ms: i64,
    /// Halt generation under which it is made.
    pub halt_generation: u64,
}

/// One step. Each is carried out by one transaction, which compares the revisions named here and the leader's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Make a new instance, offered at once.
    Create {
        /// Its id.
        id: String,
        /// Deployment, and the revision of its record that this was decided from.
        deployment: String,
        /// Revision of the deployment's record.
        deployment_mod: i64,
        /// Revision of the spec.
        revision: u64,
        /// The offer; `None` while no node has room.
        offer: Option<Offer>,
    },
    /// Offer an existing instance (again).
    Offer {
        /// The instance.
        id: String,
        /// Revision of its record.
        expect: i64,
        /// The offer.
        offer: Offer,
    },
    /// Take the claim from an owner that gets nowhere, and offer the instance to others. Never of what serves.
    GiveUp {
        /// The instance.
        id: String,
        /// Revision of its record.
        expect: i64,
        /// Revision of the claim.
        claim: i64,
        /// Revision of its status; 0 when there is none. A report that comes meanwhile is progress.
        status: i64,
        /// The owner.
        node: String,
        /// Why; for people.
        why: String,
        /// The offer; `None` when it is wanted no more.
        offer: Option<Offer>,
        /// Nodes that are avoided for it from now on, the owner among them.
        avoid: Vec<record::Avoid>,
    },
    /// Forget that a node, which serves the instance now, was avoided for it.
    Forgive {
        /// The instance.
        id: String,
        /// Revision of its record.
        expect: i64,
        /// The node.
        node: String,
    },
    /// No longer wanted: its owner drains and stops it.
    Stop {
        /// The instance.
        id: String,
        /// Revision of its record.
        expect: i64,
        /// Why; a word for programs.
        reason: &'static str,
    },
    /// Remove the record of a run that has ended without its node being its owner, so that nobody has reported its end.
    CloseRun {
        /// Its key below `runs/`.
        key: String,
        /// Revision of its record.
        expect: i64,
    },
    /// Note since when a node has no session.
    NoteLost {
        /// The node.
        node: String,
        /// Revision of its record.
        expect: i64,
        /// Now, in milliseconds since the epoch.
        at_ms: i64,
    },
    /// Remove what the store holds of an instance that nobody wants or owns.
    Collect {
        /// The instance.
        id: String,
        /// Revision of its record.
        expect: i64,
    },
    /// Remove a deployment whose last instance is gone.
    RemoveDeployment {
        /// Its name.
        name: String,
        /// Revision of its record.
        expect: i64,
    },
    /// Remove old revisions of a spec.
    TrimRevisions {
        /// The deployment.
        name: String,
        /// Revision of its record.
        expect: i64,
        /// Keys below `revisions/`.
        keys: Vec<String>,
    },
}

/// Why an instance is not offered to anybody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unplaced {
    /// The deployment.
    pub deployment: String,
    /// For people: what each node lacks.
    pub why: String,
    /// It has an owner, which gets nowhere with it: nothing makes way for that.
    pub owned: bool,
}

/// What is to be done now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Independent of each other.
    pub actions: Vec<Action>,
    /// What could not be placed.
    pub unplaced: Vec<Unplaced>,
    /// How many of the offers are replacements: of instances that were owned.
    pub replacements: usize,
    /// In how many milliseconds to plan again even if nothing changes.
    pub wake_in_ms: Option<i64>,
}

impl Plan {
    /// Plan again after this time, or earlier.
    fn wake_in(&mut self, ms: i64) {
        self.wake_in_ms = Some(self.wake_in_ms.map_or(ms, |before| before.min(ms)));
    }
}
