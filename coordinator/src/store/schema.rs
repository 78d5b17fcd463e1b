//! Opening a store: what it is, and whether this program may use it.
//!
//! Records are rewritten by programs that drop fields they don't know. The mark `oldest_writer` keeps those out that would
//! lose something; raising it is the last step of an upgrade.

use super::{Compare, Error as StoreError, Op, Store, Txn, keys, records};
use crate::plan::snapshot::{Snapshot, Stored};
use drover_proto::{store::v1::Schema, world};
use serde::{Deserialize, Serialize};

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
    /// It is not the store that this program knows.
    #[error("{0}")]
    Changed(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a program remembers of the store that it has used, so as not to take another one for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// The store's id.
    pub id: String,
    /// Its generation.
    pub generation: u64,
    /// A revision that it has reached in that generation.
    pub revision: i64,
}

impl Known {
    /// What is known of the store of this snapshot; `None` while that shows none.
    #[must_use]
    pub fn of(snapshot: &Snapshot) -> Option<Self> {
        let schema = &snapshot.schema.as_ref()?.value;
        Some(Self { id: schema.id.clone(), generation: schema.generation, revision: snapshot.revision })
    }

    /// Why a store that says this of itself, at this revision, is not the one that is known, or an older copy of it.
    /// A restore raises the generation: then revisions begin anew.
    #[must_use]
    pub fn gone_back(&self, schema: Option<&Schema>, revision: i64) -> Option<String> {
        let Self { id, generation, revision: seen } = self;
        let Some(schema) = schema else {
            return Some(format!(
                "the store is empty, and was store {id} of generation {generation}: its content is lost"
            ));
        };
        // A store that an older program has begun had no id at first.
        if !id.is_empty() && schema.id != *id {
            return Some(format!(
                "this is store {}, and it was store {id}: its content was lost and begun anew",
                schema.id
            ));
        }
        if schema.generation < *generation {
            let now = schema.generation;
            return Some(format!(
                "the store is of generation {now}, and was of generation {generation}: it is an older copy"
            ));
        }
        (schema.generation == *generation && revision < *seen).then(|| {
            format!(
                "the store is at revision {revision}, and was at {seen} of the same generation: it is an older copy"
            )
        })
    }
}

/// Why a program that used the store up to the last snapshot must not go on with this one.
#[must_use]
pub fn regressed(last: &Snapshot, now: &Snapshot) -> Option<String> {
    let schema = now.schema.as_ref().map(|stored| &stored.value);
    let back = Known::of(last).and_then(|known| known.gone_back(schema, now.revision));
    back.or_else(|| check(schema?).err().map(|error| error.to_string()))
}

/// Reads what the store is; an empty one is made generation 1 of this program's format, unless another one is `known`.
///
/// # Errors
/// [`Error::TooOld`] and [`Error::Newer`] when this program must leave it alone, [`Error::Changed`] when it is not the store
/// that is known, [`Error::Store`] when it can't be read or what it says of itself makes no sense.
pub async fn open(store: &Store, known: Option<&Known>) -> Result<Stored<Schema>, Error> {
    let read = Txn { then: vec![Op::Get(keys::SCHEMA.to_owned())], ..Txn::default() };
    let read = store.txn(read).await?;
    let there = read.reads.first().and_then(|kvs| kvs.first()).map(records::stored::<Schema>).transpose()?;
    if let Some(why) = known.and_then(|known| known.gone_back(there.as_ref().map(|s| &s.value), read.revision)) {
        return Err(Error::Changed(why));
    }
    let fresh = Schema { generation: 1, format: FORMAT, oldest_writer: FORMAT, id: world::uuid() };
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
    if schema.value.id.is_empty() { name(store, schema).await } else { Ok(schema) }
}

/// Gives an id to a store that an older program has begun.
async fn name(store: &Store, schema: Stored<Schema>) -> Result<Stored<Schema>, Error> {
    let named = Schema { id: world::uuid(), ..schema.value };
    let put = Txn {
        compare: vec![Compare::ModRevision(keys::SCHEMA.to_owned(), schema.mod_revision)],
        then: vec![records::put(keys::SCHEMA, &named, 0)],
        otherwise: vec![Op::Get(keys::SCHEMA.to_owned())],
    };
    let outcome = store.txn(put).await?;
    if outcome.succeeded {
        return Ok(Stored { value: named, mod_revision: outcome.revision, ..schema });
    }
    // Another one has named it at the same moment.
    let read = outcome.reads.first().and_then(|kvs| kvs.first());
    let gone = || StoreError::Unavailable("the store was begun anew while it was opened: start again".to_owned());
    Ok(records::stored(read.ok_or_else(gone)?)?)
}

