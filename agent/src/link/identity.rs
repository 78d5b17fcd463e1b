//! Which session this node has, at which revision: shared by the stream, which learns it, and the claims, which name it.

use super::stored::{self, Stored};
use crate::instance::context::Events;
use drover_proto::v1::{Severity, Welcome};
use std::{
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::{Notify, watch};

/// The session as last learnt.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Session {
    /// Rises by one with every stream that was welcomed; 0 before the first.
    pub number: u64,
    /// Id.
    pub id: String,
    /// Revision of its record.
    pub revision: i64,
}

/// The session, and what is kept of it on disk.
#[derive(Debug)]
pub struct Identity {
    state_dir: PathBuf,
    stored: Mutex<Stored>,
    session: watch::Sender<Session>,
    resume: Notify,
}

impl Identity {
    /// Reads what is on disk. A damaged file is set aside: then the node waits for its old session to run out.
    #[must_use]
    pub fn open(state_dir: &Path, events: &Events) -> Self {
        let stored = stored::read(state_dir).unwrap_or_else(|error| {
            let path = stored::path(state_dir);
            let aside = path.with_extension("damaged");
            let moved = std::fs::rename(&path, &aside);
            let message = format!("{error}; set aside as {}: {moved:?}", aside.display());
            events.tell("", "FileDamaged", Severity::Error, message);
            Stored::default()
        });
        Self {
            state_dir: state_dir.to_owned(),
            stored: Mutex::new(stored),
            session: watch::Sender::new(Session::default()),
            resume: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Stored> {
        // Nothing panics while it holds the lock; should it ever, the value is still whole.
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is on disk.
    #[must_use]
    pub fn stored(&self) -> Stored {
        self.lock().clone()
    }

    /// Takes a welcome, on disk first. `Err` when it is of an older store than this node knows.
    ///
    /// A session that can't be written down is held all the same, and told: the next agent would not know its id and would
    /// wait until it has run out, which costs less than a node without a session for as long as its disk is full.
    pub fn welcome(&self, welcome: &Welcome, events: &Events) -> Result<(), String> {
        let mut stored = self.lock();
        if welcome.store_generation < stored.store_generation {
            return Err(format!(
                "the coordinator's store has generation {}, this node knows generation {}: an older copy of the store is \
                 in use; restore the newer one, or raise the generation with a restore",
                welcome.store_generation, stored.store_generation
            ));
        }
        if welcome.cluster_id != stored.cluster_id
            && stored.cluster_id != 0
            && welcome.store_generation == stored.store_generation
        {
            return Err(format!(
                "the coordinator's store belongs to cluster {:x}, this node knows cluster {:x} with the same generation: \
                 two stores are in use, or the store was made anew; in the latter case end this node's servers \
                 (drover-agent down) and remove {}",
                welcome.cluster_id,
                stored.cluster_id,
                stored::path(&self.state_dir).display()
            ));
        }
        let now = Stored {
            session_id: welcome.session_id.clone(),
            store_generation: welcome.store_generation,
            cluster_id: welcome.cluster_id,
            halt_generation: stored.halt_generation,
        };
        if now != *stored {
            if let Err(error) = stored::write(&self.state_dir, &now) {
                let message = format!("the next agent will have to wait until this session has run out: {error}");
                events.tell("", "SessionNotOnDisk", Severity::Error, message);
            }
            *stored = now;
        }
        self.session.send_modify(|session| {
            *session = Session {
                number: session.number + 1,
                id: welcome.session_id.clone(),
                revision: welcome.session_revision,
            };
        });
        Ok(())
    }

    /// The session as last learnt.
    #[must_use]
    pub fn session(&self) -> Session {
        self.session.borrow().clone()
    }

    /// A newer revision of the session with this id was learnt.
    pub fn moved(&self, id: &str, revision: i64) {
        self.session.send_if_modified(|session| {
            let newer = session.id == id && session.revision < revision;
            if newer {
                session.revision = revision;
            }
            newer
        });
    }

    /// Waits until there is a session.
    pub async fn joined(&self) {
        let mut session = self.session.subscribe();
        let _ = session.wait_for(|session| session.number > 0).await;
    }

    /// Asks the stream to resume the session, which settles what is not known, and waits until it has; at most `within`.
    pub async fn resume(&self, within: Duration) -> bool {
        let mut session = self.session.subscribe();
        let number = session.borrow_and_update().number;
        self.resume.notify_one();
        matches!(tokio::time::timeout(within, session.wait_for(|s| s.number > number)).await, Ok(Ok(_)))
    }

    /// Waits until somebody asks for a resume.
    pub async fn resume_asked(&self) {
        self.resume.notified().await;
    }
}
