//! Which session this node has, at which revision: shared by the stream, which learns it, and the claims, which name it.

use super::stored::{self, Stored};
use crate::instance::{context::Events, machine::Machine};
use crate::mutant;
use drover_proto::{
    v1::{Severity, Token, Welcome},
    world,
};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
    /// Number of the coordinator that serves it in the list of addresses.
    pub coordinator: usize,
}

/// What is said with a hello.
#[derive(Debug, Clone)]
pub struct Introduction {
    /// Random id of this run of the agent.
    pub agent_id: String,
    /// The session to resume; empty for none.
    pub session_id: String,
    /// Id of a session to be opened; empty when the coordinator is to choose it.
    pub next_session_id: String,
    /// The store that is known.
    pub store_id: String,
    /// Its generation.
    pub store_generation: u64,
    /// Highest revision of it that was seen in that generation.
    pub store_revision: i64,
}

/// The session, and what is kept of it on disk.
#[derive(Debug)]
pub struct Identity {
    agent_id: String,
    /// Highest revision of the store seen, as a token: what is not above it is an older copy.
    seen: Mutex<Token>,
    state_dir: PathBuf,
    machine: Arc<dyn Machine>,
    stored: Mutex<Stored>,
    session: watch::Sender<Session>,
    resume: Notify,
}

impl Identity {
    /// Reads what is on disk. A damaged file is set aside: then the node waits for its old session to run out.
    #[must_use]
    pub fn open(state_dir: &Path, machine: Arc<dyn Machine>, events: &Events) -> Self {
        let stored = machine.session(state_dir).unwrap_or_else(|error| {
            let path = stored::path(state_dir);
            let aside = path.with_extension("damaged");
            let moved = std::fs::rename(&path, &aside);
            let message = format!("{error}; set aside as {}: {moved:?}", aside.display());
            events.tell("", "FileDamaged", Severity::Error, message);
            Stored::default()
        });
        let seen = Token { generation: stored.store_generation, revision: stored.store_revision };
        Self {
            agent_id: world::uuid(),
            seen: Mutex::new(seen),
            state_dir: state_dir.to_owned(),
            machine,
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
    pub fn welcome(&self, welcome: &Welcome, coordinator: usize, events: &Events) -> Result<(), String> {
        let mut stored = self.lock();
        self.check_store(&stored, welcome)?;
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
        // One that has become that of a session is used up.
        let used = stored.next_session_id == welcome.session_id;
        let now = Stored {
            session_id: welcome.session_id.clone(),
            store_generation: welcome.store_generation,
            cluster_id: welcome.cluster_id,
            halt_generation: stored.halt_generation,
            store_id: if welcome.store_id.is_empty() { stored.store_id.clone() } else { welcome.store_id.clone() },
            store_revision: welcome.session_revision,
            next_session_id: if used { world::uuid() } else { stored.next_session_id.clone() },
        };
        self.saw(Token { generation: now.store_generation, revision: now.store_revision });
        // The revision alone is no reason to write: what runs here bears tokens, which tell an older store as well.
        if now != (Stored { store_revision: now.store_revision, ..stored.clone() }) {
            if let Err(error) = self.machine.keep_session(&self.state_dir, &now) {
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
                coordinator,
            };
        });
        Ok(())
    }

    /// Refuses another store than the one known, or an older copy of it: what runs here was claimed in that one, and would
    /// be taken for wanted no more.
    fn check_store(&self, stored: &Stored, welcome: &Welcome) -> Result<(), String> {
        if mutant::on(mutant::name::AGENT_IGNORES_STORE_ID) {
            return Ok(());
        }
        let way_out = format!(
            "restore the one that this node knows; if it is lost, end this node's servers (drover-agent down) and remove {}",
            stored::path(&self.state_dir).display()
        );
        if !stored.store_id.is_empty() && !welcome.store_id.is_empty() && stored.store_id != welcome.store_id {
            return Err(format!(
                "the coordinator's store is {}, this node knows store {}: its content was lost and begun anew; {way_out}",
                welcome.store_id, stored.store_id
            ));
        }
        let seen = *self.seen();
        let now = Token { generation: welcome.store_generation, revision: welcome.session_revision };
        if now.generation < seen.generation || (now.generation == seen.generation && now.revision <= seen.revision) {
            return Err(format!(
                "the coordinator's store is at revision {} of generation {}, this node has seen revision {} of generation \
                 {}: an older copy of the store is in use; {way_out}",
                now.revision, now.generation, seen.revision, seen.generation
            ));
        }
        Ok(())
    }

    fn seen(&self) -> MutexGuard<'_, Token> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store has been at this revision.
    pub fn saw(&self, token: Token) {
        let mut seen = self.seen();
        *seen = token.max(*seen);
    }

    /// What an agent says of itself and of the store when it asks for a session. Chooses the id of the session that may be
    /// opened, on disk first: an answer that is lost must not leave a session that nobody knows.
    #[must_use]
    pub fn introduction(&self) -> Introduction {
        let mut stored = self.lock();
        if stored.next_session_id.is_empty() {
            let chosen = Stored { next_session_id: world::uuid(), ..stored.clone() };
            match self.machine.keep_session(&self.state_dir, &chosen) {
                Ok(()) => *stored = chosen,
                Err(error) => {
                    tracing::warn!(%error, "the coordinator chooses the id of a session: none can be kept here")
                }
            }
        }
        let seen = *self.seen();
        Introduction {
            agent_id: self.agent_id.clone(),
            session_id: stored.session_id.clone(),
            next_session_id: stored.next_session_id.clone(),
            store_id: stored.store_id.clone(),
            store_generation: seen.generation,
            store_revision: seen.revision,
        }
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
