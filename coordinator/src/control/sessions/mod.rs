//! Sessions: a node's time under one lease.
//!
//! Owns: opening and resuming ([`open`]), what a node is to be told ([`outbox`], pure), what it
//! tells of itself meanwhile ([`node_record`]), and the stream itself: heartbeats
//! cause renewals and are acknowledged after the store's answer, over a connection to the store of their own.
//! A stream that breaks revokes nothing.

mod absence;
pub(super) mod node_record;
mod open;
mod outbox;
mod shares;
mod stream;

pub use open::{Error, Opened};
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
