//! Both stores, and random operations on them.

use super::{
    history::{self, Watched},
    together,
};
use drover_coordinator::store::{
    Backend as _, Change, Compare, Error, KeyValue, Op, Store, Txn, TxnOutcome, memory::Memory,
};
use drover_tests::etcd::Etcd as Server;
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use std::time::Duration;

pub const STEPS: usize = 250;
const KEYS: [&str; 8] = ["a", "a/1", "a/2", "a/22", "b/1", "b/2", "c", "é/1"];
pub const PREFIXES: [&str; 7] = ["", "a", "a/", "a/2", "b/", "é", "none/"];

pub struct Pair {
    pub etcd: Store,
    pub memory: Memory,
    pub random: StdRng,
    pub seed: u64,
    /// Etcd's revision less the memory's; both move in step.
    pub offset: i64,
    pub first_revision: i64,
    /// What is forgotten of the history: a watch from before is refused.
    pub compacted: i64,
    /// Granted so far, (etcd's, memory's); revoked ones stay.
    pub leases: Vec<(i64, i64)>,
    pub seen: Seen,
}

/// How often each outcome of a transaction was met: a test that met only refusals has shown nothing.
#[derive(Debug, Default)]
pub struct Seen {
    succeeded: usize,
    otherwise: usize,
    rejected: usize,
    lease_gone: usize,
    pub compactions: usize,
    pub pairs: usize,
    pub changed_order: usize,
}

/// A choice in memory's terms: what differs is put in by [`Pair::for_etcd`].
pub type InMemory<T> = T;

impl Pair {
    pub async fn new(etcd: Store, seed: u64) -> Self {
        let memory = Memory::start(seed);
        let first_revision = memory.list("").await.unwrap().revision;
        let offset = etcd.list("").await.unwrap().revision - first_revision;
        Self {
            etcd,
            memory,
            random: StdRng::seed_from_u64(seed),
            seed,
            offset,
            first_revision,
            compacted: 0,
            leases: vec![],
            seen: Seen::default(),
        }
    }

    pub async fn run(mut self, server: &Server) {
        let mut live = (
            self.etcd.watch("", self.first_revision + self.offset + 1).await.unwrap(),
            self.memory.watch("", self.first_revision + 1).await.unwrap(),
        );
        let mut midway: Vec<Watched> = vec![];
        for step in 0..STEPS {
            match self.random.random_range(0..80) {
                0 => history::compact(&mut self, server, step).await,
                1..=3 => midway.push(Watched::open(&mut self).await),
                4..=9 => together::pair(&mut self, step).await,
                _ => self.step(step).await,
            }
        }
        // A last write that the watches can wait for.
        let end = self.txn_on_both(Txn { then: vec![put("a", 0)], ..Txn::default() }, STEPS).await.unwrap().revision;
        let etcd = self.collect(&mut live.0, end + self.offset).await;
        let memory = self.collect(&mut live.1, end).await;
        self.compare_changes(&etcd, &memory, "the watch open all along", STEPS);
        for watched in midway {
            watched.compare(&self, end).await;
        }
        for prefix in PREFIXES {
            history::replay(&mut self, prefix, end).await;
        }
        println!("  {:?}", self.seen);
        let Seen { succeeded, otherwise, rejected, lease_gone, .. } = self.seen;
        assert!(succeeded > STEPS / 8 && otherwise > STEPS / 16 && rejected > 0 && lease_gone > 0);
    }