/// Whether this program may use a store of this kind.
pub(super) fn check(schema: &Schema) -> Result<(), Error> {
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

    fn schema(generation: u64, id: &str) -> Schema {
        Schema { generation, format: FORMAT, oldest_writer: FORMAT, id: id.to_owned() }
    }

    async fn store_with(schema: &Schema) -> Store {
        let store: Store = Arc::new(Memory::start(1));
        let txn = Txn { then: vec![records::put(keys::SCHEMA, schema, 0)], ..Txn::default() };
        store.txn(txn).await.unwrap();
        store
    }

    #[tokio::test]
    async fn an_empty_store_becomes_generation_one_and_stays_it() {
        let store: Store = Arc::new(Memory::start(1));
        let first = open(&store, None).await.unwrap();
        let id = first.value.id.clone();
        assert_eq!(first.value, Schema { generation: 1, format: 1, oldest_writer: 1, id: id.clone() });
        assert!(id.len() > 30, "{id}");
        assert_eq!(open(&store, None).await.unwrap(), first);
    }

    #[tokio::test]
    async fn a_store_that_has_no_id_gets_one_and_keeps_it() {
        let store = store_with(&schema(2, "")).await;
        let named = open(&store, None).await.unwrap();
        assert!(!named.value.id.is_empty() && named.value.generation == 2);
        assert_eq!(open(&store, None).await.unwrap(), named);
    }

    #[tokio::test]
    async fn a_store_that_was_lost_is_not_begun_anew_for_a_program_that_knows_it() {
        let known = Known { id: "one".to_owned(), generation: 3, revision: 50 };
        let empty: Store = Arc::new(Memory::start(1));
        let error = open(&empty, Some(&known)).await.unwrap_err();
        assert!(matches!(&error, Error::Changed(why) if why.contains("store one of generation 3")), "{error}");
        assert_eq!(empty.get(keys::SCHEMA).await.unwrap(), None, "nothing was written");
    }

    #[test]
    fn what_is_another_store_or_an_older_copy_is_told_from_what_was_restored() {
        let at = |schema: Option<Schema>, revision| Snapshot {
            schema: schema.map(|value| Arc::new(Stored { value, create_revision: 1, mod_revision: 1 })),
            revision,
            ..Snapshot::default()
        };
        let last = at(Some(schema(3, "one")), 50);
        let why = |now: &Snapshot| regressed(&last, now).unwrap_or_default();
        assert_eq!(why(&at(Some(schema(3, "one")), 50)), "");
        assert_eq!(why(&at(Some(schema(4, "one")), 9)), "", "a restore");
        assert!(why(&at(None, 51)).contains("is empty"));
        assert!(why(&at(Some(schema(3, "two")), 51)).contains("store two, and it was store one"));
        assert!(why(&at(Some(schema(9, "two")), 51)).contains("begun anew"), "whatever generation it says");
        assert!(why(&at(Some(schema(2, "one")), 51)).contains("generation 2"));
        assert!(why(&at(Some(schema(3, "one")), 49)).contains("revision 49, and was at 50"));
        let closed = Schema { oldest_writer: FORMAT + 1, ..schema(3, "one") };
        assert!(why(&at(Some(closed), 51)).contains("upgrade it"), "the mark was raised meanwhile");
        // Who knows nothing yet takes what there is; who knew a store before it had an id, too.
        assert_eq!(regressed(&Snapshot::default(), &last), None);
        assert_eq!(regressed(&at(Some(schema(3, "")), 50), &last), None);
    }

    #[tokio::test]
    async fn a_store_for_newer_programs_is_refused_with_both_numbers() {
        let store = store_with(&Schema { format: 9, oldest_writer: 8, ..schema(3, "s") }).await;
        let error = open(&store, None).await.unwrap_err();
        assert_eq!(error, Error::TooOld { oldest_writer: 8, ours: FORMAT });
        assert!(error.to_string().contains("format 8") && error.to_string().contains("format 1"), "{error}");

        let store = store_with(&Schema { format: 9, oldest_writer: 1, ..schema(3, "s") }).await;
        assert_eq!(open(&store, None).await.unwrap_err(), Error::Newer { format: 9, ours: FORMAT });
    }

    #[tokio::test]
    async fn a_schema_that_makes_no_sense_is_refused() {
        let store = store_with(&Schema::default()).await;
        assert!(matches!(open(&store, None).await, Err(Error::Store(StoreError::Corrupt { .. }))));
    }
}
