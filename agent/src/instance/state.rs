//! PURE: what an instance does next. No I/O, no clock but an argument, no randomness but a seed.
//!
//! | phase | process | leaves by |
//! |---|---|---|
//! | claimed | none | begin, wanted or owned → queued · unwanted → stopped |
//! | queued | none | its turn → starting · owned no more → backoff · unwanted → stopped |
//! | starting | being launched | launched → loading · launch failed → backoff or failed · unwanted → stopping |
//! | loading | alive | healthy → ready · serves another model → suspect · ended, model or arguments refused → failed · ended otherwise → backoff · no progress, and a look after that finds none and no answer → stopping · unwanted → stopping |
//! | ready | alive | 2 failed probes → suspect · ended → backoff or failed · unwanted → draining |
//! | suspect | alive | 3 good probes → ready · ended → backoff or failed · unwanted → draining |
//! | draining | alive | drained, too late or forced → stopping · ended → stopped |
//! | stopping | alive or being launched | ended → stopped, or backoff when it is wanted · grace over → killed; forced: a short one |
//! | backoff | none | due, and owned → queued · unwanted → stopped |
//! | failed | none | unwanted → stopped |
//! | stopped | none | final under its token; claimed again, under a higher one → claimed |
//!
//! What is wanted ([`State::wanted`]), whether this node owns it ([`State::owned`]) and what is ([`State::phase`],
//! [`State::process`]) are separate. What no claim of this node covers is never launched: it stays as it is until it is
//! claimed again, or given up. A stop wins over a start in flight: once an instance is unwanted nothing is launched, and what a launch under way brings is ended.
//! A server that is wanted and ready is never ended from here, but for one that its deployment lets end with its lease
//! ([`Event::Lease`]), and that its shim should have ended by then.
//!
//! Which end of a loading server is its own word that model or arguments are bad, and which may pass, is the table of
//! [`cause`].

pub mod cause;
mod step;
#[cfg(test)]
mod tests;

use cause::Cause;
use drover_proto::v1::InstanceState;

/// Bounds and pauses, in milliseconds where they are times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Longest wait for requests in flight before a stop.
    pub drain_ms: u64,
    /// Between SIGTERM and SIGKILL.
    pub grace_ms: u64,
    /// Longest time without progress while a model loads.
    pub load_timeout_ms: u64,
    /// Pause before the first restart; doubled with every further one.
    pub backoff_first_ms: u64,
    /// Longest pause before a restart.
    pub backoff_max_ms: u64,
    /// Ends in a row, each within `stable_ms` of becoming ready, after which it has failed.
    pub quick_ends_max: u32,
    /// A server that was ready for this long has run stably: what ended before is forgiven.
    pub stable_ms: u64,
    /// Failed probes in a row after which a ready instance gets no new requests.
    pub suspect_after: u32,
    /// Good probes in a row after which it gets them again.
    pub ready_after: u32,
}

impl Default for Policy {
    fn default() -> Self {
        use drover_proto::limits::defaults;
        Self {
            drain_ms: defaults::DRAIN_TIMEOUT_MS.unsigned_abs(),
            grace_ms: defaults::STOP_GRACE_MS.unsigned_abs(),
            load_timeout_ms: defaults::LOAD_TIMEOUT_MS.unsigned_abs(),
            backoff_first_ms: 500,
            backoff_max_ms: 30_000,
            quick_ends_max: 5,
            stable_ms: 60_000,
            suspect_after: 2,
            ready_after: 3,
        }
    }
}

/// Where an instance is; the table is in the module's description.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the module's table says what each one means")]
pub enum Phase {
    Claimed,
    Queued,
    Starting,
    Loading,
    Ready,
    Suspect,
    Draining,
    Stopping,
    Stopped,
    Backoff,
    Failed,
}

/// Whether there is a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    /// There is none.
    None,
    /// A launch is under way: there may be one.
    Launching,
    /// There is one.
    Alive,
}

