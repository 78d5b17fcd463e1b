//! Whether this node can take an offer: the truth of the host, looked at now.

use crate::{
    clock,
    host::{disk, memory},
    instance::{
        arguments::{self, Place},
        context::Context,
        run::DISK_BYTES_MIN,
    },
    model,
};
use drover_proto::v1::Offer;

/// Why an offer is not taken.
#[derive(Debug, PartialEq, Eq)]
pub enum No {
    /// It is over, or nothing may be claimed now.
    Late,
    /// The host can't run it; a sentence for people.
    Unable(String),
}

/// Checks an offer; returns the memory to reserve, in bytes. Reads files: not for the session's thread.
pub fn check(context: &Context, offer: &Offer) -> Result<i64, No> {
    if context.session.has_passed() || offer.deadline.as_ref().is_none_or(|d| clock::until(d).is_zero()) {
        return Err(No::Late);
    }
    let settings = &context.settings;
    if settings.halt_file().exists() {
        return Err(No::Unable(format!("starts are halted on this node by {}", settings.halt_file().display())));
    }
    let spec = offer.spec.as_ref().ok_or_else(|| No::Unable("the offer has no spec".to_owned()))?;
    let model = model::resolve(&spec.model_path, &settings.model_roots).map_err(|e| No::Unable(e.to_string()))?;
    let socket = settings.socket_of(&offer.instance);
    let place = Place { model: &model.path, socket: &socket, gpus: &[] };
    arguments::build(spec, place, &context.known).map_err(No::Unable)?;
    let needed = if offer.memory_bytes > 0 { offer.memory_bytes } else { model::memory_bytes(spec, &model) };
    let memory = memory::read().map_err(|e| No::Unable(format!("the host's memory can't be read: {e}")))?;
    if u64::try_from(needed).unwrap_or(0) > memory.available_bytes {
        return Err(No::Unable(format!(
            "it needs {} MiB of memory and the host has {} MiB left",
            needed >> 20,
            memory.available_bytes >> 20
        )));
    }
    let free = disk::free_bytes(&settings.state_dir).map_err(|e| No::Unable(format!("free disk space: {e}")))?;
    if free < DISK_BYTES_MIN {
        return Err(No::Unable(format!(
            "{} has {} MiB left; nothing is started below {} MiB",
            settings.state_dir.display(),
            free >> 20,
            DISK_BYTES_MIN >> 20
        )));
    }
    disk::takes_files(&settings.state_dir)
        .map_err(|e| No::Unable(format!("{} can't be written: {e}", settings.state_dir.display())))?;
    Ok(needed)
}
