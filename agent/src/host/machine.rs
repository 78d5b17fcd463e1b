//! Which machine this is.

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Identity of the machine: a hash of /etc/machine-id, since that file asks not to be shown to others. On a machine
/// without one, of a random id kept in the state directory.
pub fn id(state_dir: &Path) -> anyhow::Result<String> {
    let secret = match own_id() {
        Some(id) => id,
        None => kept(&path(state_dir))?,
    };
    let hash = Sha256::digest(format!("drover machine {secret}").as_bytes());
    Ok(hash[..16].iter().map(|byte| format!("{byte:02x}")).collect())
}

/// File that keeps the identity of a machine without one.
#[must_use]
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("machine-id")
}

/// Whether the machine has an identity of its own.
#[must_use]
pub fn has_own_id() -> bool {
    own_id().is_some()
}

fn own_id() -> Option<String> {
    let text = fs::read_to_string("/etc/machine-id").ok()?;
    Some(text.trim().to_owned()).filter(|id| !id.is_empty())
}

fn kept(path: &Path) -> anyhow::Result<String> {
    use drover_shim::durable;
    match durable::read(path) {
        Ok(id) => Ok(id),
        Err(durable::Error::Missing(_)) => {
            #[allow(clippy::disallowed_methods, reason = "the machine has no identity yet: this is where it gets one")]
            let id = uuid::Uuid::new_v4().to_string();
            durable::write(path, &id)?;
            Ok(id)
        }
        Err(error) => Err(error).context("identity of this machine"),
    }
}

/// Logical processors.
#[must_use]
pub fn cpus() -> i32 {
    std::thread::available_parallelism().map_or(1, |n| i32::try_from(n.get()).unwrap_or(i32::MAX))
}
