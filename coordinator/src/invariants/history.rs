//! The history as transactions, and what is remembered of it.

use super::{CLAIMS_MAX, Checker};
use crate::{
    plan::snapshot::Snapshot,
    store::{Change, Changes, KeyValue, keys},
};
use drover_proto::{store::v1 as record, v1::Token};
use prost::Message;
use std::collections::BTreeMap;

/// The changes of one revision.
#[derive(Debug)]
pub(super) struct Transaction {
    pub(super) revision: i64,
    pub(super) changes: Vec<Change>,
    puts: BTreeMap<String, KeyValue>,
}

impl Transaction {
    /// Cuts a batch of a watch into its revisions.
    pub(super) fn split(changes: &Changes) -> Vec<Self> {
        let mut all: Vec<Self> = Vec::new();
        for change in &changes.changes {
            let revision = match change {
                Change::Put(kv) => kv.mod_revision,
                Change::Delete { revision, .. } => *revision,
            };
            if all.last().is_none_or(|last| last.revision != revision) {
                all.push(Self { revision, changes: Vec::new(), puts: BTreeMap::new() });
            }
            let Some(last) = all.last_mut() else { continue };
            if let Change::Put(kv) = change {
                last.puts.insert(kv.key.clone(), kv.clone());
            }
            last.changes.push(change.clone());
        }
        all
    }

    /// What was put under a prefix: what follows it in the key, the key with its value, and the record.
    pub(super) fn puts<'a, M: Message + Default>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a KeyValue, M)> + 'a {
        self.puts
            .range(prefix.to_owned()..)
            .map_while(move |(key, kv)| Some((key.strip_prefix(prefix)?, kv)))
            .filter_map(|(name, kv)| {
                let record = M::decode(kv.value.as_slice()).ok()?;
                Some((name, kv, record))
            })
    }

    /// What was put at a key.
    pub(super) fn put<M: Message + Default>(&self, key: &str) -> Option<(&KeyValue, M)> {
        let kv = self.puts.get(key)?;
        Some((kv, M::decode(kv.value.as_slice()).ok()?))
    }

    /// What was deleted under a prefix: what follows it in the key.
    pub(super) fn deletes<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        self.changes.iter().filter_map(move |change| match change {
            Change::Delete { key, .. } => key.strip_prefix(prefix),
            Change::Put(_) => None,
        })
    }

    pub(super) fn deleted(&self, key: &str) -> bool {
        self.changes.iter().any(|change| matches!(change, Change::Delete { key: gone, .. } if gone == key))
    }
}

/// A claim of the past or the present.
#[derive(Debug, Clone)]
pub(super) struct Made {
    pub(super) node: String,
    pub(super) nonce: String,
    /// When it went, and whether that was because its lease ran out.
    pub(super) gone: Option<(i64, bool)>,
    /// Whether its instance was seen unwanted or gone, or a ready claim above it, since it was made.
    pub(super) may_end: bool,
}

/// Who owns what, and the memory that it takes, in bytes: looked up for each claim, whatever others there are.
#[derive(Debug, Default)]
pub(super) struct Reserved {
    by_id: BTreeMap<String, (String, i64)>,
    by_node: BTreeMap<String, i64>,
}

impl Reserved {
    pub(super) fn of(state: &Snapshot) -> Self {
        let mut reserved = Self::default();
        state.claims.iter().for_each(|(id, claim)| reserved.insert(id, &claim.value));
        reserved
    }

    fn insert(&mut self, id: &str, claim: &record::Claim) {
        let bytes = self.by_node.entry(claim.node.clone()).or_default();
        *bytes = bytes.saturating_add(claim.memory_bytes);
        self.by_id.insert(id.to_owned(), (claim.node.clone(), claim.memory_bytes));
    }

    fn remove(&mut self, id: &str) {
        let Some((node, bytes)) = self.by_id.remove(id) else { return };
        if let Some(left) = self.by_node.get_mut(&node) {
            *left = left.saturating_sub(bytes);
            if *left == 0 {
                self.by_node.remove(&node);
            }
        }
    }

    fn owner(&self, id: &str) -> Option<&str> {
        self.by_id.get(id).map(|(node, _)| node.as_str())
    }

    pub(super) fn bytes(&self, node: &str) -> i64 {
        self.by_node.get(node).copied().unwrap_or(0)
    }
}

