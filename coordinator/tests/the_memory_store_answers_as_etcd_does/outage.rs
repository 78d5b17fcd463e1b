//! Time and trouble: leases that run out, and a write that etcd answers too late.

use super::{
    Server, connect,
    pair::{Pair, put},
    seeds,
};
use drover_coordinator::store::{Backend as _, Compare, Error, Op, Txn};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// The shortest lease there is.
const TTL: Duration = Duration::from_secs(1);
const WAIT: Duration = Duration::from_secs(30);
/// Pause between two looks at a condition.
const POLL: Duration = Duration::from_millis(20);

fn writes(then: Vec<Op>) -> Txn {
    Txn { then, ..Txn::default() }
}

#[tokio::test]
async fn leases_that_run_out() {
    let server = Server::start().await.unwrap();
    let seed = seeds()[0];
    let mut pair = Pair::new(connect(&server, "leases", Duration::from_secs(5)).await, seed).await;
    let from = pair.first_revision;
    let (mut etcd, mut memory) =
        (pair.etcd.watch("", from + pair.offset + 1).await.unwrap(), pair.memory.watch("", from + 1).await.unwrap());
    // One after the other, so that both stores make the same revisions: what goes together, and what has moved off its lease.
    for round in 0..2 {
        let (of_etcd, of_memory) = (pair.etcd.grant(TTL).await.unwrap(), pair.memory.grant(TTL).await.unwrap());
        pair.leases.push((of_etcd, of_memory));
        assert_eq!(pair.etcd.renew(of_etcd).await, pair.memory.renew(of_memory).await, "the time granted");
        let leased = ["b/2", "a", "a/1", "c"].map(|key| put(key, of_memory)).to_vec();
        pair.txn_on_both(writes(leased), round).await.unwrap();
        pair.txn_on_both(writes(vec![put("c", 0), Op::Delete("a/1".to_owned())]), round).await.unwrap();
        let begun = Instant::now();
        while pair.etcd.get("a").await.unwrap().is_some() || pair.memory.get("a").await.unwrap().is_some() {
            assert!(begun.elapsed() < WAIT, "a lease does not run out");
            sleep(POLL).await;
        }
        assert_eq!(pair.etcd.renew(of_etcd).await, Err(Error::LeaseGone));
        assert_eq!(pair.memory.renew(of_memory).await, Err(Error::LeaseGone));
        let dead = pair.txn_on_both(writes(vec![put("a/2", of_memory)]), round).await;
        assert_eq!(dead, Err(Error::LeaseGone));
    }
    let end = pair.txn_on_both(writes(vec![put("end", 0)]), 2).await.unwrap().revision;
    let etcd = pair.collect(&mut etcd, end + pair.offset).await;
    let memory = pair.collect(&mut memory, end).await;
    pair.compare_changes(&etcd, &memory, "what ran out", 2);
}

/// A write that is under way when etcd is halted has an unknown outcome: it is done whole when etcd goes on, or not at all.
/// What compares a key that was written meanwhile is dead.
#[tokio::test]
async fn a_write_that_is_answered_too_late() {
    let server = Server::start().await.unwrap();
    let mut pair = Pair::new(connect(&server, "late", Duration::from_millis(700)).await, seeds()[0]).await;
    let mut late = 0;
    for round in 0..6_usize {
        let marked = pair.txn_on_both(writes(vec![put("a", 0)]), round).await.unwrap().revision;
        let compare = vec![Compare::ModRevision("a".to_owned(), marked)];
        let txn =
            Txn { compare, then: vec![put("b/1", 0), put("b/2", 0), Op::Delete("c".to_owned())], otherwise: vec![] };
        server.stop().unwrap();
        let outcome = pair.etcd.txn(pair.for_etcd(&txn)).await;
        assert!(matches!(outcome, Err(Error::OutcomeUnknown(_))), "{outcome:?}");
        assert!(matches!(pair.etcd.get("a").await, Err(Error::Unavailable(_))));
        server.cont().unwrap();
        // To settle it: another write to what it compares. Before that or never.
        let settle = writes(vec![put("a", 0)]);
        let begun = Instant::now();
        let settled = loop {
            match pair.etcd.txn(pair.for_etcd(&settle)).await {
                Ok(settled) => break settled.revision - pair.offset,
                Err(error) => assert!(begun.elapsed() < WAIT, "etcd does not go on: {error}"),
            }
            sleep(POLL).await;
        };
        // A settling write may have been unanswered too, and done.
        let before = pair.memory.list("").await.unwrap().revision;
        let done = pair.etcd.get("b/1").await.unwrap().is_some_and(|kv| kv.mod_revision - pair.offset > before);
        late += usize::from(done);
        if done {
            pair.memory.txn(txn).await.unwrap();
        }
        while pair.memory.list("").await.unwrap().revision < settled {
            pair.memory.txn(settle.clone()).await.unwrap();
        }
        let (etcd, memory) = (pair.etcd.list("").await.unwrap(), pair.memory.list("").await.unwrap());
        assert_eq!(etcd.revision - pair.offset, memory.revision, "round {round}: done late: {done}");
        assert_eq!(pair.all_in_memory(etcd.items), memory.items, "round {round}: done late: {done}");
    }
    println!("{late} of 6 were done late");
}
