//! Opening a store: what it is, and whether this program may use it.
//!
//! Records are rewritten by programs that drop fields they don't know. The mark `oldest_writer` keeps those out that would
//! lose something; raising it is the last step of an upgrade.

use super::{Compare, Error as StoreError, Op, Store, Txn, keys, records};
use crate::plan::snapshot::Stored;
use drover_proto::store::v1::Schema;

/// Format of the records that this build reads and writes.
pub const FORMAT: u32 = 1;

/// Attempts to settle whether the key is there, when answers to its creation get lost.
const ATTEMPTS: usize = 3;

/// Why a store can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Programs of this age may not write to it any more.
    #[error(
        "the store accepts writers of format {oldest_writer} or newer, this program writes format {ours}: \
         upgrade it, or give it another store"
    )]
    TooOld {
        /// The store's mark.
        oldest_writer: u32,
        /// Ours.
        ours: u32,
    },
    /// A newer program made it.
    #[error(
        "the store is of format {format}, this program knows formats up to {ours}: upgrade it, or give it another store"
    )]
    Newer {
        /// The store's format.
        format: u32,
        /// Ours.
        ours: u32,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Reads what the store is; an empty one is made generation 1 of this program's format.
///
/// # Errors
/// [`Error::TooOld`] and [`Error::Newer`] when this program must leave it alone, [`Error::Store`] when it can't be read or
/// what it says of itself makes no sense.
pub async fn open(store: &Store) -> Result<Stored<Schema>, Error> {
    let fresh = Schema { generation: 1, format: FORMAT, oldest_writer: FORMAT };
    let create = Txn {
        compare: vec![Compare::CreateRevision(keys::SCHEMA.to_owned(), 0)],
        then: vec![records::put(keys::SCHEMA, &fresh, 0)],
        otherwise: vec![Op::Get(keys::SCHEMA.to_owned())],
    };
    let mut attempts_left = ATTEMPTS;
    let outcome = loop {
        attempts_left -= 1;
        match store.txn(create.clone()).await {
            // If it took effect after all, the next attempt finds the key.
            Err(StoreError::OutcomeUnknown(_)) if attempts_left > 0 => {}
            other => break other?,
        }
    };
    if outcome.succeeded {
        let revision = outcome.revision;
        tracing::info!(revision, format = FORMAT, "the store was empty: it is now generation 1");
        return Ok(Stored { value: fresh, create_revision: revision, mod_revision: revision });
    }
    let corrupt = |what: &str| StoreError::Corrupt { key: keys::SCHEMA.to_owned(), what: what.to_owned() };
    let kv =
        outcome.reads.first().and_then(|kvs| kvs.first()).ok_or_else(|| corrupt("it is there, but was not read"))?;
    let schema: Stored<Schema> = records::stored(kv)?;
    check(&schema.value)?;
    if schema.value.generation == 0 {
        return Err(corrupt("its generation is 0; it begins at 1").into());
    }
    Ok(schema)
}

/// Whether this program may use a store of this kind.
fn check(schema: &Schema) -> Result<(), Error> {
    let (oldest_writer, format, ours) = (schema.oldest_writer, schema.format, FORMAT);
    if oldest_writer > ours {
        return Err(Error::TooOld { oldest_writer, ours });
    }
    if format > ours {
        return Err(Error::Newer { format, ours });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::Memory;
    use std::sync::Arc;

    async fn store_with(schema: &Schema) -> Store {
        let store: Store = Arc::new(Memory::start(1));
        let txn = Txn { then: vec![records::put(keys::SCHEMA, schema, 0)], ..Txn::default() };
        store.txn(txn).await.unwrap();
        store
    }

    #[tokio::test]
    async fn an_empty_store_becomes_generation_one_and_stays_it() {
        let store: Store = Arc::new(Memory::start(1));
        let first = open(&store).await.unwrap();
        assert_eq!(first.value, Schema { generation: 1, format: 1, oldest_writer: 1 });
        assert_eq!(open(&store).await.unwrap(), first);
    }

    #[tokio::test]
    async fn a_store_for_newer_programs_is_refused_with_both_numbers() {
        let store = store_with(&Schema { generation: 3, format: 9, oldest_writer: 8 }).await;
        let error = open(&store).await.unwrap_err();
        assert_eq!(error, Error::TooOld { oldest_writer: 8, ours: FORMAT });
        assert!(error.to_string().contains("format 8") && error.to_string().contains("format 1"), "{error}");

        let store = store_with(&Schema { generation: 3, format: 9, oldest_writer: 1 }).await;
        assert_eq!(open(&store).await.unwrap_err(), Error::Newer { format: 9, ours: FORMAT });
    }

    #[tokio::test]
    async fn a_schema_that_makes_no_sense_is_refused() {
        let store = store_with(&Schema::default()).await;
        assert!(matches!(open(&store).await, Err(Error::Store(StoreError::Corrupt { .. }))));
    }
}
