//! PURE. Who may still have a process of an instance that nobody owns, and is waited for before it is given to another node.

use super::{Input, avoid, snapshot::Stored};
use drover_proto::store::v1 as record;
use std::collections::BTreeMap;

/// Connected nodes with a run of each instance that has no claim; found once for a plan.
#[derive(Debug, Default)]
pub(super) struct Holders<'a>(BTreeMap<&'a str, Vec<&'a str>>);

impl<'a> Holders<'a> {
    pub(super) fn of(input: &Input<'a>) -> Self {
        let (snapshot, mut holders) = (input.snapshot, Self::default());
        for (name, node) in snapshot.nodes.iter().filter(|(name, _)| snapshot.sessions.contains_key(*name)) {
            for run in node.value.unclaimed.iter().filter(|run| !snapshot.claims.contains_key(&run.instance)) {
                holders.0.entry(run.instance.as_str()).or_default().push(name);
            }
        }
        holders
    }

    /// How long an unclaimed instance is not to be offered (again), in milliseconds.
    ///
    /// What was owned may still run. After a change of leader, and after a break in what it sees of the store, all nodes have
    /// one time to live to come back. A node that is there has the same time, from when it joined and from when the claim was
    /// gone, to claim again what it still runs: the last owner as long as it has not said that it runs nothing of it, and
    /// whoever says that it does. Not a node that is avoided for it: that may not claim it again.
    pub(super) fn wait_ms(&self, input: &Input<'_>, id: &str, instance: &Stored<record::Instance>) -> i64 {
        let standing = input.offer_left_ms(&instance.value);
        let Some(taken) = input.snapshot.taken.get(id) else { return standing };
        let owner = taken.value.node.as_str();
        let may_have_it = input.snapshot.sessions.contains_key(owner) && !input.snapshot.denies(owner, id);
        let unclaimed_for = input.unclaimed_for_ms.get(id).copied().unwrap_or(0);
        let tried_for = self
            .0
            .get(id)
            .into_iter()
            .flatten()
            .copied()
            .chain(may_have_it.then_some(owner))
            .filter(|node| avoid::in_force(&instance.value, node, input.now_ms).is_none())
            .map(|node| unclaimed_for.min(input.joined_for(node)));
        let waited = tried_for.chain([input.settled_for_ms]).min().unwrap_or(0);
        standing.max(input.settings.grace_ms.saturating_sub(waited))
    }
}
