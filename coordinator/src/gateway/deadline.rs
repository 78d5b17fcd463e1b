//! The deadlines of one request, from its arrival on.

use super::Settings;
use std::time::Duration;
use tokio::time::Instant;

/// When one request must have come how far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    /// For the first token of a stream.
    pub(super) first_byte: Instant,
    /// For all of it.
    pub(super) total: Instant,
    /// Between two pieces.
    pub(super) between: Duration,
}

impl Clock {
    pub(super) fn start(settings: &Settings) -> Self {
        let now = Instant::now();
        Self {
            first_byte: now + Duration::from_millis(settings.first_byte_timeout_ms),
            total: now + Duration::from_millis(settings.total_timeout_ms),
            between: Duration::from_millis(settings.between_bytes_timeout_ms),
        }
    }

    /// Until when an answer must have begun.
    pub(super) fn begin(&self, stream: bool) -> Instant {
        if stream { self.first_byte.min(self.total) } else { self.total }
    }
}
