//! Which machine this is.

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};
use std::{fs, path::Path};

/// Identity of the machine: a hash of /etc/machine-id, since that file asks not to be shown to others. On a machine
/// without one, of a random id kept in the state directory.
pub fn id(state_dir: &Path) -> anyhow::Result<String> {
    let secret = match fs::read_to_string("/etc/machine-id") {
        Ok(text) if !text.trim().is_empty() => text.trim().to_owned(),
        _ => kept(&state_dir.join("machine-id"))?,
    };
    let hash = Sha256::digest(format!("drover machine {secret}").as_bytes());
    Ok(hash[..16].iter().map(|byte| format!("{byte:02x}")).collect())
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
