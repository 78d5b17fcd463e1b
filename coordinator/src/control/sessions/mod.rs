//! Sessions: a node's time under one lease.
//!
//! Owns: opening and resuming ([`open`]), who may have a session ([`admit`], pure) and by which stream ([`attach`]), what a
//! node is to be told ([`outbox`], pure), what it tells of itself meanwhile ([`node_record`]), what it has against what the
//! store says ([`reconcile`], pure), and the stream itself. Heartbeats cause renewals and are acknowledged after the store's
//! answer, over a connection to the store, and where they have a stream of their own on a runtime, of their own ([`heartbeats`]).
//! A stream that breaks revokes nothing.

mod admit;
mod attach;
mod heartbeats;
pub(super) mod node_record;
mod open;
mod outbox;
mod reconcile;
mod refusals;
mod status;
mod stream;

pub use heartbeats::Streams;
pub use open::{Error, Opened};
pub use refusals::Refusals;
pub(crate) use status::store_status;
pub use stream::Sessions;

use std::time::Duration;

/// Settings of sessions.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Id of this coordinator.
    pub coordinator: String,
    /// Time to live of a session's lease.
    pub ttl: Duration,
    /// How often agents send a heartbeat.
    pub heartbeat_interval: Duration,
}
