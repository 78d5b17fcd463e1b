//! PURE. What each node has part in: found for one snapshot from the shares of the one before and what lies between the two, so
//! that a change costs what it touches, whatever the fleet's size.
//!
//! Owns: nothing; values in, values out. Whoever serves a node's session asks here whether anything that the node is told of
//! has changed ([`Shares::changed`]); who makes claims asks for the memory that a node's claims reserve.

use crate::plan::snapshot::Snapshot;
use imbl::{OrdMap, OrdSet, ordmap::DiffItem};
use std::{collections::BTreeSet, sync::Arc};

/// Id of an instance, or name of a node.
type Name = Arc<str>;

/// What one node has part in.
#[derive(Debug, Clone, Default)]
struct Share {
    /// Instances that it owns.
    claims: OrdSet<Name>,
    /// Memory that these claims reserve, in bytes. Wide enough for any number of them.
    bytes: i128,
    /// Instances that nobody owns and whose offer names it, each with the revision of its record.
    offers: OrdMap<Name, i64>,
    /// In which version of the shares something came to be that it is told of.
    changed: u64,
}

/// What every node has part in, as one snapshot shows it. Copies share what has not changed.
#[derive(Debug, Clone, Default)]
pub struct Shares {
    nodes: OrdMap<Name, Share>,
    /// Counts the snapshots.
    version: u64,
    /// The version in which something changed that concerns all.
    all: u64,
}

impl Shares {
    /// Of a snapshot before which nothing is known.
    #[must_use]
    pub fn of(snapshot: &Snapshot) -> Self {
        Self::default().after(&Snapshot::default(), snapshot)
    }

    /// Of the snapshot that comes after the one that these are of.
    #[must_use]
    pub fn after(&self, before: &Snapshot, now: &Snapshot) -> Self {
        let mut next = Self { version: self.version + 1, ..self.clone() };
        if concerns_all(before, now) {
            next.all = next.version;
        }
        for id in moved(before, now) {
            next.forget(before, &id);
            next.find(now, &id);
        }
        for node in addressed(before, now) {
            next.share(&node).changed = next.version;
        }
        if before.nodes.diff(&now.nodes).any(|item| matches!(item, DiffItem::Remove(..))) {
            next.sweep(now);
        }
        next
    }

    /// Counts up with every snapshot.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The version in which something changed last that a node is told of: its session, a claim of its own, what one of those is
    /// about, an offer to it, a command. What runs there without a claim is another matter: see the outbox of its session.
    #[must_use]
    pub fn changed(&self, node: &str) -> u64 {
        self.nodes.get(node).map_or(0, |share| share.changed).max(self.all)
    }

    /// Instances that a node owns, in order.
    pub fn claims(&self, node: &str) -> impl Iterator<Item = &str> {
        self.nodes.get(node).into_iter().flat_map(|share| share.claims.iter().map(|id| &**id))
    }

    /// Memory that a node's claims reserve, in bytes.
    #[must_use]
    pub fn claimed_bytes(&self, node: &str) -> i64 {
        self.nodes.get(node).map_or(0, |share| i64::try_from(share.bytes).unwrap_or(i64::MAX))
    }

    /// Instances that nobody owns and whose offer names a node, whether or not it still stands, in order, each with the revision
    /// of its record.
    #[must_use]
    pub fn offers(&self, node: &str) -> OrdMap<Arc<str>, i64> {
        self.nodes.get(node).map(|share| share.offers.clone()).unwrap_or_default()
    }

    fn share(&mut self, node: &str) -> &mut Share {
        self.nodes.entry(node.into()).or_default()
    }

    /// Forgets the nodes that were removed and have part in nothing any more. The stream of one, should there be one left, is
    /// told by what all are told.
    fn sweep(&mut self, now: &Snapshot) {
        let known = |node: &str| now.nodes.contains_key(node) || now.sessions.contains_key(node);
        let idle = |share: &Share| share.claims.is_empty() && share.offers.is_empty();
        let gone = self.nodes.iter().filter(|(node, share)| idle(share) && !known(node)).map(|(node, _)| node.clone());
        for node in gone.collect::<Vec<_>>() {
            self.nodes.remove(&node);
            self.all = self.version;
        }
    }

