//! What must survive the agent about its session and the store: file `session` of the state directory.

use drover_shim::durable;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The session, and the store that it belongs to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Id of the session that this node holds, or held last.
    pub session_id: String,
    /// Generation of the store; one that is older is refused.
    pub store_generation: u64,
    /// Identity of the store's cluster.
    pub cluster_id: u64,
    /// Highest halt generation seen.
    pub halt_generation: u64,
    /// Identity of the store's content; empty while none was told.
    #[serde(default)]
    pub store_id: String,
    /// Revision of the store, in its generation, when this was written.
    #[serde(default)]
    pub store_revision: i64,
    /// Id that the next session to be opened is to have; empty while none was chosen.
    #[serde(default)]
    pub next_session_id: String,
}

/// Path of the file.
#[must_use]
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("session")
}

/// Reads the file; `Err` when it is damaged.
pub fn read(state_dir: &Path) -> Result<Stored, durable::Error> {
    match durable::read(&path(state_dir)) {
        Err(durable::Error::Missing(_)) => Ok(Stored::default()),
        other => other,
    }
}

/// Writes the file; returns after the disk has it.
pub fn write(state_dir: &Path, stored: &Stored) -> Result<(), durable::Error> {
    durable::write(&path(state_dir), stored)
}