/// How a process ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ended {
    /// Exit code, when it exited and that is known.
    pub code: Option<i32>,
    /// Signal, when one ended it and that is known.
    pub signal: Option<i32>,
    /// Why the program could not be executed at all.
    pub exec_error: Option<String>,
    /// Whether the kernel has killed it because memory was short, when that is known.
    pub oom_killed: Option<bool>,
    /// Whether it was ended because its lease was not renewed in time, as its deployment asks for.
    pub lease_lost: bool,
    /// The last lines of its log that say something.
    pub last_lines: String,
    /// What its log says of the next start, had it not served yet.
    pub cause: Cause,
}

impl Ended {
    /// Whether the same start would end the same way: the program can't be executed, or it has refused its model or its
    /// arguments.
    #[must_use]
    pub fn gave_up(&self) -> bool {
        self.exec_error.is_some() || self.cause == Cause::Refused
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.exec_error, self.code, self.signal) {
            (Some(error), ..) => write!(f, "could not be executed: {error}")?,
            _ if self.lease_lost => {
                write!(f, "was ended because its lease was not renewed in time (on_lease_lost = \"stop\")")?;
            }
            (None, Some(code), _) => write!(f, "exited with code {code}")?,
            (None, None, Some(_)) if self.oom_killed == Some(true) => {
                write!(f, "was killed by the kernel because memory was short (OOM)")?;
            }
            (None, None, Some(signal)) => write!(f, "was ended by signal {signal}")?,
            (None, None, None) => write!(f, "ended (how is not known)")?,
        }
        if self.last_lines.is_empty() { Ok(()) } else { write!(f, "; its log ends with: {}", self.last_lines) }
    }
}

/// What a probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It answers requests.
    Ok,
    /// It says that it loads the model, or does not listen yet.
    Loading,
    /// It answers, for another model than its claim says; says which. Such a server gets no requests.
    Other(String),
    /// Anything else; says what.
    Failing(String),
}

/// How the lease stands with which a server is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    /// It was renewed.
    Renewed,
    /// It was not renewed for so long that requests had better go elsewhere. It still may be.
    Lapses,
    /// The server should have ended by now: its shim is dead, or the server ignores it.
    Over,
}

/// What happens to an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The owner is set up.
    Begin,
    /// Its turn to be launched has come ([`Action::Queue`]).
    Turn,
    /// It should run, or should not.
    Want(bool),
    /// A claim of this node covers it, or none does.
    Owned(bool),
    /// It was claimed again, under a higher token. Whether it should run is yet to be said.
    ClaimedAgain,
    /// It should not run, and what is in flight is not waited for.
    Force,
    /// A launch has brought a process.
    Launched,
    /// A launch has brought none.
    LaunchFailed {
        /// Why.
        message: String,
        /// Whether another attempt may help.
        retry: bool,
    },
    /// A probe has ended.
    Probed(Health),
    /// A loading process has done something.
    Progress,
    /// A look at a loading process has ended ([`Action::Look`]).
    Looked {
        /// When it was begun, in milliseconds since boot.
        begun_ms: u64,
        /// Whether the process has done something meanwhile, or that can't be told.
        progress: bool,
        /// What a probe at its end has found.
        health: Health,
    },
    /// No request is in flight any more, or the drain has taken too long.
    Drained,
    /// How the lease stands with which it is to end.
    Lease(Lease),
    /// The process has ended.
    Ended(Ended),
    /// Time has passed.
    Tick,
}

/// What is to be done now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Wait for its turn ([`Event::Turn`]): a node launches a few at a time.
    Queue,
    /// Launch a process.
    Launch,
    /// Give it requests.
    Open,
    /// Give it no new requests; let those in flight end.
    Close,
    /// Tell ([`Event::Drained`]) when no request is in flight, at the latest after this many milliseconds.
    Drain(u64),
    /// Look whether the loading process does anything, and then whether it answers; tell ([`Event::Looked`]).
    Look,
    /// Ask the process to end.
    Terminate,
    /// End the process and its children.
    Kill,
}

