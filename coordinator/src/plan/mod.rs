//! PURE: snapshot → plan. No I/O, no clock but an argument, no randomness but a seed. See README.md beside this file.
//!
//! Owns the decisions: which instances must exist, who may claim them, which must stop, what is to be collected.
//! A plan is a value; carrying it out decides nothing.

mod place;
mod rules;
pub mod snapshot;
#[cfg(test)]
mod tests;

pub(crate) use place::names_file;
pub use rules::plan;

use snapshot::Snapshot;
use std::collections::BTreeMap;

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
}

/// What a plan is made from.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// The store.
    pub snapshot: &'a Snapshot,
    /// Now, in milliseconds since the epoch.
    pub now_ms: i64,
    /// Since when this coordinator leads, in milliseconds since the epoch.
    pub leading_since_ms: i64,
    /// Since when each instance that was claimed before has been seen without a claim.
    pub unclaimed_since_ms: &'a BTreeMap<String, i64>,
    /// Source of ids and of the order among equals.
    pub seed: u64,
    /// Settings.
    pub settings: &'a Settings,
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
    /// No longer wanted: its owner drains and stops it.
    Stop {
        /// The instance.
        id: String,
        /// Revision of its record.
        expect: i64,
        /// Why; a word for programs.
        reason: &'static str,
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
}

/// What is to be done now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Independent of each other.
    pub actions: Vec<Action>,
    /// What could not be placed.
    pub unplaced: Vec<Unplaced>,
    /// When to plan again even if nothing changes, in milliseconds since the epoch.
    pub wake_at_ms: Option<i64>,
}
