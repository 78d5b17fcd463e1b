//! The history as transactions, and what is remembered of it.

use super::{CLAIMS_MAX, Checker};
use crate::store::{Change, Changes, KeyValue, keys};
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
            self.leases.insert(node.to_owned(), kv.lease);
        }
        for (node, _, told) in transaction.puts::<record::Node>(keys::NODES) {
            let bytes = told.capacity.map_or(0, |capacity| capacity.memory_bytes);
            let largest = self.capacities.entry(node.to_owned()).or_default();
            *largest = bytes.max(*largest);
        }
        let mut gone: Vec<(String, bool)> = Vec::new();
        for id in transaction.deletes(keys::CLAIMS) {
            let owner = self.made.iter().rev().find(|((of, _), made)| of == id && made.gone.is_none());
            let by_lease = owner.is_some_and(|(_, made)| transaction.deleted(&keys::session(&made.node)));
            gone.push((id.to_owned(), by_lease));
        }
        for (id, by_lease) in gone {
            for ((_, _), made) in self.made.iter_mut().filter(|((of, _), made)| *of == id && made.gone.is_none()) {
                made.gone = Some((at_ms, by_lease));
            }
            if by_lease {
                self.outlived(at_ms, transaction.revision, &id);
            }
        }
        self.note_ends(transaction);
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