impl Checker {
    pub(super) fn remember(&mut self, id: String, token: Token, claim: &record::Claim) {
        let made = Made { node: claim.node.clone(), nonce: claim.nonce.clone(), gone: None, may_end: false };
        self.made.insert((id.clone(), token), made);
        self.order.push_back((id, token));
        if self.order.len() > CLAIMS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.made.remove(&oldest);
        }
    }

    /// Remembers what a transaction has done; the state is the one after it.
    pub(super) fn follow(&mut self, at_ms: i64, transaction: &Transaction) {
        let generation = self.state.generation();
        for (id, kv, claim) in transaction.puts::<record::Claim>(keys::CLAIMS) {
            self.remember(id.to_owned(), Token { generation, revision: kv.mod_revision }, &claim);
        }
        for (node, kv, _) in transaction.puts::<record::Session>(keys::SESSIONS) {
            if kv.version == 1 {
                self.capacities.remove(node);
            }
        }
        for (node, _, told) in transaction.puts::<record::Node>(keys::NODES) {
            let bytes = told.capacity.map_or(0, |capacity| capacity.memory_bytes);
            let largest = self.capacities.entry(node.to_owned()).or_default();
            *largest = bytes.max(*largest);
        }
        let nodes = transaction.puts::<record::Node>(keys::NODES).map(|(node, _, _)| node);
        let joined = transaction.puts::<record::Session>(keys::SESSIONS).map(|(node, _, _)| node);
        let touched: Vec<String> = nodes.chain(joined).map(str::to_owned).collect();
        touched.iter().for_each(|node| self.note_inventory(node));
        for node in transaction.deletes(keys::NODES) {
            self.told_inventory.remove(node);
            self.capacities.remove(node);
        }
        let mut gone: Vec<(String, bool)> = Vec::new();
        for id in transaction.deletes(keys::CLAIMS) {
            let owner = self.reserved.owner(id);
            let by_lease = owner.is_some_and(|node| transaction.deleted(&keys::session(node)));
            gone.push((id.to_owned(), by_lease));
        }
        for (id, by_lease) in gone {
            for made in self.made_of(&id).filter(|made| made.gone.is_none()) {
                made.gone = Some((at_ms, by_lease));
            }
            if by_lease {
                self.outlived(at_ms, transaction.revision, &id);
            }
            self.reserved.remove(&id);
        }
        for (id, _, claim) in transaction.puts::<record::Claim>(keys::CLAIMS) {
            self.reserved.remove(id);
            self.reserved.insert(id, &claim);
        }
        self.note_ends(transaction);
    }

    /// Counts the wanted instances as they are after a transaction; the state is the one before it.
    pub(super) fn count_wanted(&mut self, transaction: &Transaction) {
        let puts: Vec<(&str, record::Instance)> =
            transaction.puts::<record::Instance>(keys::INSTANCES).map(|(id, _, instance)| (id, instance)).collect();
        for id in puts.iter().map(|(id, _)| *id).chain(transaction.deletes(keys::INSTANCES)) {
            let Some(before) = self.state.instances.get(id).filter(|before| before.value.wanted) else { continue };
            let of = (before.value.deployment.clone(), before.value.revision);
            let left = self.wanted.get(&of).map_or(0, |count| count.saturating_sub(1));
            if left == 0 {
                self.wanted.remove(&of)
            } else {
                self.wanted.insert(of, left)
            };
        }
        for (_, instance) in puts.into_iter().filter(|(_, instance)| instance.wanted) {
            *self.wanted.entry((instance.deployment, instance.revision)).or_default() += 1;
        }
    }

    /// Remembers in which session a node has said what runs there: when it resumes that one it says it once more.
    pub(super) fn note_inventory(&mut self, node: &str) {
        if self.state.inventory(node).is_some()
            && let Some(session) = self.state.sessions.get(node)
        {
            self.told_inventory.insert(node.to_owned(), session.value.session_id.clone());
        }
    }

    /// What is remembered of an instance's claims.
    fn made_of(&mut self, id: &str) -> impl Iterator<Item = &mut Made> {
        let from = (id.to_owned(), Token::default());
        let made = self.made.range_mut(from..);
        let id = id.to_owned();
        made.take_while(move |((of, _), _)| *of == id).map(|(_, made)| made)
    }

    /// Marks the claims whose runs may be ended from now on.
    fn note_ends(&mut self, transaction: &Transaction) {
        let touched =
            |prefix| transaction.puts.range(String::from(prefix)..).map_while(move |(key, _)| key.strip_prefix(prefix));
        let mut ids: Vec<String> = touched(keys::INSTANCES).chain(touched(keys::STATUS)).map(str::to_owned).collect();
        ids.extend(transaction.deletes(keys::INSTANCES).map(str::to_owned));
        for id in ids {
            let wanted = self.state.instances.get(&id).is_some_and(|instance| instance.value.wanted);
            let ready = self.state.state(&id) == drover_proto::v1::InstanceState::Ready;
            let token = self.state.token(&id).filter(|_| ready);
            let from = (id.clone(), Token::default());
            for ((_, of), made) in self.made.range_mut(from..).take_while(|((of, _), _)| *of == id) {
                made.may_end |= !wanted || token.is_some_and(|standing| standing > *of);
            }
        }
    }
}
