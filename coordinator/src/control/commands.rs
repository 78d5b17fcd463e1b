//! What an operator asks of a node: a mailbox in the store, so that it does not matter which coordinator the node's
//! session is with.
//!
//! The asking coordinator writes `commands/<node>/<id>`; the one that serves the session tells the agent, and writes its
//! answer to `answers/<node>/<id>`. Both hang on one lease of the asking coordinator, which it revokes when it has its
//! answer or has waited long enough, and which runs out by itself should it die: nothing is left, and nothing is carried
//! out later than somebody waits for it. Must never: decide what is asked.

use super::view::View;
use crate::store::{self, Change, Compare, Store, Txn, keys, records};
use drover_proto::{
    store::v1 as record,
    v1::{CommandAnswer, NodeCommand, node_command},
    world,
};
use prost::Message as _;
use std::time::Duration;
use tokio::sync::mpsc;

/// Commands that may wait for one node at a time.
const WAITING_MAX: usize = 16;
/// Largest answer that is kept, in bytes; well below what a transaction of the store may have.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// How much longer than the caller waits the lease lives.
const LEASE_MARGIN: Duration = Duration::from_secs(5);
/// Pause before the store is asked again after an error.
const RETRY: Duration = Duration::from_millis(200);
/// Longest wait until the lease of a command is revoked; one that is not runs out.
const REVOKE: Duration = Duration::from_secs(1);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The node has no session: nothing was sent.
    #[error("node {0} is away: it has no session; look at its agent, then try again")]
    Away(String),
    /// There is no node of that name.
    #[error("there is no node {0}: `drover get nodes` lists them")]
    NoNode(String),
    /// Too much is asked of it at the same time: nothing was sent.
    #[error("{WAITING_MAX} commands wait for node {0} already: try again in a moment")]
    Busy(String),
    /// It was asked, and has not answered in time.
    #[error("node {node} did not answer within {} s: it may have lost its connection; its agent may still act", .after.as_secs())]
    Silent {
        /// Its name.
        node: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The node says that it can't.
    #[error("node {node}: {what}")]
    Failed {
        /// Its name.
        node: String,
        /// Why.
        what: String,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// Asks nodes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Commands {
    store: Store,
    view: View,
}

impl Commands {
    /// Over this store.
    #[must_use]
    pub fn new(store: Store, view: View) -> Self {
        Self { store, view }
    }

    /// Asks a node and waits for its answer.
    ///
    /// # Errors
    /// When there is no such node, it is away, or it does not answer within `wait`.
    pub async fn ask(
        &self,
        node: &str,
        command: node_command::Command,
        wait: Duration,
    ) -> Result<CommandAnswer, Error> {
        let snapshot = self.view.snapshot();
        if !snapshot.nodes.contains_key(node) {
            return Err(Error::NoNode(node.to_owned()));
        }
        if !snapshot.sessions.contains_key(node) {
            return Err(Error::Away(node.to_owned()));
        }
        if snapshot.commands_to(node).count() >= WAITING_MAX {
            return Err(Error::Busy(node.to_owned()));
        }
        let lease = self.store.grant(wait + LEASE_MARGIN).await?;
        let silent = || Error::Silent { node: node.to_owned(), after: wait };
        let answered = tokio::time::timeout(wait, self.exchange(node, command, lease)).await;
        // What can't be revoked runs out.
        match tokio::time::timeout(REVOKE, self.store.revoke(lease)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, node, "the lease of a command is left to run out"),
            Err(_) => tracing::debug!(node, "the lease of a command is left to run out"),
        }
        let answer = answered.map_err(|_| silent())??;
        if answer.error.is_empty() {
            Ok(answer)
        } else {
            Err(Error::Failed { node: node.to_owned(), what: answer.error })
        }
    }

    async fn exchange(&self, node: &str, command: node_command::Command, lease: i64) -> Result<CommandAnswer, Error> {
        let id = world::uuid();
        let asked = record::Command { command: Some(NodeCommand { id: id.clone(), command: Some(command) }), lease };
        let txn = Txn {
            compare: vec![Compare::Exists(keys::session(node))],
            then: vec![records::put(keys::command(node, &id), &asked, lease)],
            otherwise: vec![],
        };
        let outcome = self.store.txn(txn).await?;
        if !outcome.succeeded {
            return Err(Error::Away(node.to_owned()));
        }
        loop {
            match self.answer(&keys::answer(node, &id), outcome.revision).await {
                // The node has been asked and may act: a store that is away for a moment does not change that.
                Err(error @ (store::Error::Unavailable(_) | store::Error::Compacted(_))) => {
                    tracing::debug!(%error, node, "the wait for an answer begins anew");
                    tokio::time::sleep(RETRY).await;
                }
                other => return Ok(other?),
            }
        }
    }

    /// Waits for an answer that was written at this revision or later.
    async fn answer(&self, key: &str, from: i64) -> Result<CommandAnswer, store::Error> {
        let decode = |item: &store::KeyValue| Ok(records::decode::<record::Answer>(item)?.answer.unwrap_or_default());
        let mut watch = self.store.watch(key, from).await?;
        if let Some(item) = self.store.get(key).await? {
            return decode(&item);
        }
        loop {
            for change in watch.next().await?.changes {
                if let Change::Put(item) = change {
                    return decode(&item);
                }
            }
        }
    }
}

/// Writes a node's answers where the asking coordinator waits for them, until nobody sends any more.
pub(super) async fn write_answers(store: Store, view: View, node: String, mut answers: mpsc::Receiver<CommandAnswer>) {
    while let Some(mut answer) = answers.recv().await {
        if answer.encoded_len() > ANSWER_BYTES_MAX {
            let error = format!("its answer has {} bytes, {ANSWER_BYTES_MAX} are allowed", answer.encoded_len());
            answer = CommandAnswer { id: answer.id, error, ..CommandAnswer::default() };
        }
        let snapshot = view.snapshot();
        let Some(asked) = snapshot.commands.get(&format!("{node}/{}", answer.id)) else {
            tracing::debug!(node, id = answer.id, "an answer came that nobody waits for any more");
            continue;
        };
        let (command, key) = (keys::command(&node, &answer.id), keys::answer(&node, &answer.id));
        let value = record::Answer { answer: Some(answer) };
        let txn = Txn {
            compare: vec![Compare::ModRevision(command, asked.mod_revision)],
            then: vec![records::put(key, &value, asked.value.lease)],
            otherwise: vec![],
        };
        if let Err(error) = store.txn(txn).await {
            tracing::warn!(%error, node, "an answer was not written");
        }
    }
}
