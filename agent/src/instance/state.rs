//! PURE: what an instance does next. No I/O, no clock but an argument, no randomness but a seed.
//!
//! | phase | process | leaves by |
//! |---|---|---|
//! | claimed | none | begin → starting · unwanted → stopped |
//! | starting | being launched | launched → loading · launch failed → backoff or failed · unwanted → stopping |
//! | loading | alive | healthy → ready · exits with an error → failed · ended otherwise → backoff · no progress → stopping · unwanted → stopping |
//! | ready | alive | 2 failed probes → suspect · ended → backoff or failed · unwanted → draining |
//! | suspect | alive | 3 good probes → ready · ended → backoff or failed · unwanted → draining |
//! | draining | alive | drained or too late → stopping · ended → stopped |
//! | stopping | alive or being launched | ended → stopped, or backoff when it is wanted · grace over → killed |
//! | backoff | none | due → starting · unwanted → stopped |
//! | failed | none | unwanted → stopped |
//! | stopped | none | wanted → starting |
//!
//! What is wanted ([`State::wanted`]) and what is ([`State::phase`], [`State::process`]) are separate. A stop wins over a
//! start in flight: once an instance is unwanted nothing is launched, and what a launch under way brings is ended.
//! A server that is wanted and ready is never ended from here.

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

/// Between a SIGKILL and the next, should the first not have helped (a process in state D ends when it leaves it).
const KILL_AGAIN_MS: u64 = 5_000;
/// The drain itself ends in time; this is for one that does not.
const DRAIN_SLACK_MS: u64 = 2_000;

/// Where an instance is; the table is in the module's description.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the module's table says what each one means")]
pub enum Phase {
    Claimed,
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
    /// The last lines of its log that say something.
    pub last_lines: String,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.exec_error, self.code, self.signal) {
            (Some(error), ..) => write!(f, "could not be executed: {error}")?,
            (None, Some(code), _) => write!(f, "exited with code {code}")?,
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
    /// Anything else; says what.
    Failing(String),
}

/// What happens to an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The owner is set up.
    Begin,
    /// It should run, or should not.
    Want(bool),
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
    /// No request is in flight any more, or the drain has taken too long.
    Drained,
    /// The process has ended.
    Ended(Ended),
    /// Time has passed.
    Tick,
}

/// What is to be done now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Launch a process.
    Launch,
    /// Give it requests.
    Open,
    /// Give it no new requests; let those in flight end.
    Close,
    /// Tell ([`Event::Drained`]) when no request is in flight, at the latest after this many milliseconds.
    Drain(u64),
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
    /// Where it is.
    pub phase: Phase,
    /// Whether there is a process.
    pub process: Process,
    /// When a [`Event::Tick`] is due, in milliseconds since boot.
    pub deadline_ms: Option<u64>,
    /// How often it was started again.
    pub restarts: i32,
    /// What is wrong or waited for; empty when all is well.
    pub message: String,
    /// How the last process ended.
    pub last_end: Option<Ended>,
    quick_ends: u32,
    /// Failed probes in a row while ready; good ones while suspect.
    streak: u32,
    ready_since_ms: Option<u64>,
}

impl State {
    /// Claimed, with nothing running yet.
    #[must_use]
    pub fn claimed() -> Self {
        Self {
            wanted: true,
            phase: Phase::Claimed,
            process: Process::None,
            deadline_ms: None,
            restarts: 0,
            message: String::new(),
            last_end: None,
            quick_ends: 0,
            streak: 0,
            ready_since_ms: None,
        }
    }

    /// With a process that another agent has started; `ready` when it was seen to answer.
    #[must_use]
    pub fn adopted(ready: bool, restarts: i32, now_ms: u64, policy: &Policy) -> Self {
        let phase = if ready { Phase::Ready } else { Phase::Loading };
        let deadline_ms = (!ready).then(|| now_ms + policy.load_timeout_ms);
        let ready_since_ms = ready.then_some(now_ms);
        Self { phase, process: Process::Alive, deadline_ms, restarts, ready_since_ms, ..Self::claimed() }
    }

