//! What Drover relies on, asked of both stores: the end of leases, compaction, and limits.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of a test are no #[test]")]

use drover_coordinator::store::{
    Change, Error, OPERATIONS_MAX, Op, REQUEST_BYTES_MAX, Store, Txn, Watch,
    etcd::{self, Etcd},
    memory::Memory,
};
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, timeout};

fn put(key: &str, lease: i64) -> Op {
    Op::Put { key: key.to_owned(), value: b"v".to_vec(), lease }
}

async fn write(store: &Store, then: Vec<Op>) -> i64 {
    store.txn(Txn { then, ..Txn::default() }).await.unwrap().revision
}

async fn next(watch: &mut Watch) -> Result<Vec<Change>, Error> {
    timeout(Duration::from_secs(20), watch.next()).await.expect("nothing came").map(|changes| changes.changes)
}

async fn real(server: &drover_tests::etcd::Etcd) -> Store {
    Arc::new(Etcd::connect(etcd::Settings::new(server.endpoints())).await.unwrap())
}

async fn a_lease_ends_with_all_its_keys_at_once(store: Store) {
    let lease = store.grant(Duration::from_secs(2)).await.unwrap();
    assert_eq!(store.renew(lease).await, Ok(Duration::from_secs(2)));
    for key in ["claims/2", "claims/1", "sessions/a"] {
        write(&store, vec![put(key, lease)]).await;
    }
    // One that moves off the lease stays.
    let last = write(&store, vec![put("sessions/a", 0)]).await;
    let mut watch = store.watch("", last + 1).await.unwrap();
    // Renewed when half of its time is over, so that it ends later than it would have.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(store.renew(lease).await, Ok(Duration::from_secs(2)));
    let renewed = Instant::now();

    let revision = last + 1;
    let gone = |key: &str| Change::Delete { key: key.to_owned(), revision };
    assert_eq!(next(&mut watch).await, Ok(vec![gone("claims/1"), gone("claims/2")]));
    assert!(renewed.elapsed() > Duration::from_millis(1_900), "it ended after {:?}", renewed.elapsed());

    assert_eq!(store.renew(lease).await, Err(Error::LeaseGone));
    let late = Txn { then: vec![put("x", 0), put("claims/1", lease)], ..Txn::default() };
    assert_eq!(store.txn(late).await, Err(Error::LeaseGone));
    assert_eq!(store.revoke(lease).await, Ok(()));
    let left = store.list("").await.unwrap();
    assert_eq!(left.revision, revision);
    assert_eq!(left.items.iter().map(|kv| kv.key.as_str()).collect::<Vec<_>>(), ["sessions/a"]);
}

#[tokio::test]
async fn a_lease_of_etcd_ends_with_all_its_keys_at_once() {
    let server = drover_tests::etcd::Etcd::start().await.unwrap();
    a_lease_ends_with_all_its_keys_at_once(real(&server).await).await;
}

#[tokio::test(start_paused = true)]
async fn a_lease_in_memory_ends_with_all_its_keys_at_once() {
    a_lease_ends_with_all_its_keys_at_once(Arc::new(Memory::start(1))).await;
}

/// Writes, compacts by the means given, and looks from where a watch may begin.
async fn compacted_history_is_refused<C: AsyncFnOnce(i64)>(store: Store, compact: C) {
    let first = write(&store, vec![put("a", 0)]).await;
    for _ in 0..5 {
        write(&store, vec![put("a", 0)]).await;
    }
    let mut early = store.watch("", first).await.unwrap();
    assert!(next(&mut early).await.is_ok());
    compact(first + 3).await;

    let mut late = store.watch("", first + 2).await.unwrap();
    assert_eq!(next(&mut late).await, Err(Error::Compacted(first + 3)));
    let mut in_time = store.watch("", first + 3).await.unwrap();
    let Ok(changes) = next(&mut in_time).await else { panic!("refused") };
    let Change::Put(kv) = &changes[0] else { panic!("{changes:?}") };
    assert_eq!(kv.mod_revision, first + 3);
    assert_eq!(store.list("").await.unwrap().revision, first + 5);
}

#[tokio::test]
async fn compacted_history_is_refused_by_etcd() {
    let server = drover_tests::etcd::Etcd::start().await.unwrap();
    let endpoints = server.endpoints();
    compacted_history_is_refused(real(&server).await, async |revision| {
        let mut client = etcd_client::Client::connect(endpoints, None).await.unwrap();
        client.compact(revision, None).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn compacted_history_is_refused_by_the_memory() {
    let memory = Memory::start(1);
    compacted_history_is_refused(Arc::new(memory.clone()), async |revision| memory.compact(revision).unwrap()).await;
}

async fn a_transaction_beyond_the_limits_is_rejected_whole(store: Store) {
    let many = |n: usize| (0..n).map(|i| put(&format!("k/{i:04}"), 0)).collect::<Vec<_>>();
    let rejected = |result: Result<_, Error>| matches!(result, Err(Error::Rejected(_)));
    assert!(rejected(store.txn(Txn { then: many(OPERATIONS_MAX + 1), ..Txn::default() }).await));
    for bytes in [REQUEST_BYTES_MAX + 1, 4 * REQUEST_BYTES_MAX] {
        let big = Op::Put { key: "big".to_owned(), value: vec![7; bytes], lease: 0 };
        assert!(rejected(store.txn(Txn { then: vec![put("small", 0), big], ..Txn::default() }).await), "{bytes}");
    }
    assert_eq!(store.list("").await.unwrap().items, []);
    write(&store, many(OPERATIONS_MAX)).await;
    assert_eq!(store.list("k/").await.unwrap().items.len(), OPERATIONS_MAX);
}

#[tokio::test]
async fn both_reject_a_transaction_beyond_the_limits() {
    let server = drover_tests::etcd::Etcd::start().await.unwrap();
    a_transaction_beyond_the_limits_is_rejected_whole(real(&server).await).await;
    a_transaction_beyond_the_limits_is_rejected_whole(Arc::new(Memory::start(1))).await;
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_falls_behind_a_bounded_history_is_told() {
    let store: Store = Arc::new(Memory::with_history(1, 10));
    let mut watch = store.watch("", 1).await.unwrap();
    for _ in 0..2_000 {
        write(&store, vec![put("a", 0)]).await;
    }
    let error = loop {
        match next(&mut watch).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Compacted(_)), "{error}");
}
