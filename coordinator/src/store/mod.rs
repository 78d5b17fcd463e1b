//! The store: the only shared truth, and the only module that knows etcd.
//!
//! Owns: the [`Backend`] trait with its two implementations (etcd, and an in-memory twin for simulation and for `drover dev`
//! on a machine without etcd), the names of keys ([`keys`]), the typed form of records ([`records`]) and how several writes
//! share a transaction ([`pack`]). What is written goes through [`guarded`].
//! Must never: decide anything about the fleet. What a transaction compares is its caller's business.

pub mod etcd;
pub mod guarded;
pub mod keys;
pub mod memory;
pub mod pack;
pub mod records;
pub mod restore;
pub mod schema;

use async_trait::async_trait;
use std::{sync::Arc, time::Duration};
use tokio::sync::mpsc;

/// Most operations (and most comparisons) of a transaction; etcd's default.
pub const OPERATIONS_MAX: usize = 128;

/// Most bytes of a transaction; etcd's default.
pub const REQUEST_BYTES_MAX: usize = 1536 * 1024;

/// Changes that a watch holds for its reader before it stops reading the store's stream.
pub const WATCH_QUEUE: usize = 1024;

/// A store, whichever it is.
pub type Store = Arc<dyn Backend>;

/// Why a store did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nothing was done: the store can't be reached, has no leader, or refused the request for now.
    #[error("the store can't be reached: {0}")]
    Unavailable(String),
    /// A write was sent and no answer came: it may have taken effect, or may yet.
    #[error("the store did not answer a write in time, so its outcome is unknown: {0}")]
    OutcomeUnknown(String),
    /// The store is out of space (etcd's NOSPACE alarm): reads work, writes don't.
    #[error("the store is out of space and refuses writes: compact and defragment it, then disarm the alarm ({0})")]
    NoSpace(String),
    /// Nothing was done: it is not the store that was used before.
    #[error("{0}")]
    Changed(String),
    /// The lease is gone: run out or revoked. A transaction that names it changed nothing.
    #[error("the lease has run out")]
    LeaseGone,
    /// History up to this revision was compacted: list again, then watch from there.
    #[error("the store's history was compacted up to revision {0}")]
    Compacted(i64),
    /// The request itself is wrong; a defect of ours.
    #[error("the store refused the request: {0}")]
    Rejected(String),
    /// A record can't be read.
    #[error("the record at {key} can't be decoded: {what}")]
    Corrupt {
        /// Its key.
        key: String,
        /// Why.
        what: String,
    },
}

/// A key with its value and revisions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// Key, without the `/drover/` prefix.
    pub key: String,
    /// Encoded record.
    pub value: Vec<u8>,
    /// Revision at which the key was created.
    pub create_revision: i64,
    /// Revision at which it was last written.
    pub mod_revision: i64,
    /// Writes since it was created, itself included.
    pub version: i64,
    /// Lease that it hangs on; 0 for none.
    pub lease: i64,
}

/// All keys of a range, at one revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// In order of their keys.
    pub items: Vec<KeyValue>,
    /// Revision of the store when they were read.
    pub revision: i64,
}

/// Something that must hold for a transaction to take effect. A key that does not exist has revisions of 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The key was last written at exactly this revision; 0: it does not exist.
    ModRevision(String, i64),
    /// The key was last written before this revision (or does not exist).
    ModRevisionBelow(String, i64),
    /// The key was created at exactly this revision; 0: it does not exist.
    CreateRevision(String, i64),
    /// The key exists.
    Exists(String),
}

/// What a transaction does. A key that is put may not be put again or deleted in the same transaction; reads see what the
/// operations before them did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes a key; `lease` 0 for none.
    Put {
        /// Key.
        key: String,
        /// Encoded record.
        value: Vec<u8>,
        /// Lease to hang it on.
        lease: i64,
    },
    /// Removes a key.
    Delete(String),
    /// Removes all keys that begin so.
    DeletePrefix(String),
    /// Reads a key.
    Get(String),
    /// Reads all keys that begin so.
    List(String),
}

impl Op {
    /// Whether it can change something.
    #[must_use]
    pub const fn writes(&self) -> bool {
        matches!(self, Self::Put { .. } | Self::Delete(_) | Self::DeletePrefix(_))
    }
}

/// One atomic step: if everything compared holds, `then`, else `otherwise`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    /// All must hold.
    pub compare: Vec<Compare>,
    /// Done when they do.
    pub then: Vec<Op>,
    /// Done when one does not.
    pub otherwise: Vec<Op>,
}

impl Txn {
    /// Whether any outcome of it can change something.
    #[must_use]
    pub fn writes(&self) -> bool {
        self.then.iter().chain(&self.otherwise).any(Op::writes)
    }
}

/// What became of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnOutcome {
    /// Whether all compares held.
    pub succeeded: bool,
    /// Revision of the store after it; of the transaction itself when it wrote.
    pub revision: i64,
    /// For each Get and List among the operations done, in their order, what was read.
    pub reads: Vec<Vec<KeyValue>>,
}

/// A change, as a watch delivers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The key was written.
    Put(KeyValue),
    /// The key is gone: deleted, or its lease ran out.
    Delete {
        /// Key.
        key: String,
        /// Revision at which it went.
        revision: i64,
    },
}

impl Change {
    /// The key that it is about.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Put(kv) => &kv.key,
            Self::Delete { key, .. } => key,
        }
    }
}

/// Changes of one revision or of several following ones, in order and never splitting a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// In order.
    pub changes: Vec<Change>,
    /// The store has delivered everything up to this revision.
    pub revision: i64,
}

/// A running watch. It ends with an error, after which its owner lists again and opens another; it does not mend itself.
#[derive(Debug)]
pub struct Watch {
    /// Delivers changes; the channel is bounded, and a reader that falls behind slows only its own watch.
    pub changes: mpsc::Receiver<Result<Changes, Error>>,
}

impl Watch {
    /// The next changes; an error ends the watch.
    pub async fn next(&mut self) -> Result<Changes, Error> {
        self.changes.recv().await.unwrap_or_else(|| Err(Error::Unavailable("the watch ended".to_owned())))
    }
}

/// What Drover needs of a store. Reads are linearizable. Every call has a deadline of its own, set on construction.
#[async_trait]
pub trait Backend: Send + Sync + std::fmt::Debug {
    /// Reads one key.
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, Error>;
    /// Reads all keys that begin so, at one revision.
    async fn list(&self, prefix: &str) -> Result<Listing, Error>;
    /// Does a transaction.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, Error>;
    /// Grants a lease; returns its id.
    async fn grant(&self, ttl: Duration) -> Result<i64, Error>;
    /// Renews a lease once; returns the time to live granted. [`Error::LeaseGone`] when it has run out.
    async fn renew(&self, lease: i64) -> Result<Duration, Error>;
    /// Revokes a lease and removes what hangs on it. No error when it is gone already.
    async fn revoke(&self, lease: i64) -> Result<(), Error>;
    /// Watches all keys that begin so, from `from_revision` on (inclusive).
    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<Watch, Error>;
    /// Identity of the cluster.
    async fn cluster_id(&self) -> Result<u64, Error>;
    /// Whether it refuses writes because it is out of space.
    async fn out_of_space(&self) -> Result<bool, Error> {
        Ok(false)
    }
}
