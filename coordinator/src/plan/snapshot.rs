//! PURE. The store's content at one revision, decoded: what planning, the gateway and the API look at.

use drover_proto::{
    store::v1 as record,
    v1::{InstanceState, OnLeaseLost, Token},
};
use imbl::OrdMap;
use std::{collections::BTreeSet, sync::Arc};

/// A record with its revisions.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored<T> {
    /// The record.
    pub value: T,
    /// Revision at which its key was created.
    pub create_revision: i64,
    /// Revision at which it was last written.
    pub mod_revision: i64,
}

/// Records of one kind by their name or id. Persistent: the snapshot of one change more copies a few pointers, and shares all
/// else with the one before, so that what is between the two is found without looking at what is not.
pub type Map<T> = OrdMap<String, Arc<Stored<T>>>;

/// Everything that decisions are made from.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Revision of the store up to which this is complete.
    pub revision: i64,
    /// What the store is.
    pub schema: Option<Arc<Stored<record::Schema>>>,
    /// Whether claiming is stopped.
    pub halt: Option<Arc<Stored<record::Halt>>>,
    /// An operator's word on the freeze of replacement.
    pub freeze: Option<Arc<Stored<record::Freeze>>>,
    /// The elected coordinator.
    pub leader: Option<Arc<Stored<record::Leader>>>,
    /// By name.
    pub deployments: Map<record::Deployment>,
    /// By "<deployment>/<zero-padded number>", as in the key.
    pub revisions: Map<record::Revision>,
    /// What the leader has not found a node for, by deployment.
    pub unplaced: Map<record::Unplaced>,
    /// By id.
    pub instances: Map<record::Instance>,
    /// By instance.
    pub taken: Map<record::Taken>,
    /// By node.
    pub sessions: Map<record::Session>,
    /// By instance.
    pub claims: Map<record::Claim>,
    /// By "<instance>/<token>".
    pub runs: Map<record::Run>,
    /// By instance.
    pub statuses: Map<record::Status>,
    /// By name.
    pub nodes: Map<record::Node>,
    /// What operators ask of nodes and wait for, by "<node>/<id>".
    pub commands: Map<record::Command>,
    /// Keys whose record can't be read. It is not one that says no: nothing may be concluded from what is missing above, or
    /// from what stood there before.
    pub unreadable: BTreeSet<String>,
}

