//! The history: compaction, and watches that begin anywhere in it.

use super::pair::{PREFIXES, Pair, STEPS, put};
use drover_coordinator::store::{Backend as _, Error, Txn, Watch};
use drover_tests::etcd::Etcd as Server;
use rand::{RngExt as _, seq::IndexedRandom as _};
use std::time::Duration;

/// Longest wait for what a watch is to say.
const WAIT: Duration = Duration::from_secs(10);

/// Forgets the history before a revision that both have.
pub async fn compact(pair: &mut Pair, server: &Server, step: usize) {
    let now = pair.memory.list("").await.unwrap().revision;
    let from = pair.first_revision.max(pair.compacted) + 1;
    if from > now {
        return;
    }
    let at = pair.random.random_range(from..=now);
    server.ctl(&["compaction", &(at + pair.offset).to_string()]).unwrap();
    pair.memory.compact(at).unwrap();
    pair.compacted = at;
    pair.seen.compactions += 1;
    // Once more, and one that is still to come.
    for at in [at, now + 5] {
        let refused = server.ctl(&["compaction", &(at + pair.offset).to_string()]).is_err();
        assert_eq!(refused, pair.memory.compact(at).is_err(), "{}: compaction at {at}", pair.at(step));
    }
    // Something that even a watch from there on has to tell.
    let _ = pair.txn_on_both(Txn { then: vec![put("a", 0)], ..Txn::default() }, step).await;
    // From the revision itself on it is still there; from the one before it is not.
    for from in [at, at - 1, pair.first_revision] {
        let (etcd, memory) = (first_of(pair, true, from).await, first_of(pair, false, from).await);
        assert_eq!(etcd, memory, "{}: a watch from {from} after a compaction at {at}", pair.at(step));
    }
}

/// Whether a watch from a revision is refused, and what is said to be forgotten.
async fn first_of(pair: &Pair, etcd: bool, from: i64) -> Option<i64> {
    let offset = if etcd { pair.offset } else { 0 };
    let opened = if etcd { pair.etcd.watch("", from + offset).await } else { pair.memory.watch("", from).await };
    let first = match opened {
        Ok(mut watch) => tokio::time::timeout(WAIT, watch.next()).await.expect("a watch says nothing").map(drop),
        Err(error) => Err(error),
    };
    match first {
        Ok(()) => None,
        Err(Error::Compacted(at)) => Some(at - offset),
        Err(error) => panic!("seed {}: a watch from {from} ends with {error}", pair.seed),
    }
}

/// A watch that was begun in the middle of a run, on both.
pub struct Watched {
    prefix: &'static str,
    from: i64,
    /// Where the store was then.
    now: i64,
    etcd: Watch,
    memory: Watch,
}

impl Watched {
    /// From a revision that is past, present or still to come. What is past is read at once: it may be forgotten soon.
    pub async fn open(pair: &mut Pair) -> Self {
        let now = pair.memory.list("").await.unwrap().revision;
        let first = first(pair);
        let from = pair.random.random_range(first.min(now)..=now + 3).max(first);
        let prefix = *PREFIXES.choose(&mut pair.random).unwrap();
        let etcd = pair.etcd.watch(prefix, from + pair.offset).await.unwrap();
        let memory = pair.memory.watch(prefix, from).await.unwrap();
        let mut watched = Self { prefix, from, now, etcd, memory };
        watched.compare_until(pair, from, now).await;
        watched
    }

    pub async fn compare(mut self, pair: &Pair, end: i64) {
        self.compare_until(pair, self.from.max(self.now + 1), end).await;
    }

    async fn compare_until(&mut self, pair: &Pair, from: i64, until: i64) {
        let what = format!("a watch of {:?} begun at {} from {}", self.prefix, self.now, self.from);
        compare(pair, (&mut self.etcd, &mut self.memory), self.prefix, (from, until), &what).await;
    }
}

/// The first revision from which both can watch: of the one that was compacted etcd keeps no deletions.
fn first(pair: &Pair) -> i64 {
    pair.first_revision.max(pair.compacted) + 1
}

/// The changes under a prefix since the beginning (as far as that is remembered) and since two other revisions.
pub async fn replay(pair: &mut Pair, prefix: &str, end: i64) {
    let first = first(pair).min(end);
    for from in [first, pair.random.random_range(first..=end), end] {
        let mut etcd = pair.etcd.watch(prefix, from + pair.offset).await.unwrap();
        let mut memory = pair.memory.watch(prefix, from).await.unwrap();
        let what = format!("replay of {prefix:?} from {from}");
        compare(pair, (&mut etcd, &mut memory), prefix, (from, end), &what).await;
    }
}

async fn compare(
    pair: &Pair,
    (etcd, memory): (&mut Watch, &mut Watch),
    prefix: &str,
    (from, until): (i64, i64),
    what: &str,
) {
    // Under most prefixes the last change is an earlier one: the twin's history says which to wait for.
    let Some(last) = last_change(pair, prefix, from, until) else { return };
    let etcd = pair.collect(etcd, last + pair.offset).await;
    let memory = pair.collect(memory, last).await;
    pair.compare_changes(&etcd, &memory, what, STEPS);
}

/// The last change under a prefix, of those that are still remembered.
fn last_change(pair: &Pair, prefix: &str, from: i64, until: i64) -> Option<i64> {
    (from.max(pair.compacted)..=until).rev().find(|revision| {
        let changes = pair.memory.changes(*revision).ok().flatten();
        changes.is_some_and(|changes| changes.changes.iter().any(|change| change.key().starts_with(prefix)))
    })
}
