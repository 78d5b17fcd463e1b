//! `drover version`.

use super::Context;
use crate::failure::Failure;
use drover_proto::{PROTOCOL_MAX, PROTOCOL_MIN, VERSION};

/// Version of the program, and of the protocol that agents and coordinators of this build speak.
pub fn run(context: &Context) -> Result<(), Failure> {
    if context.output.is_json() {
        let document =
            serde_json::json!({ "version": VERSION, "protocol_min": PROTOCOL_MIN, "protocol_max": PROTOCOL_MAX });
        return context.output.document(&document);
    }
    context.output.line(&format!("drover {VERSION} (protocol {PROTOCOL_MIN} to {PROTOCOL_MAX})"))
}