    /// Takes out what a snapshot shows of an instance.
    fn forget(&mut self, snapshot: &Snapshot, id: &str) {
        if let Some(claim) = snapshot.claims.get(id) {
            let version = self.version;
            let share = self.share(&claim.value.node);
            if share.claims.remove(id).is_some() {
                share.bytes -= i128::from(claim.value.memory_bytes);
            }
            share.changed = version;
        }
        // That an offer is gone is nothing that a node is told.
        for node in offered_to(snapshot, id) {
            self.share(node).offers.remove(id);
        }
    }

    /// Puts in what a snapshot shows of an instance.
    fn find(&mut self, snapshot: &Snapshot, id: &str) {
        let (version, name): (u64, Name) = (self.version, id.into());
        if let Some(claim) = snapshot.claims.get(id) {
            let share = self.share(&claim.value.node);
            share.claims.insert(name.clone());
            share.bytes += i128::from(claim.value.memory_bytes);
            share.changed = version;
        }
        let revision = snapshot.instances.get(id).map_or(0, |instance| instance.mod_revision);
        for node in offered_to(snapshot, id) {
            let share = self.share(node);
            share.offers.insert(name.clone(), revision);
            share.changed = version;
        }
    }
}

/// Whom an instance that nobody owns is offered to.
fn offered_to<'a>(snapshot: &'a Snapshot, id: &str) -> impl Iterator<Item = &'a str> {
    let instance = snapshot.instances.get(id).filter(|_| !snapshot.claims.contains_key(id));
    let offer = instance.and_then(|instance| instance.value.offer.as_ref());
    offer.into_iter().flat_map(|offer| &offer.candidates).map(String::as_str)
}

/// What is not one node's business: what the store is, what can't be read, and specs, which many instances run.
fn concerns_all(before: &Snapshot, now: &Snapshot) -> bool {
    let schema = |snapshot: &Snapshot| snapshot.schema.as_ref().map(|s| (s.create_revision, s.mod_revision));
    schema(before) != schema(now)
        || before.unreadable != now.unreadable
        || now.revision < before.revision
        || before.revisions.diff(&now.revisions).next().is_some()
}

/// Instances of which the record or the claim has changed.
fn moved(before: &Snapshot, now: &Snapshot) -> BTreeSet<String> {
    let claims = before.claims.diff(&now.claims).map(|item| key(&item).clone());
    let instances = before.instances.diff(&now.instances).map(|item| key(&item).clone());
    claims.chain(instances).collect()
}

/// Nodes whose session has changed, or whom somebody has asked for something.
fn addressed(before: &Snapshot, now: &Snapshot) -> BTreeSet<String> {
    let sessions = before.sessions.diff(&now.sessions).map(|item| key(&item).clone());
    let commands = before.commands.diff(&now.commands).map(|item| match key(&item).split_once('/') {
        Some((node, _)) => node.to_owned(),
        None => key(&item).clone(),
    });
    sessions.chain(commands).collect()
}