    async fn step(&mut self, step: usize) {
        match self.random.random_range(0..20) {
            0 => {
                let key = self.key();
                let (etcd, memory) = (self.etcd.get(&key).await.unwrap(), self.memory.get(&key).await.unwrap());
                assert_eq!(etcd.map(|kv| self.in_memory(kv)), memory, "{}: get {key}", self.at(step));
            }
            1 => {
                let prefix = self.prefix();
                let (etcd, memory) = (self.etcd.list(&prefix).await.unwrap(), self.memory.list(&prefix).await.unwrap());
                assert_eq!(etcd.revision - self.offset, memory.revision, "{}: list {prefix}", self.at(step));
                assert_eq!(self.all_in_memory(etcd.items), memory.items, "{}: list {prefix}", self.at(step));
            }
            2 => {
                let ttl = Duration::from_secs(self.random.random_range(100..200));
                self.leases.push((self.etcd.grant(ttl).await.unwrap(), self.memory.grant(ttl).await.unwrap()));
            }
            3 => {
                let Some(&(etcd, memory)) = self.leases.choose(&mut self.random) else { return };
                assert_eq!(self.etcd.renew(etcd).await, self.memory.renew(memory).await, "{}: renew", self.at(step));
            }
            4 => {
                let Some(&(etcd, memory)) = self.leases.choose(&mut self.random) else { return };
                assert_eq!(self.etcd.revoke(etcd).await, self.memory.revoke(memory).await, "{}: revoke", self.at(step));
            }
            _ => {
                let txn = self.txn().await;
                let _ = self.txn_on_both(txn, step).await;
            }
        }
    }

    pub async fn txn_on_both(&mut self, txn: InMemory<Txn>, step: usize) -> Result<TxnOutcome, Error> {
        let etcd = self.etcd.txn(self.for_etcd(&txn)).await;
        self.txn_on_memory(&txn, etcd, step).await
    }

    /// Does on the twin what etcd has answered so.
    pub async fn txn_on_memory(
        &mut self,
        txn: &InMemory<Txn>,
        etcd: Result<TxnOutcome, Error>,
        step: usize,
    ) -> Result<TxnOutcome, Error> {
        let memory = self.memory.txn(txn.clone()).await;
        match (etcd, &memory) {
            (Ok(etcd), Ok(memory)) => {
                let etcd = self.outcome_in_memory(etcd);
                assert_eq!(&etcd, memory, "{}: {txn:?}", self.at(step));
                *(if etcd.succeeded { &mut self.seen.succeeded } else { &mut self.seen.otherwise }) += 1;
            }
            (Err(Error::Rejected(_)), Err(Error::Rejected(_))) => self.seen.rejected += 1,
            (Err(Error::LeaseGone), Err(Error::LeaseGone)) => self.seen.lease_gone += 1,
            (etcd, memory) => panic!("{}: etcd says {etcd:?}, memory {memory:?}: {txn:?}", self.at(step)),
        }
        memory
    }

    pub async fn collect(&self, watch: &mut drover_coordinator::store::Watch, until: i64) -> Vec<Change> {
        let mut all: Vec<Change> = vec![];
        loop {
            let next = tokio::time::timeout(Duration::from_secs(10), watch.next()).await;
            let changes =
                next.unwrap_or_else(|_| panic!("seed {}: the watch did not reach {until}", self.seed)).unwrap();
            let last = all.last().map_or(0, revision_of);
            let first = changes.changes.first().map_or(changes.revision, revision_of);
            assert!(first > last, "seed {}: revision {last} was split", self.seed);
            all.extend(changes.changes);
            if changes.revision >= until {
                return all;
            }
        }
    }

    pub fn compare_changes(&self, etcd: &[Change], memory: &[Change], what: &str, step: usize) {
        let etcd: Vec<_> = etcd
            .iter()
            .map(|change| match change {
                Change::Put(kv) => Change::Put(self.in_memory(kv.clone())),
                Change::Delete { key, revision } => {
                    Change::Delete { key: key.clone(), revision: revision - self.offset }
                }
            })
            .collect();
        assert_eq!(etcd, memory, "{}: {what}", self.at(step));
    }

    pub async fn txn(&mut self) -> InMemory<Txn> {
        let mut txn = Txn::default();
        for _ in 0..self.random.random_range(0..3) {
            let compare = self.compare().await;
            txn.compare.push(compare);
        }
        for _ in 0..self.random.random_range(0..5) {
            let op = self.op();
            txn.then.push(op);
        }
        for _ in 0..self.random.random_range(0..3) {
            let op = self.op();
            txn.otherwise.push(op);
        }
        txn
    }

