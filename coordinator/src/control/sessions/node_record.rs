//! What the store keeps of a node, brought up to date while its session goes on. Level-triggered: the last thing told is
//! written, and tried again until it is; whoever tells it never waits for the store.

use crate::store::{Compare, Error, Store, Txn, keys, records};
use drover_proto::{
    store::v1 as record,
    v1::{Capacity, ModelInventory},
};
use prost_types::Timestamp;
use std::time::Duration;
use tokio::sync::watch;

/// Pause after a write that failed.
const RETRY: Duration = Duration::from_secs(1);
const ATTEMPTS: usize = 3;

/// What is to be recorded; what is `None` stays as it was when the node joined.
#[derive(Debug, Clone, Default)]
pub(in crate::control) struct Told {
    pub(in crate::control) models: Option<ModelInventory>,
    pub(in crate::control) alive: Option<Vec<record::UnclaimedRun>>,
    /// Session in which what it says of its runs is all that there is to say.
    pub(in crate::control) inventory_of: Option<String>,
    pub(in crate::control) capacity: Option<Capacity>,
}

/// Keeps the record as told until nobody tells any more, or until the node has joined anew: then another stream does.
/// `joined_at` is when it joined on this stream, `schema` the revision of the store's schema then.
pub(in crate::control) async fn keep(
    store: Store,
    node: String,
    (joined_at, schema): (Option<Timestamp>, i64),
    mut told: watch::Receiver<Told>,
) {
    while told.changed().await.is_ok() {
        loop {
            let now = told.borrow_and_update().clone();
            match write(&store, &node, (joined_at, schema), &now).await {
                Ok(true) => break,
                Ok(false) => return,
                Err(error) => tracing::warn!(%error, node, "the node's record is not up to date yet"),
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// False when the record is another stream's by now, or gone.
async fn write(
    store: &Store,
    node: &str,
    (joined_at, schema): (Option<Timestamp>, i64),
    told: &Told,
) -> Result<bool, Error> {
    let key = keys::node(node);
    for _ in 0..ATTEMPTS {
        let Some(stored) = store.get(&key).await? else { return Ok(false) };
        let before = records::decode::<record::Node>(&stored)?;
        if before.joined_at != joined_at {
            return Ok(false);
        }
        let mut after = before.clone();
        if let Some(models) = &told.models {
            after.models = Some(models.clone());
        }
        if let Some(alive) = &told.alive {
            after.unclaimed.clone_from(alive);
        }
        if let Some(session) = &told.inventory_of {
            after.inventory_of.clone_from(session);
        }
        if let Some(capacity) = &told.capacity {
            after.capacity = Some(capacity.clone());
        }
        if after == before {
            return Ok(true);
        }
        let compare = vec![
            Compare::ModRevision(key.clone(), stored.mod_revision),
            Compare::ModRevision(keys::SCHEMA.to_owned(), schema),
        ];
        let txn = Txn { compare, then: vec![records::put(key.clone(), &after, 0)], otherwise: vec![] };
        if store.txn(txn).await?.succeeded {
            return Ok(true);
        }
    }
    Err(Error::Unavailable(format!("the record was changed by others {ATTEMPTS} times in a row")))
}
