//! Two transactions at the same time: etcd does one after the other, and the twin gives the same answers in that order.

use super::pair::{InMemory, Pair};
use drover_coordinator::store::{Backend as _, Error, Txn, TxnOutcome, memory::Memory};

/// Sends two transactions together.
pub async fn pair(pair: &mut Pair, step: usize) {
    let (one, other) = (pair.txn().await, pair.txn().await);
    let (first, second) = tokio::join!(pair.etcd.txn(pair.for_etcd(&one)), pair.etcd.txn(pair.for_etcd(&other)));
    pair.seen.pairs += 1;
    let in_order = answers_as(pair, [(&one, &first), (&other, &second)]).await;
    if in_order {
        let _ = pair.txn_on_memory(&one, first, step).await;
        let _ = pair.txn_on_memory(&other, second, step).await;
    } else {
        // Then they were done the other way round, or this fails.
        pair.seen.changed_order += 1;
        let _ = pair.txn_on_memory(&other, second, step).await;
        let _ = pair.txn_on_memory(&one, first, step).await;
    }
}

/// Whether a copy of the twin answers so, in this order.
async fn answers_as(pair: &Pair, both: [(&InMemory<Txn>, &Result<TxnOutcome, Error>); 2]) -> bool {
    let copy = Memory::start(pair.seed);
    copy.restore(&pair.memory.copy(), pair.seed);
    for (txn, etcd) in both {
        let same = match (copy.txn(txn.clone()).await, etcd) {
            (Ok(memory), Ok(etcd)) => memory == pair.outcome_in_memory(etcd.clone()),
            (Err(memory), Err(etcd)) => std::mem::discriminant(&memory) == std::mem::discriminant(etcd),
            _ => false,
        };
        if !same {
            return false;
        }
    }
    true
}
