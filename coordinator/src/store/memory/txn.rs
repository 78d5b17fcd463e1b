//! PURE. Transactions: what etcd refuses, and what the others do.

use super::state::State;
use crate::store::{Change, Compare, Error, OPERATIONS_MAX, Op, REQUEST_BYTES_MAX, Txn, TxnOutcome};
use std::collections::BTreeSet;

/// Does a transaction wholly or not at all.
pub(super) fn execute(state: &mut State, txn: &Txn) -> Result<TxnOutcome, Error> {
    check(txn)?;
    let succeeded = txn.compare.iter().all(|compare| holds(state, compare));
    let ops = if succeeded { &txn.then } else { &txn.otherwise };
    let dead = |op: &Op| matches!(op, Op::Put { lease, .. } if *lease != 0 && !state.has_lease(*lease));
    if ops.iter().any(dead) {
        return Err(Error::LeaseGone);
    }

    let revision = state.revision() + 1;
    let (mut changes, mut reads) = (Vec::new(), Vec::new());
    for op in ops {
        match op {
            Op::Put { key, value, lease } => changes.push(state.put(key, value, *lease, revision)),
            Op::Delete(key) => changes.extend(delete(state, key, revision)),
            Op::DeletePrefix(prefix) => {
                let gone = state.list(prefix);
                changes.extend(gone.iter().filter_map(|kv| delete(state, &kv.key, revision)));
            }
            Op::Get(key) => reads.push(state.get(key).into_iter().collect()),
            Op::List(prefix) => reads.push(state.list(prefix)),
        }
    }
    state.commit(changes);
    Ok(TxnOutcome { succeeded, revision: state.revision(), reads })
}

fn delete(state: &mut State, key: &str, revision: i64) -> Option<Change> {
    state.remove(key).map(|old| Change::Delete { key: old.key, revision })
}

fn holds(state: &State, compare: &Compare) -> bool {
    let mod_revision = |key: &str| state.keys.get(key).map_or(0, |kv| kv.mod_revision);
    let create_revision = |key: &str| state.keys.get(key).map_or(0, |kv| kv.create_revision);
    match compare {
        Compare::ModRevision(key, revision) => mod_revision(key) == *revision,
        Compare::ModRevisionBelow(key, revision) => mod_revision(key) < *revision,
        Compare::CreateRevision(key, revision) => create_revision(key) == *revision,
        Compare::Exists(key) => create_revision(key) > 0,
    }
}

/// etcd looks at both branches, whichever will be done: their size, and that no key is written twice.
fn check(txn: &Txn) -> Result<(), Error> {
    let most = txn.compare.len().max(txn.then.len()).max(txn.otherwise.len());
    if most > OPERATIONS_MAX {
        return Err(Error::Rejected(format!("{most} operations in a transaction; at most {OPERATIONS_MAX}")));
    }
    let bytes: usize = txn.then.iter().chain(&txn.otherwise).map(size).sum();
    if bytes > REQUEST_BYTES_MAX {
        return Err(Error::Rejected(format!("a transaction of {bytes} bytes; at most {REQUEST_BYTES_MAX}")));
    }
    check_keys(&txn.then)?;
    check_keys(&txn.otherwise)
}

fn size(op: &Op) -> usize {
    match op {
        Op::Put { key, value, .. } => key.len() + value.len(),
        Op::Delete(key) | Op::DeletePrefix(key) | Op::Get(key) | Op::List(key) => key.len(),
    }
}

/// A key that is put may be neither put again nor deleted; deleting twice is allowed.
fn check_keys(ops: &[Op]) -> Result<(), Error> {
    let mut seen = BTreeSet::new();
    for op in ops {
        let Op::Put { key, .. } = op else { continue };
        let deleted = ops.iter().any(|other| match other {
            Op::Delete(gone) => gone == key,
            Op::DeletePrefix(prefix) => key.starts_with(prefix.as_str()),
            _ => false,
        });
        if deleted || !seen.insert(key) {
            return Err(Error::Rejected(format!("the key {key} is touched twice in a transaction")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, lease: i64) -> Op {
        Op::Put { key: key.to_owned(), value: b"v".to_vec(), lease }
    }

    #[test]
    fn a_put_with_a_dead_lease_fails_the_whole_transaction() {
        let mut state = State::new(10);
        let txn = Txn { then: vec![put("a", 0), put("b", 99)], ..Txn::default() };
        assert!(matches!(execute(&mut state, &txn), Err(Error::LeaseGone)));
        assert!(state.list("").is_empty());
        assert_eq!(state.revision(), 1);
    }

    #[test]
    fn no_key_is_touched_twice_in_either_branch() {
        let twice = [
            vec![put("a", 0), put("a", 0)],
            vec![put("a", 0), Op::Delete("a".to_owned())],
            vec![Op::DeletePrefix("a".to_owned()), put("ab", 0)],
        ];
        for ops in twice {
            let mut state = State::new(10);
            let then = Txn { then: ops.clone(), ..Txn::default() };
            assert!(matches!(execute(&mut state, &then), Err(Error::Rejected(_))), "{ops:?}");
            let otherwise = Txn { otherwise: ops.clone(), ..Txn::default() };
            assert!(matches!(execute(&mut state, &otherwise), Err(Error::Rejected(_))), "{ops:?}");
        }
    }
}
