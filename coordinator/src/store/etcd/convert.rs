//! Between the store's types and etcd's; adds and strips the prefix of keys.

use crate::store::{Change, Compare, KeyValue, Op, Txn, TxnOutcome};
use etcd_client::{CompareOp, DeleteOptions, Event, EventType, GetOptions, PutOptions, TxnOp, TxnOpResponse};
use std::sync::Arc;

/// The prefix of all keys.
#[derive(Debug, Clone)]
pub(super) struct Prefix(Arc<str>);

impl Prefix {
    pub(super) fn new(prefix: &str) -> Self {
        Self(prefix.into())
    }

    pub(super) fn add(&self, key: &str) -> String {
        format!("{}{key}", self.0)
    }

    fn strip_key(&self, key: &[u8]) -> String {
        // Our keys are text; a foreign one under our prefix that is not comes out as a name that nothing has.
        let key = String::from_utf8_lossy(key);
        key.strip_prefix(&*self.0).unwrap_or(&key).to_owned()
    }

    pub(super) fn strip(&self, kv: etcd_client::KeyValue) -> KeyValue {
        KeyValue {
            key: self.strip_key(kv.key()),
            create_revision: kv.create_revision(),
            mod_revision: kv.mod_revision(),
            version: kv.version(),
            lease: kv.lease(),
            value: kv.into_key_value().1,
        }
    }

    pub(super) fn change(&self, event: &Event) -> Option<Change> {
        let kv = event.kv()?;
        Some(match event.event_type() {
            EventType::Put => Change::Put(self.strip(kv.clone())),
            EventType::Delete => Change::Delete { key: self.strip_key(kv.key()), revision: kv.mod_revision() },
        })
    }

    pub(super) fn txn(&self, txn: &Txn) -> etcd_client::Txn {
        let compare: Vec<_> = txn.compare.iter().map(|c| self.compare(c)).collect();
        let then: Vec<_> = txn.then.iter().map(|o| self.op(o)).collect();
        let otherwise: Vec<_> = txn.otherwise.iter().map(|o| self.op(o)).collect();
        etcd_client::Txn::new().when(compare).and_then(then).or_else(otherwise)
    }

    fn compare(&self, compare: &Compare) -> etcd_client::Compare {
        match compare {
            Compare::ModRevision(key, revision) => {
                etcd_client::Compare::mod_revision(self.add(key), CompareOp::Equal, *revision)
            }
            Compare::ModRevisionBelow(key, revision) => {
                etcd_client::Compare::mod_revision(self.add(key), CompareOp::Less, *revision)
            }
            Compare::CreateRevision(key, revision) => {
                etcd_client::Compare::create_revision(self.add(key), CompareOp::Equal, *revision)
            }
            Compare::Exists(key) => etcd_client::Compare::create_revision(self.add(key), CompareOp::Greater, 0),
        }
    }

    fn op(&self, op: &Op) -> TxnOp {
        match op {
            Op::Put { key, value, lease } => {
                TxnOp::put(self.add(key), value.clone(), Some(PutOptions::new().with_lease(*lease)))
            }
            Op::Delete(key) => TxnOp::delete(self.add(key), None),
            Op::DeletePrefix(prefix) => TxnOp::delete(self.add(prefix), Some(DeleteOptions::new().with_prefix())),
            Op::Get(key) => TxnOp::get(self.add(key), None),
            Op::List(prefix) => TxnOp::get(self.add(prefix), Some(GetOptions::new().with_prefix())),
        }
    }

    pub(super) fn outcome(&self, answer: &etcd_client::TxnResponse) -> TxnOutcome {
        let reads = answer.op_responses().into_iter().filter_map(|response| match response {
            TxnOpResponse::Get(mut get) => Some(get.take_kvs().into_iter().map(|kv| self.strip(kv)).collect()),
            _ => None,
        });
        TxnOutcome {
            succeeded: answer.succeeded(),
            revision: answer.header().map_or(0, etcd_client::ResponseHeader::revision),
            reads: reads.collect(),
        }
    }
}
