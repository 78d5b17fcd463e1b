//! The shim's clocks: the only place where it reads time.

use nix::time::{ClockId, clock_gettime};
use std::time::{Duration, SystemTime};

/// Nanoseconds since boot, suspended time included: deadlines of sessions and starts run on this clock, so that a host
/// that was asleep knows that they have passed.
#[must_use]
pub fn boottime_ns() -> u64 {
    // The clock exists on every kernel since 2.6.39; were it missing, every deadline counts as passed.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(u64::MAX, |time| {
        let since_boot = Duration::from(time);
        u64::try_from(since_boot.as_nanos()).unwrap_or(u64::MAX)
    })
}

/// Milliseconds since the Unix epoch, for records that people read.
#[must_use]
pub fn unix_ms() -> i64 {
    #[allow(clippy::disallowed_methods, reason = "this is the shim's clock module")]
    let now = SystemTime::now();
    now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}
