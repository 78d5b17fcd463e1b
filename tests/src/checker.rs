//! The history of a store, as [`Judge`](crate::judge::Judge) has seen it, held against the invariants: by the same code as
//! the simulation and the production alarm (`drover_coordinator::invariants`).
//!
//! PURE. It is given the history alone; nothing of the programs under test runs here.

use crate::judge;
use drover_coordinator::{
    invariants::{Checker, Settings},
    store::{Change, Changes, KeyValue},
};
use std::time::Duration;

/// Lag of a judge, and difference of clocks, that is held against nobody.
const SLACK: Duration = Duration::from_secs(5);

/// What in a history, which begins with the store, breaks an invariant; one sentence each. `ttl` is the time to live of
/// sessions, which is the time that a node is given to come back.
#[must_use]
pub fn violations(history: &[judge::Change], ttl: Duration) -> Vec<String> {
    let ms = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
    let mut checker = Checker::new(Settings { grace_ms: ms(ttl), slack_ms: ms(SLACK), orders: false });
    for transaction in history.chunk_by(|one, next| one.revision == next.revision) {
        let Some(first) = transaction.first() else { continue };
        let changes = transaction.iter().map(change).collect();
        checker.store(first.at_ms, &Changes { changes, revision: first.revision });
    }
    checker.violations().iter().map(ToString::to_string).collect()
}

fn change(seen: &judge::Change) -> Change {
    let key = seen.key.clone();
    if seen.deleted {
        return Change::Delete { key, revision: seen.revision };
    }
    Change::Put(KeyValue {
        key,
        value: seen.value.clone(),
        create_revision: seen.create_revision,
        mod_revision: seen.revision,
        version: seen.version,
        lease: seen.lease,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_proto::{
        store::v1::Status,
        v1::{InstanceState, Token},
    };
    use prost::Message as _;

    #[test]
    fn a_report_under_a_token_that_never_stood_is_named() {
        let status = Status {
            token: Some(Token { generation: 1, revision: 2 }),
            node: "a".to_owned(),
            state: InstanceState::Ready.into(),
            ..Status::default()
        };
        let written = judge::Change {
            key: "status/m-222222".to_owned(),
            value: status.encode_to_vec(),
            deleted: false,
            create_revision: 3,
            revision: 3,
            version: 1,
            lease: 0,
            at_ms: 1000,
        };
        let gone = judge::Change { deleted: true, value: vec![], revision: 4, version: 0, ..written.clone() };
        let said = violations(&[written, gone.clone()], Duration::from_secs(10));
        assert!(said.len() == 1 && said[0].starts_with("StaleEffect at revision 3"), "{said:?}");
        assert!(violations(&[gone], Duration::from_secs(10)).is_empty());
    }
}