fn key<'a, T>(item: &DiffItem<'a, 'a, String, T>) -> &'a String {
    match item {
        DiffItem::Add(key, _) | DiffItem::Remove(key, _) => key,
        DiffItem::Update { new: (key, _), .. } => key,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::snapshot::Stored;
    use drover_proto::store::v1 as record;

    /// A step of a store's history.
    #[derive(Debug, Clone)]
    enum Step {
        Claim(u8, u8, i64),
        Unclaim(u8),
        Offer(u8, Vec<u8>),
        Collect(u8),
        Session(u8),
        Leave(u8),
        Remove(u8),
        Command(u8),
        Restore,
    }

    fn id(n: u8) -> String {
        format!("m-{n}")
    }

    fn node(n: u8) -> String {
        format!("n{n}")
    }

    fn stored<T>(value: T, revision: i64) -> Arc<Stored<T>> {
        Arc::new(Stored { value, create_revision: 1, mod_revision: revision })
    }

    fn step(before: &Snapshot, step: &Step) -> Snapshot {
        let revision = before.revision + 1;
        let mut now = Snapshot { revision, ..before.clone() };
        match step.clone() {
            Step::Claim(i, n, memory_bytes) => {
                let claim = record::Claim { node: node(n), memory_bytes, ..record::Claim::default() };
                now.claims.insert(id(i), stored(claim, revision));
                now.nodes.insert(node(n), stored(record::Node::default(), revision));
            }
            Step::Unclaim(i) => drop(now.claims.remove(&id(i))),
            Step::Offer(i, nodes) => {
                let candidates = nodes.into_iter().map(node).collect();
                let offer = Some(record::Offer { candidates, ..record::Offer::default() });
                let instance = record::Instance { wanted: true, offer, ..record::Instance::default() };
                now.instances.insert(id(i), stored(instance, revision));
            }
            Step::Collect(i) => drop(now.instances.remove(&id(i))),
            Step::Session(n) => drop(now.sessions.insert(node(n), stored(record::Session::default(), revision))),
            Step::Leave(n) => drop(now.sessions.remove(&node(n))),
            Step::Remove(n) => drop(now.nodes.remove(&node(n))),
            Step::Command(n) => {
                now.commands.insert(format!("{}/1", node(n)), stored(record::Command::default(), revision));
            }
            Step::Restore => now.schema = Some(stored(record::Schema::default(), revision)),
        }
        now
    }

    /// What a node is told of, looked up in the whole snapshot, but for offers.
    fn told(snapshot: &Snapshot, node: &str) -> impl PartialEq + std::fmt::Debug + use<> {
        let claims = snapshot.claims_of(node).map(|(id, claim)| (claim.clone(), snapshot.instances.get(id).cloned()));
        let commands = snapshot.commands_to(node).map(|(key, _)| key.clone());
        let session = snapshot.sessions.get(node).cloned();
        (claims.collect::<Vec<_>>(), commands.collect::<Vec<_>>(), session, snapshot.schema.clone())
    }

    fn steps() -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
        use proptest::prelude::*;
        let (instance, node) = (0_u8..6, 0_u8..4);
        let one = prop_oneof![
            (instance.clone(), node.clone(), 0_i64..1 << 40).prop_map(|(i, n, bytes)| Step::Claim(i, n, bytes)),
            instance.clone().prop_map(Step::Unclaim),
            (instance.clone(), proptest::collection::vec(node.clone(), 0..3)).prop_map(|(i, n)| Step::Offer(i, n)),
            instance.prop_map(Step::Collect),
            node.clone().prop_map(Step::Session),
            node.clone().prop_map(Step::Leave),
            node.clone().prop_map(Step::Remove),
            node.prop_map(Step::Command),
            Just(Step::Restore),
        ];
        proptest::collection::vec(one, 1..60)
    }

    proptest::proptest! {
        #[test]
        fn step_by_step_they_are_those_of_the_whole_snapshot_and_no_change_is_missed(steps in steps()) {
            // Many more than are touched, so that most of the maps is shared from one step to the next.
            let mut before = (6..250).fold(Snapshot::default(), |before, i| step(&before, &Step::Offer(i, vec![i % 4])));
            before = (100..250).fold(before, |before, i| step(&before, &Step::Claim(i, i % 4, 1)));
            let mut shares = Shares::of(&before);
            for one in steps {
                let now = step(&before, &one);
                let next = shares.after(&before, &now);
                let whole = Shares::of(&now);
                for n in 0..4 {
                    let node = node(n);
                    let claims = |shares: &Shares| shares.claims(&node).map(str::to_owned).collect::<Vec<_>>();
                    let owned: Vec<_> = now.claims_of(&node).map(|(id, _)| id.clone()).collect();
                    proptest::prop_assert_eq!(claims(&next), owned);
                    proptest::prop_assert_eq!(next.offers(&node), whole.offers(&node));
                    let bytes = now.claims_of(&node).map(|(_, claim)| claim.value.memory_bytes).sum::<i64>();
                    proptest::prop_assert_eq!(next.claimed_bytes(&node), bytes);
                    // That an offer is gone is nothing that a node is told.
                    let known = shares.offers(&node);
                    let offered = next.offers(&node).iter().any(|(id, revision)| known.get(id) != Some(revision));
                    if offered || told(&before, &node) != told(&now, &node) {
                        proptest::prop_assert_eq!(next.changed(&node), next.version(), "{:?}", one);
                    }
                }
                (before, shares) = (now, next);
            }
        }
    }

    #[test]
    fn what_does_not_concern_a_node_leaves_it_alone() {
        let before = step(&step(&Snapshot::default(), &Step::Session(0)), &Step::Session(1));
        let shares = Shares::of(&before);
        let next = shares.after(&before, &step(&before, &Step::Claim(1, 1, 5)));
        assert_eq!(next.changed("n1"), next.version());
        assert!(next.changed("n0") < next.version());
    }
}
