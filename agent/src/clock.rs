//! The agent's clocks: the only place where it reads time other than tokio's.

use drover_proto::world;
use prost_types::Timestamp;
use std::time::Duration;

/// Nanoseconds since boot, suspended time included (CLOCK_BOOTTIME).
#[must_use]
pub fn boottime_ns() -> u64 {
    world::boottime_ns(drover_shim::clock::boottime_ns)
}

/// Time since boot, suspended time included (CLOCK_BOOTTIME).
#[must_use]
pub fn boottime() -> Duration {
    Duration::from_nanos(boottime_ns())
}

/// The wall clock, for messages.
#[must_use]
pub fn now() -> Timestamp {
    Timestamp::from(world::wall())
}

/// The moment of the wall clock after this time.
#[must_use]
pub fn after(time: Duration) -> Timestamp {
    Timestamp::from(world::wall() + time)
}

/// How long from now until a moment of the wall clock; zero when it has passed.
#[must_use]
pub fn until(moment: &Timestamp) -> Duration {
    let now = now();
    let nanos = |t: &Timestamp| i128::from(t.seconds) * 1_000_000_000 + i128::from(t.nanos);
    u64::try_from(nanos(moment) - nanos(&now)).map_or(Duration::ZERO, Duration::from_nanos)
}