/// State of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// Whether it should run.
    pub wanted: bool,
    /// Whether a claim of this node covers it, as far as is known.
    pub owned: bool,
    /// Where it is.
    pub phase: Phase,
    /// Whether there is a process.
    pub process: Process,
    /// When a [`Event::Tick`] is due, in milliseconds since boot.
    pub deadline_ms: Option<u64>,
    /// How often it was started again.
    pub restarts: i32,
    /// Whether it gets no requests for now because its lease was not renewed.
    pub lapses: bool,
    /// What is wrong or waited for; empty when all is well.
    pub message: String,
    /// How the last process ended.
    pub last_end: Option<Ended>,
    quick_ends: u32,
    /// Attempts in a row that started nothing.
    failed_launches: u32,
    /// Starts in a row without stable running, the present one included.
    attempts: u32,
    /// Whether its end is not to be waited for.
    forced: bool,
    /// Failed probes in a row while ready; good ones while suspect.
    streak: u32,
    ready_since_ms: Option<u64>,
    /// When the last look was asked for at a process that has loaded for too long.
    looking_since_ms: Option<u64>,
}

impl State {
    /// Claimed, with nothing running yet.
    #[must_use]
    pub fn claimed() -> Self {
        Self {
            wanted: true,
            owned: true,
            phase: Phase::Claimed,
            process: Process::None,
            deadline_ms: None,
            restarts: 0,
            lapses: false,
            message: String::new(),
            last_end: None,
            quick_ends: 0,
            failed_launches: 0,
            attempts: 1,
            forced: false,
            streak: 0,
            ready_since_ms: None,
            looking_since_ms: None,
        }
    }

    /// With a process that another agent has started; `ready` when it was seen to answer. Whether it is owned is yet to be
    /// learnt.
    #[must_use]
    pub fn adopted(ready: bool, restarts: i32, now_ms: u64, policy: &Policy) -> Self {
        let phase = if ready { Phase::Ready } else { Phase::Loading };
        let deadline_ms = (!ready).then(|| now_ms + policy.load_timeout_ms);
        let ready_since_ms = ready.then_some(now_ms);
        Self { owned: false, phase, process: Process::Alive, deadline_ms, restarts, ready_since_ms, ..Self::claimed() }
    }

    /// With a process that ended while no agent looked: it is started again at once.
    #[must_use]
    pub fn ended(ended: Ended, restarts: i32, now_ms: u64) -> Self {
        let message = ended.to_string();
        // That its lease was lost says nothing about the server.
        let (quick_ends, attempts) = if ended.lease_lost { (0, 1) } else { (1, 2) };
        Self {
            phase: Phase::Backoff,
            deadline_ms: Some(now_ms),
            restarts,
            message,
            last_end: Some(ended),
            quick_ends,
            attempts,
            ..Self::claimed()
        }
    }

    /// Found to be unable to run, earlier.
    #[must_use]
    pub fn failed(message: String, restarts: i32) -> Self {
        Self { phase: Phase::Failed, restarts, message, ..Self::claimed() }
    }

    /// As it is reported.
    #[must_use]
    pub fn reported(&self) -> InstanceState {
        match self.phase {
            Phase::Claimed | Phase::Queued => InstanceState::Claimed,
            Phase::Starting => InstanceState::Starting,
            Phase::Loading => InstanceState::Loading,
            Phase::Ready => InstanceState::Ready,
            Phase::Suspect => InstanceState::Suspect,
            Phase::Draining | Phase::Stopping => InstanceState::Draining,
            Phase::Stopped => InstanceState::Stopped,
            Phase::Backoff => InstanceState::Backoff,
            Phase::Failed => InstanceState::Failed,
        }
    }

    /// The next state, and what is to be done. `now_ms` is time since boot; `seed` makes the jitter.
    #[must_use]
    pub fn step(mut self, event: Event, now_ms: u64, policy: &Policy, seed: u64) -> (Self, Vec<Action>) {
        let actions = step::take(&mut self, event, now_ms, policy, seed);
        (self, actions)
    }
}
