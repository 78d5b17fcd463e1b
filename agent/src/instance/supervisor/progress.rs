//! When an instance last got on: what counts as progress of a load, and how often it is told.

use super::super::run::now_ms;
use crate::{clock, host::processes::Work};
use prost_types::Timestamp;
use std::time::Duration;

/// Share of a processor, in thousandths, above which a loading process works. The answers to its own probes take far less, and
/// are no progress: one whose load hangs may answer them for ever.
const WORKS_PERMILLE: u128 = 10;
/// Length of a clock tick of the kernel's accounts.
const TICK_MS: u128 = 10;

/// PURE. Whether a process has got on within a time. Where that can't be read the lack of it can't be told either.
pub(super) fn shows(before: Option<Work>, now: Option<Work>, within: Duration) -> bool {
    let (Some(before), Some(now)) = (before, now) else { return true };
    let busy_ms = u128::from(now.cpu_ticks.saturating_sub(before.cpu_ticks)) * TICK_MS;
    now.read != before.read || (busy_ms > 0 && busy_ms * 1000 >= within.as_millis() * WORKS_PERMILLE)
}

/// How often progress within one state is told, at most: every report is a write to the store. The coordinators' deadline of progress is at least twice that.
pub(super) const TOLD_EVERY: Duration = Duration::from_secs(5);

/// Progress, as it was told last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Progress {
    at: Timestamp,
    /// The same in milliseconds since boot, which no step of the wall clock changes.
    at_ms: u64,
}

impl Progress {
    /// Made now.
    pub(super) fn now() -> Self {
        Self { at: clock::now(), at_ms: now_ms() }
    }

    /// It was made again; true when that is to be told.
    pub(super) fn made(&mut self) -> bool {
        let due = u128::from(now_ms().saturating_sub(self.at_ms)) >= TOLD_EVERY.as_millis();
        if due {
            *self = Self::now();
        }
        due
    }

    /// When it was told last.
    pub(super) fn told_at(&self) -> Timestamp {
        self.at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answers_to_probes_are_no_progress_and_work_is() {
        let at = |cpu_ticks, read| Some(Work { cpu_ticks, read: (read, 0) });
        let within = Duration::from_secs;
        assert!(!shows(at(5, 7), at(5, 7), within(1)));
        assert!(shows(at(5, 7), at(6, 7), within(1)), "1 % of a second");
        assert!(!shows(at(5, 7), at(8, 7), within(300)), "a probe a second, of 0.1 ms each, for five minutes");
        assert!(shows(at(5, 7), at(305, 7), within(300)));
        assert!(shows(at(5, 7), at(5, 8), within(300)), "it reads");
        assert!(shows(None, at(5, 7), within(1)) && shows(at(5, 7), None, within(1)), "it can't be told");
    }
}
