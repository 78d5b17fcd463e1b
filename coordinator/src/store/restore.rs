//! The last step of a restore: makes of an older copy of a store one in which nothing of what came after it is valid.
//!
//! Revisions go backwards with a restore, and come again with other content. So the generation, the first part of every
//! token, rises above all that were ever given; sessions and claims, which hang on leases of a time that is over, are
//! removed, and so is the leader. Whoever waits with a transaction from before compares the schema's revision, which this
//! writes. The store's id stays: it is the same store, and agents take an older generation for an older copy.
//!
//! Must be done while no coordinator runs.

use super::{
    Compare, Error as StoreError, Op, Store, Txn, keys, records,
    schema::{self, Error},
};
use crate::plan::snapshot::Stored;
use drover_proto::{mutant, store::v1::Schema};

/// Attempts to settle whether it is done, when answers get lost.
const ATTEMPTS: usize = 3;
/// Name of the breakage that leaves the generation as the copy has it.
pub const GENERATION_STAYS: &str = "generation-stays";

/// Raises the generation of a store that was set back to a copy, and removes sessions, claims and the leader; returns what
/// the store is from now on.
///
/// `above` is the highest generation that the store is known to have had, 0 for none beyond the copy's: the copy does not
/// know of a restore that came after it.
///
/// # Errors
/// [`Error::Changed`] for a store that is empty; [`Error::TooOld`] and [`Error::Newer`] for one that this program must leave
/// alone; [`Error::Store`] when it can't be reached.
pub async fn finish(store: &Store, above: u64) -> Result<Stored<Schema>, Error> {
    let mut written: Option<Schema> = None;
    for attempt in 1.. {
        let read = store.get(keys::SCHEMA).await?.as_ref().map(records::stored::<Schema>).transpose()?;
        let found =
            read.ok_or_else(|| Error::Changed("the store is empty: restore a copy into it first".to_owned()))?;
        // An attempt whose answer was lost has taken effect.
        if written.as_ref() == Some(&found.value) {
            return Ok(found);
        }
        schema::check(&found.value)?;
        let raised = Schema { generation: raised(found.value.generation, above), ..found.value };
        let then = vec![
            records::put(keys::SCHEMA, &raised, 0),
            Op::DeletePrefix(keys::SESSIONS.to_owned()),
            Op::DeletePrefix(keys::CLAIMS.to_owned()),
            Op::Delete(keys::LEADER.to_owned()),
        ];
        let compare = vec![Compare::ModRevision(keys::SCHEMA.to_owned(), found.mod_revision)];
        match store.txn(Txn { compare, then, otherwise: vec![] }).await {
            Ok(outcome) if outcome.succeeded => {
                let (generation, revision) = (raised.generation, outcome.revision);
                tracing::info!(
                    generation,
                    revision,
                    "the store goes on from a copy; nothing of what came after it is valid"
                );
                return Ok(Stored { value: raised, create_revision: found.create_revision, mod_revision: revision });
            }
            Err(StoreError::OutcomeUnknown(_)) if attempt < ATTEMPTS => written = Some(raised),
            Ok(_) if attempt < ATTEMPTS => {}
            Ok(_) => break,
            Err(error) => return Err(error.into()),
        }
    }
    let others = "others write to the store at the same time: stop all coordinators, and do this again";
    Err(StoreError::Unavailable(others.to_owned()).into())
}

fn raised(found: u64, above: u64) -> u64 {
    if mutant::on(GENERATION_STAYS) { found } else { found.max(above).saturating_add(1) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Backend as _, memory::Memory};
    use std::{sync::Arc, time::Duration};

    async fn world() -> (Store, Stored<Schema>) {
        let memory = Memory::start(1);
        let store: Store = Arc::new(memory.clone());
        let schema = schema::open(&store, None).await.unwrap();
        let lease = memory.grant(Duration::from_secs(60)).await.unwrap();
        let put = |key: &str, lease| Op::Put { key: key.to_owned(), value: vec![], lease };
        let then = vec![put("sessions/a", lease), put("claims/m-1", lease), put("leader", lease), put("status/m-1", 0)];
        store.txn(Txn { then, ..Txn::default() }).await.unwrap();
        (store, schema)
    }

    #[tokio::test]
    async fn the_generation_rises_and_nobody_owns_anything() {
        let (store, before) = world().await;
        let after = finish(&store, 0).await.unwrap();
        assert_eq!(after.value, Schema { generation: 2, ..before.value.clone() });
        let left = store.list("").await.unwrap();
        assert_eq!(left.items.iter().map(|kv| kv.key.as_str()).collect::<Vec<_>>(), ["schema", "status/m-1"]);
        assert_eq!(left.items[0].mod_revision, after.mod_revision, "what compares it from before is void");
        assert_eq!(schema::open(&store, None).await.unwrap(), after);
        // The same copy once more: it does not know of the first restore.
        assert_eq!(finish(&store, 9).await.unwrap().value.generation, 10);
        assert_eq!(finish(&store, 3).await.unwrap().value.generation, 11);
    }

    #[tokio::test]
    async fn an_empty_store_and_one_of_a_newer_program_are_left_alone() {
        let store: Store = Arc::new(Memory::start(1));
        assert!(matches!(finish(&store, 0).await, Err(Error::Changed(_))));
        assert!(store.list("").await.unwrap().items.is_empty());
        let newer = Schema { generation: 1, format: 1, oldest_writer: 99, id: String::new() };
        let then = vec![records::put(keys::SCHEMA, &newer, 0)];
        store.txn(Txn { then, ..Txn::default() }).await.unwrap();
        assert!(matches!(finish(&store, 0).await, Err(Error::TooOld { .. })));
    }
}
