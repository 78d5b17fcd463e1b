//! Which claims and offers of a snapshot each node has part in: found once for a snapshot by the first session that asks,
//! since every session of every node looks at every snapshot.

use crate::plan::snapshot::Snapshot;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// Ids of instances by node, in order.
#[derive(Debug, Default)]
pub(super) struct Shares {
    claims: HashMap<String, Vec<String>>,
    offers: HashMap<String, Vec<String>>,
}

impl Shares {
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let mut shares = Self::default();
        for (id, claim) in &snapshot.claims {
            add(&mut shares.claims, &claim.value.node, id);
        }
        for (id, instance) in snapshot.instances.iter().filter(|(id, _)| !snapshot.claims.contains_key(*id)) {
            for candidate in instance.value.offer.iter().flat_map(|offer| &offer.candidates) {
                add(&mut shares.offers, candidate, id);
            }
        }
        shares
    }

    /// Instances that a node owns.
    pub(super) fn claims(&self, node: &str) -> &[String] {
        self.claims.get(node).map_or(&[], Vec::as_slice)
    }

    /// Instances that nobody owns and whose offer names a node, whether or not it still stands.
    pub(super) fn offers(&self, node: &str) -> &[String] {
        self.offers.get(node).map_or(&[], Vec::as_slice)
    }
}

fn add(by_node: &mut HashMap<String, Vec<String>>, node: &str, id: &str) {
    match by_node.get_mut(node) {
        Some(ids) => ids.push(id.to_owned()),
        None => drop(by_node.insert(node.to_owned(), vec![id.to_owned()])),
    }
}

type Latest = Option<(Arc<Snapshot>, Arc<Shares>)>;

/// The shares of the latest snapshot that was asked for; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Cache(Arc<Mutex<Latest>>);

impl Cache {
    pub(super) fn of(&self, snapshot: &Arc<Snapshot>) -> Arc<Shares> {
        // Nothing panics while it holds the lock; should it ever, the value is still whole.
        let mut latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*latest {
            Some((of, shares)) if Arc::ptr_eq(of, snapshot) => shares.clone(),
            // A session that is late finds its own, and leaves those of the newer one to the others.
            Some((of, _)) if of.revision > snapshot.revision => Arc::new(Shares::of(snapshot)),
            _ => {
                let shares = Arc::new(Shares::of(snapshot));
                *latest = Some((snapshot.clone(), shares.clone()));
                shares
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::snapshot::Stored;
    use drover_proto::store::v1 as record;

    #[test]
    fn the_shares_are_those_of_the_snapshot_asked_for() {
        let at = |revision, node: &str| {
            let value = record::Claim { node: node.to_owned(), ..record::Claim::default() };
            let mut snapshot = Snapshot { revision, ..Snapshot::default() };
            let claim = Stored { value, create_revision: revision, mod_revision: revision };
            snapshot.claims.insert("m-222222".to_owned(), Arc::new(claim));
            Arc::new(snapshot)
        };
        let (cache, older, newer) = (Cache::default(), at(1, "a"), at(2, "b"));
        for snapshot in [&older, &newer, &older, &newer] {
            let (mine, other) = if snapshot.revision == 1 { ("a", "b") } else { ("b", "a") };
            assert_eq!(cache.of(snapshot).claims(mine), ["m-222222"]);
            assert!(cache.of(snapshot).claims(other).is_empty());
        }
        assert!(Arc::ptr_eq(&cache.of(&newer), &cache.of(&newer)), "found once");
    }
}
