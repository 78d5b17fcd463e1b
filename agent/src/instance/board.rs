//! What is known of every instance of this node, for those who report it.
//!
//! Supervisors write their own entry; the link reads all. Level-triggered: a reader sees the latest state of each
//! instance, never a queue of changes.

use drover_proto::v1::{InstanceState, StatusReport, Token};
use prost_types::Timestamp;
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tokio::sync::watch;

/// An instance as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Token of its run.
    pub token: Token,
    /// Whether that is the token of the standing claim, as far as is known. The registry says so, before the supervisor
    /// hears it.
    pub owned: bool,
    /// State.
    pub state: InstanceState,
    /// Process id; 0 while there is no process.
    pub pid: i32,
    /// Restarts under this claim.
    pub restarts: i32,
    /// What is wrong or waited for.
    pub message: String,
    /// Since when it is in this state.
    pub since: Timestamp,
    /// When it last got on; moves every few seconds at most.
    pub progressed_at: Timestamp,
    /// W3C traceparent of the action that led here.
    pub traceparent: String,
    /// Exit code of the last process that ended by exiting.
    pub exit_code: Option<i32>,
    /// Signal that ended the last process.
    pub exit_signal: Option<i32>,
    /// Memory that it reserves, in bytes.
    pub memory_bytes: i64,
}

impl Entry {
    /// The report of this state.
    #[must_use]
    pub fn report(&self, instance: &str) -> StatusReport {
        StatusReport {
            instance: instance.to_owned(),
            token: Some(self.token),
            state: self.state.into(),
            pid: i64::from(self.pid),
            restarts: self.restarts,
            message: self.message.clone(),
            since: Some(self.since),
            traceparent: self.traceparent.clone(),
            exit_code: self.exit_code,
            exit_signal: self.exit_signal,
            progressed_at: Some(self.progressed_at),
        }
    }
}

/// All instances of this node.
#[derive(Debug)]
pub struct Board {
    entries: Mutex<BTreeMap<String, Entry>>,
    changed: watch::Sender<u64>,
}

impl Default for Board {
    fn default() -> Self {
        Self { entries: Mutex::default(), changed: watch::Sender::new(0) }
    }
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        // Nothing panics while it holds the lock; should it ever, the map is still whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets an entry; nobody is woken when it is the same.
    pub fn set(&self, instance: &str, entry: Entry) {
        let mut entries = self.lock();
        if entries.get(instance) == Some(&entry) {
            return;
        }
        entries.insert(instance.to_owned(), entry);
        drop(entries);
        self.changed.send_modify(|n| *n += 1);
    }

    /// Sets an entry but for its ownership, which stays as the registry has said last.
    pub fn update(&self, instance: &str, mut entry: Entry) {
        let mut entries = self.lock();
        if let Some(before) = entries.get(instance) {
            entry.owned = before.owned;
            if *before == entry {
                return;
            }
        }
        entries.insert(instance.to_owned(), entry);
        drop(entries);
        self.changed.send_modify(|n| *n += 1);
    }

    /// Says whether the claim of an instance is its own.
    pub fn set_owned(&self, instance: &str, owned: bool) {
        let mut entries = self.lock();
        let changed = entries.get_mut(instance).is_some_and(|e| std::mem::replace(&mut e.owned, owned) != owned);
        drop(entries);
        if changed {
            self.changed.send_modify(|n| *n += 1);
        }
    }

    /// Removes an entry.
    pub fn remove(&self, instance: &str) {
        if self.lock().remove(instance).is_some() {
            self.changed.send_modify(|n| *n += 1);
        }
    }

    /// One entry.
    #[must_use]
    pub fn get(&self, instance: &str) -> Option<Entry> {
        self.lock().get(instance).cloned()
    }

    /// All entries.
    #[must_use]
    pub fn all(&self) -> BTreeMap<String, Entry> {
        self.lock().clone()
    }

    /// Wakes with every change.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}
