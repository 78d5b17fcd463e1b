//! The wall clock of the coordinator: the only place that reads it. Pure code gets the time as an argument.

pub use crate::plan::snapshot::millis;
use drover_proto::world;
use prost_types::Timestamp;
use std::time::UNIX_EPOCH;

/// Milliseconds since the epoch.
#[must_use]
pub fn now_ms() -> i64 {
    world::wall().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

/// A record's timestamp.
#[must_use]
pub fn timestamp(ms: i64) -> Timestamp {
    let nanos = i32::try_from(ms.rem_euclid(1000) * 1_000_000).unwrap_or(0);
    Timestamp { seconds: ms.div_euclid(1000), nanos }
}

/// Now, as a record's timestamp.
#[must_use]
pub fn now() -> Timestamp {
    timestamp(now_ms())
}