    /// Holds about as often as not: mostly the key's own revisions, and some beside them.
    async fn compare(&mut self) -> InMemory<Compare> {
        let key = self.key();
        let (created, modified) =
            self.memory.get(&key).await.unwrap().map_or((0, 0), |kv| (kv.create_revision, kv.mod_revision));
        let beside = *[0, 0, 0, 1, -1].choose(&mut self.random).unwrap();
        match self.random.random_range(0..5) {
            0 => Compare::ModRevision(key, (modified + beside).max(0)),
            1 => Compare::ModRevisionBelow(key, (modified + beside + 1).max(0)),
            2 => Compare::CreateRevision(key, (created + beside).max(0)),
            3 => Compare::CreateRevision(key, 0),
            _ => Compare::Exists(key),
        }
    }

    fn op(&mut self) -> InMemory<Op> {
        match self.random.random_range(0..10) {
            0..5 => {
                let lease = if self.random.random_bool(0.3) { self.lease() } else { 0 };
                put(&self.key(), lease)
            }
            5 | 6 => Op::Delete(self.key()),
            7 => Op::DeletePrefix(self.prefix()),
            8 => Op::Get(self.key()),
            _ => Op::List(self.prefix()),
        }
    }

    /// Live, revoked, or never granted.
    fn lease(&mut self) -> i64 {
        let granted = self.leases.choose(&mut self.random).map_or(77_777, |(_, memory)| *memory);
        if self.random.random_bool(0.1) { 77_777 } else { granted }
    }

    fn key(&mut self) -> String {
        (*KEYS.choose(&mut self.random).unwrap()).to_owned()
    }

    pub fn prefix(&mut self) -> String {
        (*PREFIXES.choose(&mut self.random).unwrap()).to_owned()
    }

    pub fn for_etcd(&self, txn: &InMemory<Txn>) -> Txn {
        let revision = |revision: &i64| if *revision == 0 { 0 } else { revision + self.offset };
        let compare = txn.compare.iter().map(|compare| match compare {
            Compare::ModRevision(key, r) => Compare::ModRevision(key.clone(), revision(r)),
            Compare::ModRevisionBelow(key, r) => Compare::ModRevisionBelow(key.clone(), revision(r)),
            Compare::CreateRevision(key, r) => Compare::CreateRevision(key.clone(), revision(r)),
            Compare::Exists(key) => Compare::Exists(key.clone()),
        });
        let op = |op: &Op| match op {
            Op::Put { key, value, lease } => {
                let known = self.leases.iter().find(|(_, memory)| memory == lease);
                Op::Put { key: key.clone(), value: value.clone(), lease: known.map_or(*lease, |(etcd, _)| *etcd) }
            }
            other => other.clone(),
        };
        Txn {
            compare: compare.collect(),
            then: txn.then.iter().map(op).collect(),
            otherwise: txn.otherwise.iter().map(op).collect(),
        }
    }

    fn in_memory(&self, kv: KeyValue) -> InMemory<KeyValue> {
        let lease = self.leases.iter().find(|(etcd, _)| *etcd == kv.lease).map_or(kv.lease, |(_, memory)| *memory);
        KeyValue {
            create_revision: kv.create_revision - self.offset,
            mod_revision: kv.mod_revision - self.offset,
            lease,
            ..kv
        }
    }

    pub fn outcome_in_memory(&self, etcd: TxnOutcome) -> InMemory<TxnOutcome> {
        let reads = etcd.reads.into_iter().map(|kvs| self.all_in_memory(kvs)).collect();
        TxnOutcome { succeeded: etcd.succeeded, revision: etcd.revision - self.offset, reads }
    }

    pub fn all_in_memory(&self, kvs: Vec<KeyValue>) -> Vec<KeyValue> {
        kvs.into_iter().map(|kv| self.in_memory(kv)).collect()
    }

    pub fn at(&self, step: usize) -> String {
        format!("seed {} step {step}", self.seed)
    }
}

pub fn put(key: &str, lease: i64) -> Op {
    Op::Put { key: key.to_owned(), value: format!("value of {key}").into_bytes(), lease }
}

pub fn revision_of(change: &Change) -> i64 {
    match change {
        Change::Put(kv) => kv.mod_revision,
        Change::Delete { revision, .. } => *revision,
    }
}
