//! Sessions: a node's time under one lease.
//!
//! Owns: opening and resuming ([`open`]), who may have a session ([`admit`], pure) and by which stream ([`attach`]), what a
//! node is to be told ([`outbox`], pure), what it tells of itself meanwhile ([`node_record`]), what it has against what the
//! store says ([`reconcile`], pure), and the stream itself: heartbeats
//! cause renewals and are acknowledged after the store's answer, over a connection to the store of their own.
//! A stream that breaks revokes nothing.

mod admit;
mod attach;
pub(super) mod node_record;
mod open;
mod outbox;
mod reconcile;
mod refusals;
mod shares;
mod stream;

pub use open::{Error, Opened};
pub use refusals::Refusals;
pub use shares::Cache;
pub use stream::Sessions;
pub(crate) use stream::store_status;

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
