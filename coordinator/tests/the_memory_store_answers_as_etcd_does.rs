//! The same random operations on both stores, answer by answer.
//!
//! Prints the seed of each run; `DROVER_SEED=n` repeats one. Revisions are compared relative to the start of the run,
//! leases by the order in which they were granted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of a test are no #[test]"
)]

use drover_coordinator::store::{
    Backend, Change, Compare, Error, KeyValue, Op, Store, Txn, TxnOutcome,
    etcd::{self, Etcd},
    memory::Memory,
};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

const STEPS: usize = 250;
const TIME: Duration = Duration::from_secs(8);
const KEYS: [&str; 8] = ["a", "a/1", "a/2", "a/22", "b/1", "b/2", "c", "é/1"];
const PREFIXES: [&str; 7] = ["", "a", "a/", "a/2", "b/", "é", "none/"];

#[tokio::test]
async fn the_memory_store_answers_as_etcd_does() {
    let server = drover_tests::etcd::Etcd::start().await.unwrap();
    let seeds: Vec<u64> = match std::env::var("DROVER_SEED") {
        Ok(seed) => vec![seed.parse().expect("DROVER_SEED is no number")],
        // Found seeds stay; a few new ones each time.
        Err(_) => [1, 2, 3, 4].into_iter().chain((0..50).map(|_| rand::random::<u32>().into())).collect(),
    };
    let begun = Instant::now();
    let mut runs = 0;
    for seed in seeds {
        println!("DROVER_SEED={seed}");
        let mut settings = etcd::Settings::new(server.endpoints());
        settings.prefix = format!("/differential/{seed}/{runs}/");
        let etcd: Store = Arc::new(Etcd::connect(settings).await.unwrap());
        Pair::new(etcd, seed).await.run().await;
        runs += 1;
        if begun.elapsed() > TIME {
            break;
        }
    }
    println!("{runs} runs of {STEPS} steps");
    assert!(runs > 0);
}

struct Pair {
    etcd: Store,
    memory: Memory,
    random: StdRng,
    seed: u64,
    /// Etcd's revision less the memory's; both move in step.
    offset: i64,
    first_revision: i64,
    /// Granted so far, (etcd's, memory's); revoked ones stay.
    leases: Vec<(i64, i64)>,
    seen: Seen,
}

/// How often each outcome of a transaction was met: a test that met only refusals has shown nothing.
#[derive(Debug, Default)]
struct Seen {
    succeeded: usize,
    otherwise: usize,
    rejected: usize,
    lease_gone: usize,
}

/// A choice in memory's terms: what differs is put in by [`Pair::for_etcd`].
type InMemory<T> = T;

impl Pair {
    async fn new(etcd: Store, seed: u64) -> Self {
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
            leases: vec![],
            seen: Seen::default(),
        }
    }

    async fn run(mut self) {
        let mut live = (
            self.etcd.watch("", self.first_revision + self.offset + 1).await.unwrap(),
            self.memory.watch("", self.first_revision + 1).await.unwrap(),
        );
        for step in 0..STEPS {
            self.step(step).await;
        }
        // A last write that the watches can wait for.
        let end = self.txn_on_both(Txn { then: vec![put("a", 0)], ..Txn::default() }, STEPS).await.unwrap().revision;
        let etcd = self.collect(&mut live.0, end + self.offset).await;
        let memory = self.collect(&mut live.1, end).await;
        self.compare_changes(&etcd, &memory, "the watch open all along", STEPS);
        for prefix in PREFIXES {
            self.replay(prefix, end).await;
        }
        let Seen { succeeded, otherwise, rejected, lease_gone } = self.seen;
        println!("  {succeeded} succeeded, {otherwise} otherwise, {rejected} rejected, {lease_gone} with a dead lease");
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

    async fn txn_on_both(&mut self, txn: InMemory<Txn>, step: usize) -> Result<TxnOutcome, Error> {
        let etcd = self.etcd.txn(self.for_etcd(&txn)).await;
        let memory = self.memory.txn(txn.clone()).await;
        match (etcd, &memory) {
            (Ok(etcd), Ok(memory)) => {
                let reads = etcd.reads.into_iter().map(|kvs| self.all_in_memory(kvs)).collect();
                let etcd = TxnOutcome { succeeded: etcd.succeeded, revision: etcd.revision - self.offset, reads };
                assert_eq!(&etcd, memory, "{}: {txn:?}", self.at(step));
                *(if etcd.succeeded { &mut self.seen.succeeded } else { &mut self.seen.otherwise }) += 1;
            }
            (Err(Error::Rejected(_)), Err(Error::Rejected(_))) => self.seen.rejected += 1,
            (Err(Error::LeaseGone), Err(Error::LeaseGone)) => self.seen.lease_gone += 1,
            (etcd, memory) => panic!("{}: etcd says {etcd:?}, memory {memory:?}: {txn:?}", self.at(step)),
        }
        memory
    }

    /// The changes under a prefix since the beginning and since two other revisions.
    async fn replay(&mut self, prefix: &str, end: i64) {
        for from in [self.first_revision + 1, self.random.random_range(self.first_revision + 1..=end), end] {
            let mut etcd = self.etcd.watch(prefix, from + self.offset).await.unwrap();
            let mut memory = self.memory.watch(prefix, from).await.unwrap();
            // Under most prefixes the last change is an earlier one: the memory's history says which to wait for.
            let Some(last) = self.last_change(prefix, from).await else { continue };
            let etcd = self.collect(&mut etcd, last + self.offset).await;
            let memory = self.collect(&mut memory, last).await;
            self.compare_changes(&etcd, &memory, &format!("replay of {prefix:?} from {from}"), STEPS);
        }
    }

    async fn last_change(&self, prefix: &str, from: i64) -> Option<i64> {
        let mut all = self.memory.watch("", from).await.unwrap();
        let now = self.memory.list("").await.unwrap().revision;
        let mut last = None;
        while let Ok(changes) = all.next().await {
            let under = |change: &Change| match change {
                Change::Put(kv) => kv.key.starts_with(prefix),
                Change::Delete { key, .. } => key.starts_with(prefix),
            };
            if changes.changes.iter().any(under) {
                last = Some(changes.revision);
            }
            if changes.revision >= now {
                break;
            }
        }
        last
    }

    async fn collect(&self, watch: &mut drover_coordinator::store::Watch, until: i64) -> Vec<Change> {
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

    fn compare_changes(&self, etcd: &[Change], memory: &[Change], what: &str, step: usize) {
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

    async fn txn(&mut self) -> InMemory<Txn> {
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

    fn prefix(&mut self) -> String {
        (*PREFIXES.choose(&mut self.random).unwrap()).to_owned()
    }

    fn for_etcd(&self, txn: &InMemory<Txn>) -> Txn {
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

    fn all_in_memory(&self, kvs: Vec<KeyValue>) -> Vec<KeyValue> {
        kvs.into_iter().map(|kv| self.in_memory(kv)).collect()
    }

    fn at(&self, step: usize) -> String {
        format!("seed {} step {step}", self.seed)
    }
}

fn put(key: &str, lease: i64) -> Op {
    Op::Put { key: key.to_owned(), value: format!("value of {key}").into_bytes(), lease }
}

fn revision_of(change: &Change) -> i64 {
    match change {
        Change::Put(kv) => kv.mod_revision,
        Change::Delete { revision, .. } => *revision,
    }
}