    /// With a process that ended while no agent looked: it is started again at once.
    #[must_use]
    pub fn ended(ended: Ended, restarts: i32, now_ms: u64) -> Self {
        let message = ended.to_string();
        Self {
            phase: Phase::Backoff,
            deadline_ms: Some(now_ms),
            restarts,
            message,
            last_end: Some(ended),
            quick_ends: 1,
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
            Phase::Claimed => InstanceState::Claimed,
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
        let mut step = Step { state: &mut self, now_ms, policy, seed, actions: Vec::new() };
        step.take(event);
        let actions = step.actions;
        (self, actions)
    }
}

struct Step<'a> {
    state: &'a mut State,
    now_ms: u64,
    policy: &'a Policy,
    seed: u64,
    actions: Vec<Action>,
}

impl Step<'_> {
    fn take(&mut self, event: Event) {
        let phase = self.state.phase;
        match event {
            Event::Begin => {
                if phase == Phase::Claimed && self.state.wanted {
                    self.launch();
                }
            }
            Event::Want(true) => {
                self.state.wanted = true;
                if matches!(phase, Phase::Claimed | Phase::Stopped) {
                    self.launch();
                }
            }
            Event::Want(false) => self.unwanted(),
            Event::Launched => self.launched(),
            Event::LaunchFailed { message, retry } => self.launch_failed(message, retry),
            Event::Probed(health) => self.probed(health),
            Event::Progress => {
                if phase == Phase::Loading {
                    self.state.deadline_ms = Some(self.now_ms + self.policy.load_timeout_ms);
                }
            }
            Event::Drained => {
                if phase == Phase::Draining {
                    self.terminate();
                }
            }
            Event::Ended(ended) => self.ended(ended),
            Event::Tick => {
                if self.state.deadline_ms.is_some_and(|due| due <= self.now_ms) {
                    self.due();
                }
            }
        }
    }

    fn enter(&mut self, phase: Phase, deadline_in_ms: Option<u64>) {
        self.state.phase = phase;
        self.state.streak = 0;
        self.state.deadline_ms = deadline_in_ms.map(|ms| self.now_ms + ms);
    }

    fn launch(&mut self) {
        self.enter(Phase::Starting, None);
        self.state.process = Process::Launching;
        self.state.message.clear();
        self.actions.push(Action::Launch);
    }

    fn terminate(&mut self) {
        self.enter(Phase::Stopping, Some(self.policy.grace_ms));
        self.actions.push(Action::Terminate);
    }

    fn stopped(&mut self) {
        self.enter(Phase::Stopped, None);
        self.state.message.clear();
    }

    fn unwanted(&mut self) {
        self.state.wanted = false;
        match self.state.phase {
            Phase::Claimed | Phase::Backoff | Phase::Failed => self.stopped(),
            // The launch can't be called back; what it brings is ended.
            Phase::Starting => self.enter(Phase::Stopping, None),
            Phase::Loading => self.terminate(),
            Phase::Ready | Phase::Suspect => {
                self.enter(Phase::Draining, Some(self.policy.drain_ms + DRAIN_SLACK_MS));
                self.actions.extend([Action::Close, Action::Drain(self.policy.drain_ms)]);
            }
            Phase::Draining | Phase::Stopping | Phase::Stopped => {}
        }
    }

    fn launched(&mut self) {
        if self.state.process != Process::Launching {
            return;
        }
        self.state.process = Process::Alive;
        match self.state.phase {
            Phase::Starting => self.enter(Phase::Loading, Some(self.policy.load_timeout_ms)),
            _ => self.terminate(),
        }
    }

    fn launch_failed(&mut self, message: String, retry: bool) {
        if self.state.process != Process::Launching {
            return;
        }
        self.state.process = Process::None;
        if !self.state.wanted {
            self.stopped();
        } else if retry {
            // An attempt that started nothing proves nothing about the server: it never adds up to a crash loop.
            self.state.quick_ends = (self.state.quick_ends + 1).min(self.policy.quick_ends_max.saturating_sub(1));
            self.back_off(message);
        } else {
            self.fail(message);
        }
    }

    fn probed(&mut self, health: Health) {
        match (self.state.phase, health) {
            (Phase::Loading, Health::Ok) => {
                self.enter(Phase::Ready, None);
                self.state.message.clear();
                self.state.ready_since_ms = Some(self.now_ms);
                self.actions.push(Action::Open);
            }
            (Phase::Ready, Health::Ok) => {
                self.state.streak = 0;
                if self.state.ready_since_ms.is_some_and(|since| self.now_ms - since >= self.policy.stable_ms) {
                    self.state.quick_ends = 0;
                }
            }
            (Phase::Ready, failing) => {
                self.state.streak += 1;
                if self.state.streak >= self.policy.suspect_after {
                    self.enter(Phase::Suspect, None);
                    self.state.message = match failing {
                        Health::Failing(what) => format!("probes fail: {what}"),
                        _ => "probes fail: it says that it loads the model".to_owned(),
                    };
                    self.actions.push(Action::Close);
                }
            }
            (Phase::Suspect, Health::Ok) => {
                self.state.streak += 1;
                if self.state.streak >= self.policy.ready_after {
                    self.enter(Phase::Ready, None);
                    self.state.message.clear();
                    self.actions.push(Action::Open);
                }
            }
            (Phase::Suspect, _) => self.state.streak = 0,
            _ => {}
        }
    }

    fn due(&mut self) {
        match self.state.phase {
            Phase::Backoff => {
                self.state.restarts = self.state.restarts.saturating_add(1);
                self.launch();
            }
            Phase::Loading => {
                let seconds = self.policy.load_timeout_ms / 1000;
                self.state.quick_ends += 1;
                self.terminate();
                self.state.message = format!("no progress for {seconds} s while the model loaded");
            }
            Phase::Draining => self.terminate(),
            Phase::Stopping if self.state.process == Process::Alive => {
                self.state.deadline_ms = Some(self.now_ms + KILL_AGAIN_MS);
                self.actions.push(Action::Kill);
            }
            _ => self.state.deadline_ms = None,
        }
    }

    fn ended(&mut self, ended: Ended) {
        if self.state.process != Process::Alive {
            return;
        }
        self.state.process = Process::None;
        self.actions.push(Action::Close);
        let phase = self.state.phase;
        let reason = ended.to_string();
        let gave_up = ended.exec_error.is_some() || ended.code.is_some_and(|code| code != 0);
        self.state.last_end = Some(ended);
        let served_ms = self.state.ready_since_ms.take().map_or(0, |since| self.now_ms.saturating_sub(since));
        if !self.state.wanted {
            self.stopped();
            return;
        }
        match phase {
            // Ended by us, for lack of progress (which was counted then), or wanted again meanwhile.
            Phase::Draining | Phase::Stopping => {}
            // It has looked at the model or its arguments and given up: the same start would end the same way.
            Phase::Loading if gave_up => {
                self.fail(format!("the model can't be served: llama-server {reason}"));
                return;
            }
            _ if served_ms >= self.policy.stable_ms => self.state.quick_ends = 1,
            _ => self.state.quick_ends += 1,
        }
        if self.state.quick_ends >= self.policy.quick_ends_max {
            let times = self.state.quick_ends;
            self.fail(format!("crash loop: ended {times} times in a row; the last time llama-server {reason}"));
        } else {
            let why = std::mem::take(&mut self.state.message);
            let comma = if why.is_empty() { "" } else { ": " };
            self.back_off(format!("{why}{comma}llama-server {reason}"));
        }
    }

    fn fail(&mut self, message: String) {
        self.enter(Phase::Failed, None);
        self.state.message = message;
    }

    fn back_off(&mut self, message: String) {
        let exponent = self.state.quick_ends.saturating_sub(1).min(20);
        let pause = (self.policy.backoff_first_ms << exponent).min(self.policy.backoff_max_ms);
        // ±20 %, so that what failed together does not start together.
        let jitter = pause * (self.seed % 401) / 1000;
        let pause = pause - pause / 5 + jitter;
        self.enter(Phase::Backoff, Some(pause));
        self.state.message = format!("{message}; it is started again in {pause} ms");
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
