//! Ends one process whose identity is verified: SIGTERM first, SIGKILL to its whole session where that is asked for.

use crate::host::{
    processes::{self, Found, Living},
    scan::Seen,
};
use drover_proto::v1::ProcessAction;
use drover_shim::identity;
use std::time::Duration;
use tokio::time::timeout;

/// How long a killed process is waited for.
const KILLED: Duration = Duration::from_secs(2);

/// How long a process may take to end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// After SIGTERM.
    term: Duration,
    /// Whether SIGKILL follows.
    kill: bool,
}

impl Patience {
    /// Of an operator who asks for it.
    pub(super) fn asked(force: bool) -> Self {
        Self { term: Duration::from_secs(if force { 2 } else { 5 }), kill: force }
    }

    /// With a stale process of this agent.
    pub(super) fn stale() -> Self {
        Self { term: Duration::from_secs(10), kill: true }
    }
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Ended,
    Lives,
    LeftAlone,
}

impl Outcome {
    pub(super) fn is_over(self) -> bool {
        self == Self::Ended
    }

    pub(super) fn action(self) -> ProcessAction {
        match self {
            Self::Ended => ProcessAction::Ended,
            Self::Lives => ProcessAction::ToldToEnd,
            Self::LeftAlone => ProcessAction::LeftAlone,
        }
    }
}

/// Takes hold of a process, if it is still the one that was seen.
fn hold(seen: &Seen, boot_id: &str) -> Result<Living, (Outcome, String)> {
    let Some(executable) = seen.executable.clone() else {
        let why = "its executable can't be read, so it can't be told what it is".to_owned();
        return Err((Outcome::LeftAlone, why));
    };
    let (pid, start_ticks) = (seen.pid, seen.start_ticks);
    let process = identity::Process { boot_id: boot_id.to_owned(), pid, start_ticks, executable, file: None };
    match processes::find_process(&process, None) {
        Found::Living(living) => Ok(living),
        Found::Gone => Err((Outcome::Ended, "it had ended already".to_owned())),
        Found::Other(what) => Err((Outcome::Ended, format!("it had ended already: {what}"))),
        Found::Unknown(why) => Err((Outcome::LeftAlone, why)),
    }
}

/// Waits for the end of a process that somebody else was told to end; says how that went.
pub(super) async fn wait(seen: &Seen, boot_id: &str, patience: Patience) -> (Outcome, String) {
    let living = match hold(seen, boot_id) {
        Ok(living) => living,
        Err(outcome) => return outcome,
    };
    match timeout(patience.term + KILLED, living.ended()).await {
        Ok(()) => (Outcome::Ended, "ended without waiting for requests in flight".to_owned()),
        Err(_) => (Outcome::Lives, "lives still after SIGKILL: it waits for the kernel".to_owned()),
    }
}

/// Ends a process, if it is still the one that was seen; says how that went.
pub(super) async fn end(seen: &Seen, boot_id: &str, patience: Patience) -> (Outcome, String) {
    let living = match hold(seen, boot_id) {
        Ok(living) => living,
        Err(outcome) => return outcome,
    };
    if let Err(error) = living.terminate() {
        return (Outcome::LeftAlone, format!("SIGTERM was refused: {error}"));
    }
    if timeout(patience.term, living.ended()).await.is_ok() {
        return (Outcome::Ended, "ended by SIGTERM".to_owned());
    }
    let waited = patience.term.as_secs();
    if !patience.kill {
        return (Outcome::Lives, format!("lives still {waited} s after SIGTERM: force ends it at once"));
    }
    if let Err(error) = living.kill_tree() {
        return (Outcome::Lives, format!("lives still {waited} s after SIGTERM, and SIGKILL was refused: {error}"));
    }
    match timeout(KILLED, living.ended()).await {
        Ok(()) => (Outcome::Ended, format!("ended by SIGKILL, {waited} s after SIGTERM")),
        Err(_) => (Outcome::Lives, "lives still after SIGKILL: it waits for the kernel".to_owned()),
    }
}
