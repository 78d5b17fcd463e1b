//! Named steps of a start, a stop, an adoption and a raise of the token at which a test lets the agent or the shim die.
//! Debug builds only.
//!
//! `DROVER_FAIL_POINT=<step>[:kill|:exit|:pause[:<file>]]`: the process that reaches the step sends itself SIGKILL (the
//! default), exits with code 1, or stops itself by SIGSTOP until it is continued. With a file it does so once: it creates
//! the file, with its pid in it, and passes where the file exists already. The environment of a shim is cleared; in debug
//! builds the agent hands this one variable on to it, and never to llama-server. A release build holds none of this: there
//! [`at`] is empty.
//!
//! | step | name | in | what has been done |
//! |---|---|---|---|
//! | start 1 | `start.claimed` | agent | the answer to the claim was heard; nothing is on disk |
//! | start 2 | `start.claim-written` | agent | the file `claim` is on disk |
//! | start 3 | `start.spec-written` | agent | the file `spec` is on disk |
//! | start 4 | `start.shim-forked` | agent | a shim runs |
//! | start 5 | `start.locked` | shim | it holds the directory's lock |
//! | start 6 | `start.forked` | shim | the child exists and waits; no record names it yet |
//! | start 7 | `start.recorded` | shim | the record, stage held, is on disk |
//! | start 8 | `start.checked` | shim | deadline and halt were looked at for the last time |
//! | start 9 | `start.released` | shim | the child was released and executes llama-server |
//! | start 10 | `start.confirmed` | shim | the record, stage released, is on disk |
//! | start 11 | `start.heard` | agent | the shim's word was heard |
//! | start 12 | `start.routed` | agent | the proxy has the route; nobody was told that it is ready |
//! | stop 1 | `stop.route-draining` | agent | the proxy gives it no new requests |
//! | stop 2 | `stop.drained` | agent | no request is in flight |
//! | stop 3 | `stop.sigterm-sent` | agent | llama-server was asked to end |
//! | stop 4 | `stop.seen` | shim | its end was seen; it is not collected yet |
//! | stop 5 | `stop.tree-ended` | shim | what it had started has ended too |
//! | stop 6 | `stop.exit-written` | shim | the file `exit` is on disk; the lock is still held |
//! | stop 7 | `stop.ended` | agent | the agent has seen the end |
//! | stop 8 | `stop.settled` | agent | how it ended is known; nobody was told |
//! | stop 9 | `stop.reported` | agent | the claim is gone; the directory is still there |
//! | stop 10 | `stop.removed` | agent | directory and socket are gone |
//! | adoption 1 | `adopt.read` | agent | the record was read |
//! | adoption 2 | `adopt.opened` | agent | a handle of what has the pid is open; nothing was compared |
//! | adoption 3 | `adopt.verified` | agent | the identity was compared |
//! | adoption 4 | `adopt.adopted` | agent | the run is supervised |
//! | adoption 5 | `adopt.routed` | agent | the proxy has the set of routes |
//! | raise 1 | `raise.spec-written` | agent | the file `spec` has the higher token, record and claim the lower one |
//! | raise 2 | `raise.record-written` | agent | the record has it too |
//! | raise 3 | `raise.claim-written` | agent | it is on disk everywhere |
//! | raise 4 | `raise.routed` | agent | the proxy has the route with the higher token; nobody was told |

/// Name of the environment variable.
pub const VARIABLE: &str = "DROVER_FAIL_POINT";

/// Name of the variable that lets a shim behave as one of an earlier format ([`crate::record::FORMAT`]). Debug builds only.
pub const FORMAT_VARIABLE: &str = "DROVER_SHIM_FORMAT";

/// A numbered step; the module's table says what each one means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the module's table says what each one means")]
pub enum Step {
    StartClaimed,
    StartClaimWritten,
    StartSpecWritten,
    StartShimForked,
    StartLocked,
    StartForked,
    StartRecorded,
    StartChecked,
    StartReleased,
    StartConfirmed,
    StartHeard,
    StartRouted,
    StopRouteDraining,
    StopDrained,
    StopSigtermSent,
    StopSeen,
    StopTreeEnded,
    StopExitWritten,
    StopEnded,
    StopSettled,
    StopReported,
    StopRemoved,
    AdoptRead,
    AdoptOpened,
    AdoptVerified,
    AdoptAdopted,
    AdoptRouted,
    RaiseSpecWritten,
    RaiseRecordWritten,
    RaiseClaimWritten,
    RaiseRouted,
}