impl Snapshot {
    /// Generation of the store; 0 while it is not known.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.schema.as_ref().map_or(0, |s| s.value.generation)
    }

    /// Generation of the last halt; 0 when there never was one.
    #[must_use]
    pub fn halt_generation(&self) -> u64 {
        self.halt.as_ref().map_or(0, |h| h.value.generation)
    }

    /// Whether new claims are stopped.
    #[must_use]
    pub fn halted(&self) -> bool {
        self.halt.as_ref().is_some_and(|h| h.value.level != "none" && !h.value.level.is_empty())
    }

    /// Whether the record of an instance is there and can't be read.
    #[must_use]
    pub fn is_unreadable(&self, instance: &str) -> bool {
        !self.unreadable.is_empty() && self.unreadable.contains(&format!("instances/{instance}"))
    }

    /// Whether anything can't be read of which a deployment is made up: its own record, a spec, an instance.
    #[must_use]
    pub fn is_obscure(&self, deployment: &str) -> bool {
        let of_it = |key: &String| match key.split_once('/') {
            Some(("deployments", name)) => name == deployment,
            Some(("revisions", key)) => key.rsplit_once('/').is_some_and(|(name, _)| name == deployment),
            // An id is the name, '-' and six characters.
            Some(("instances", id)) => id.rsplit_once('-').is_some_and(|(name, _)| name == deployment),
            _ => false,
        };
        self.unreadable.iter().any(of_it)
    }

    /// Token of the standing claim on an instance.
    #[must_use]
    pub fn token(&self, instance: &str) -> Option<Token> {
        let claim = self.claims.get(instance)?;
        Some(Token { generation: self.generation(), revision: claim.mod_revision })
    }

    /// State of an instance: what its owner reported under the standing claim; a report under an older token says nothing.
    #[must_use]
    pub fn state(&self, instance: &str) -> InstanceState {
        let Some(token) = self.token(instance) else { return InstanceState::Pending };
        match self.statuses.get(instance) {
            Some(status) if status.value.token == Some(token) => status.value.state(),
            _ => InstanceState::Claimed,
        }
    }

    /// The run that may answer for an instance whatever became of its claim: of those whose owner's last report said ready, the
    /// one with the highest token. A node that has told since what runs on it, and did not name it, knows better. What ends
    /// with its lease answers under a claim alone.
    #[must_use]
    pub fn answering(&self, instance: &str) -> Option<&record::Run> {
        let spec = self.instances.get(instance).and_then(|instance| self.spec_of(&instance.value));
        if spec.is_some_and(|spec| spec.on_lease_lost() == OnLeaseLost::Stop) && !self.claims.contains_key(instance) {
            return None;
        }
        let all = format!("{instance}/");
        let runs = self.runs.range(all.clone()..).take_while(|(key, _)| key.starts_with(&all));
        let ready = runs.map(|(_, run)| &run.value).filter(|run| self.was_ready(instance, run));
        ready.filter(|run| !self.denies(&run.node, instance)).max_by_key(|run| run.token)
    }

    /// What was last reported of a run. The status says it too while it is of the same run, whoever wrote it: a coordinator
    /// older than the mark in the run's record keeps the status alone.
    fn was_ready(&self, instance: &str, run: &record::Run) -> bool {
        match self.statuses.get(instance) {
            Some(status) if status.value.token == run.token => status.value.state() == InstanceState::Ready,
            _ => run.ready,
        }
    }

    /// Whether a node has said in its present session what runs on it, and the instance is not among it.
    #[must_use]
    pub fn denies(&self, node: &str, instance: &str) -> bool {
        let owned = self.claims.get(instance).is_some_and(|claim| claim.value.node == node);
        !owned && self.inventory(node).is_some_and(|runs| runs.iter().all(|run| run.instance != instance))
    }

    /// What a node has said, in its present session and after it was told its claims, that it runs without a claim.
    #[must_use]
    pub fn inventory(&self, node: &str) -> Option<&[record::UnclaimedRun]> {
        let (session, record) = (self.sessions.get(node)?, self.nodes.get(node)?);
        (record.value.inventory_of == session.value.session_id).then_some(&record.value.unclaimed[..])
    }

    /// The spec that an instance runs.
    #[must_use]
    pub fn spec_of(&self, instance: &record::Instance) -> Option<&drover_proto::v1::DeploymentSpec> {
        let key = format!("{}/{:020}", instance.deployment, instance.revision);
        self.revisions.get(&key)?.value.spec.as_ref()
    }

    /// What is asked of a node now.
    pub fn commands_to<'a>(&'a self, node: &str) -> impl Iterator<Item = (&'a String, &'a record::Command)> {
        let prefix = format!("{node}/");
        let from = self.commands.range(prefix.clone()..);
        from.take_while(move |(key, _)| key.starts_with(&prefix)).map(|(key, stored)| (key, &stored.value))
    }

    /// Instances of a deployment, by id.
    pub fn instances_of<'a>(
        &'a self,
        deployment: &'a str,
    ) -> impl Iterator<Item = (&'a String, &'a Arc<Stored<record::Instance>>)> + 'a {
        // An id is the name, '-' and six characters, so all of them lie in one stretch of the map.
        let first = format!("{deployment}-");
        self.instances
            .range(first.clone()..)
            .take_while(move |(id, _)| id.starts_with(&first))
            .filter(move |(_, i)| i.value.deployment == deployment)
    }

    /// Claims of a node, by instance.
    pub fn claims_of<'a>(
        &'a self,
        node: &'a str,
    ) -> impl Iterator<Item = (&'a String, &'a Arc<Stored<record::Claim>>)> + 'a {
        self.claims.iter().filter(move |(_, c)| c.value.node == node)
    }

    /// The offer of an instance, as long as somebody may still claim it.
    #[must_use]
    pub fn standing_offer<'a>(
        &self,
        id: &str,
        instance: &'a Stored<record::Instance>,
        now_ms: i64,
    ) -> Option<&'a record::Offer> {
        let offer = instance.value.offer.as_ref()?;
        let stands = instance.value.wanted
            && offer.deadline.as_ref().map_or(0, millis) > now_ms
            && !self.claims.contains_key(id)
            && self.taken.get(id).is_none_or(|t| t.mod_revision < instance.mod_revision);
        stands.then_some(offer)
    }

    /// Memory that a node says a run of an instance takes which is alive there and not owned by it, in bytes; `None` when there
    /// is no such run.
    #[must_use]
    pub fn unclaimed_of(&self, name: &str, node: &record::Node, instance: &str) -> Option<i64> {
        let owned = self.claims.get(instance).is_some_and(|claim| claim.value.node == name);
        let run = node.unclaimed.iter().find(|run| run.instance == instance);
        run.filter(|_| !owned).map(|run| run.memory_bytes)
    }

    /// Memory that runs take which are alive on a node and not owned by it, in bytes.
    #[must_use]
    pub fn unclaimed_bytes(&self, name: &str, node: &record::Node) -> i64 {
        let free = node.unclaimed.iter().filter(|u| self.claims.get(&u.instance).is_none_or(|c| c.value.node != name));
        free.map(|u| u.memory_bytes).fold(0, i64::saturating_add)
    }

    /// Memory that a node's claims and unclaimed runs take, in bytes.
    #[must_use]
    pub fn reserved_bytes(&self, name: &str) -> i64 {
        let claimed = self.claims_of(name).map(|(_, c)| c.value.memory_bytes).fold(0, i64::saturating_add);
        claimed.saturating_add(self.nodes.get(name).map_or(0, |node| self.unclaimed_bytes(name, &node.value)))
    }
}

/// Milliseconds since the epoch of a record's timestamp.
#[must_use]
pub fn millis(t: &prost_types::Timestamp) -> i64 {
    t.seconds.saturating_mul(1000).saturating_add(i64::from(t.nanos) / 1_000_000)
}
