//! What an operator may set of the gateway.

use drover_proto::limits;
use serde::Deserialize;
use std::time::Duration;

/// The section `[gateway]` of a coordinator's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Demand the join secret from clients on loopback too. Beyond loopback it is always demanded.
    pub auth: bool,
    /// Largest request body, in bytes.
    pub body_bytes_max: usize,
    /// Longest time for a client to send its body, in milliseconds.
    pub body_timeout_ms: u64,
    /// Longest time to connect to a host's proxy, in milliseconds.
    pub connect_timeout_ms: u64,
    /// Longest time to the first token of a stream, in milliseconds. An answer that is not streamed begins when all of it
    /// is generated, so only the total time bounds it.
    pub first_byte_timeout_ms: u64,
    /// Longest time between two pieces of an answer, in milliseconds; comments of a stream (pings) do not count as pieces.
    pub between_bytes_timeout_ms: u64,
    /// Longest time of a whole request, in milliseconds.
    pub total_timeout_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            auth: false,
            body_bytes_max: limits::BODY_BYTES_MAX,
            body_timeout_ms: 60_000,
            connect_timeout_ms: 2_000,
            first_byte_timeout_ms: 300_000,
            between_bytes_timeout_ms: 120_000,
            total_timeout_ms: 3_600_000,
        }
    }
}

impl Settings {
    pub(super) fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub(super) fn body_timeout(&self) -> Duration {
        Duration::from_millis(self.body_timeout_ms)
    }
}