/// All steps in their order, with their names.
#[cfg(debug_assertions)]
const NAMES: [(Step, &str); 31] = [
    (Step::StartClaimed, "start.claimed"),
    (Step::StartClaimWritten, "start.claim-written"),
    (Step::StartSpecWritten, "start.spec-written"),
    (Step::StartShimForked, "start.shim-forked"),
    (Step::StartLocked, "start.locked"),
    (Step::StartForked, "start.forked"),
    (Step::StartRecorded, "start.recorded"),
    (Step::StartChecked, "start.checked"),
    (Step::StartReleased, "start.released"),
    (Step::StartConfirmed, "start.confirmed"),
    (Step::StartHeard, "start.heard"),
    (Step::StartRouted, "start.routed"),
    (Step::StopRouteDraining, "stop.route-draining"),
    (Step::StopDrained, "stop.drained"),
    (Step::StopSigtermSent, "stop.sigterm-sent"),
    (Step::StopSeen, "stop.seen"),
    (Step::StopTreeEnded, "stop.tree-ended"),
    (Step::StopExitWritten, "stop.exit-written"),
    (Step::StopEnded, "stop.ended"),
    (Step::StopSettled, "stop.settled"),
    (Step::StopReported, "stop.reported"),
    (Step::StopRemoved, "stop.removed"),
    (Step::AdoptRead, "adopt.read"),
    (Step::AdoptOpened, "adopt.opened"),
    (Step::AdoptVerified, "adopt.verified"),
    (Step::AdoptAdopted, "adopt.adopted"),
    (Step::AdoptRouted, "adopt.routed"),
    (Step::RaiseSpecWritten, "raise.spec-written"),
    (Step::RaiseRecordWritten, "raise.record-written"),
    (Step::RaiseClaimWritten, "raise.claim-written"),
    (Step::RaiseRouted, "raise.routed"),
];

/// Names of all steps, in their order: what a test must go through.
#[cfg(debug_assertions)]
pub fn names() -> impl Iterator<Item = &'static str> {
    NAMES.iter().map(|(_, name)| *name)
}

/// The process has reached a step. In a release build this does nothing.
#[inline]
pub fn at(step: Step) {
    #[cfg(debug_assertions)]
    armed::reach(step);
    #[cfg(not(debug_assertions))]
    let _ = step;
}

/// What a shim is given of the environment for this: nothing in a release build.
#[must_use]
pub fn handed_on() -> Vec<(&'static str, std::ffi::OsString)> {
    #[cfg(debug_assertions)]
    return [VARIABLE, FORMAT_VARIABLE, crate::mutant::VARIABLE]
        .into_iter()
        .filter_map(|n| Some((n, std::env::var_os(n)?)))
        .collect();
    #[cfg(not(debug_assertions))]
    Vec::new()
}

/// Format that this shim writes and reads.
#[must_use]
pub fn format() -> u32 {
    #[cfg(debug_assertions)]
    if let Some(played) = std::env::var(FORMAT_VARIABLE).ok().and_then(|value| value.parse().ok()) {
        return played;
    }
    crate::record::FORMAT
}

#[cfg(debug_assertions)]
mod armed {
    use super::{NAMES, Step, VARIABLE};
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    use std::{fs::File, io::Write as _};

    pub(super) fn reach(step: Step) {
        let Ok(value) = std::env::var(VARIABLE) else { return };
        let mut parts = value.splitn(3, ':');
        let named = parts.next();
        if !NAMES.iter().any(|(known, name)| *known == step && named == Some(*name)) {
            return;
        }
        let what = parts.next().unwrap_or("kill");
        if let Some(path) = parts.next() {
            let Ok(mut file) = File::create_new(path) else { return };
            let _ = write!(file, "{}", std::process::id());
        }
        match what {
            #[allow(clippy::disallowed_methods, reason = "to end in the middle of things is what it is for")]
            "exit" => std::process::exit(1),
            "pause" => {
                let _ = kill(Pid::this(), Signal::SIGSTOP);
            }
            _ => {
                let _ = kill(Pid::this(), Signal::SIGKILL);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_table_names_every_step_in_order() {
        let text = include_str!("failpoint.rs");
        let listed: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("//! | ") && line.contains(" | `"))
            .filter_map(|line| line.split('`').nth(1))
            .collect();
        assert_eq!(listed, super::names().collect::<Vec<_>>());
    }
}
