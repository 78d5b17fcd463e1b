//! PURE: one step of the state machine, event by event. The table is in the parent module.

use super::{Action, Ended, Event, Health, Lease, Phase, Policy, Process, State};
use crate::mutant;

/// Between a SIGKILL and the next, should the first not have helped (a process in state D ends when it leaves it).
const KILL_AGAIN_MS: u64 = 5_000;
/// Between SIGTERM and SIGKILL when the end is forced.
const FORCED_GRACE_MS: u64 = 2_000;
/// The drain itself ends in time; this is for one that does not.
const DRAIN_SLACK_MS: u64 = 2_000;

/// Longest time that a look at a loading process takes, and that what it has found holds. An agent that was halted, or
/// had no processor, for longer than that looks once more.
const LOOK_MS: u64 = 10_000;

/// Said of an instance whose turn has not come.
const WAITS: &str = "waits for its turn: this node launches a few servers at a time (launches_at_once)";

/// Takes an event; returns what is to be done.
pub(super) fn take(state: &mut State, event: Event, now_ms: u64, policy: &Policy, seed: u64) -> Vec<Action> {
    let mut step = Step { state, now_ms, policy, seed, actions: Vec::new() };
    step.take(event);
    step.actions
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
                    self.queue();
                }
            }
            Event::Turn => {
                if phase == Phase::Queued {
                    self.launch();
                }
            }
            // Its report gives the claim back, at any moment from here on: whatever is started would run under a token whose
            // claim is gone, unrecorded in the store, beside what another node starts under the next. If it is wanted
            // again it is offered again.
            Event::Want(true) if phase == Phase::Stopped => {}
            Event::Want(true) => {
                self.state.wanted = true;
                self.state.forced = false;
                if phase == Phase::Claimed {
                    self.queue();
                }
            }
            Event::Owned(owned) => {
                self.state.owned = owned;
                match phase {
                    Phase::Claimed if owned && self.state.wanted => self.queue(),
                    // It was due while nothing covered it.
                    Phase::Backoff if owned && self.state.deadline_ms.is_none() => self.queue(),
                    Phase::Queued if !self.may_start() => self.enter(Phase::Backoff, None),
                    _ => {}
                }
            }
            Event::ClaimedAgain => {
                if phase == Phase::Stopped {
                    self.enter(Phase::Claimed, None);
                }
            }
            Event::Want(false) => self.unwanted(),
            Event::Force => self.forced(),
            Event::Launched => self.launched(),
            Event::LaunchFailed { message, retry } => self.launch_failed(message, retry),
            Event::Probed(health) => self.probed(health),
            Event::Progress => {
                if phase == Phase::Loading {
                    self.progressed();
                }
            }
            Event::Looked { begun_ms, progress, health } => self.looked(begun_ms, progress, health),
            Event::Drained => {
                if phase == Phase::Draining {
                    self.terminate();
                }
            }
            Event::Lease(lease) => self.lease(lease),
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
        self.state.looking_since_ms = None;
        self.state.deadline_ms = deadline_in_ms.map(|ms| self.now_ms + ms);
    }

    /// Puts what is owned in line for its launch; what is not stays as it is.
    fn queue(&mut self) {
        if !self.may_start() {
            self.state.deadline_ms = None;
            return;
        }
        self.enter(Phase::Queued, None);
        self.state.message = WAITS.to_owned();
        self.actions.push(Action::Queue);
    }

    fn may_start(&self) -> bool {
        self.state.owned || mutant::on(mutant::name::START_WITHOUT_CLAIM)
    }

    fn launch(&mut self) {
        self.enter(Phase::Starting, None);
        self.state.process = Process::Launching;
        self.state.message.clear();
        self.actions.push(Action::Launch);
    }

    fn terminate(&mut self) {
        self.enter(Phase::Stopping, Some(self.grace_ms()));
        self.actions.push(Action::Terminate);
    }

    fn grace_ms(&self) -> u64 {
        if self.state.forced { self.policy.grace_ms.min(FORCED_GRACE_MS) } else { self.policy.grace_ms }
    }

    fn stopped(&mut self) {
        self.enter(Phase::Stopped, None);
        self.state.message.clear();
    }

    fn unwanted(&mut self) {
        self.state.wanted = false;
        match self.state.phase {
            Phase::Claimed | Phase::Queued | Phase::Backoff | Phase::Failed => self.stopped(),
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

    fn forced(&mut self) {
        self.state.wanted = false;
        self.state.forced = true;
        match self.state.phase {
            Phase::Ready | Phase::Suspect => {
                self.actions.push(Action::Close);
                self.terminate();
            }
            Phase::Draining => self.terminate(),
            // It was asked to end already: what is left of its grace is shortened, never prolonged.
            Phase::Stopping if self.state.process == Process::Alive => {
                let due = self.now_ms + self.grace_ms();
                self.state.deadline_ms = Some(self.state.deadline_ms.map_or(due, |before| before.min(due)));
            }
            _ => self.unwanted(),
        }
    }

    fn launched(&mut self) {
        if self.state.process != Process::Launching {
            return;
        }
        self.state.process = Process::Alive;
        self.state.failed_launches = 0;
        if self.state.last_end.is_some() {
            self.state.restarts = self.state.restarts.saturating_add(1);
        }
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
            // An attempt that started nothing proves nothing about the server: it counts for no crash loop, neither now nor
            // with the next end.
            self.state.failed_launches = self.state.failed_launches.saturating_add(1);
            self.back_off(message, "");
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
            // Nothing is wrong with the process: it is left alone, and gets no requests.
            (Phase::Loading, Health::Other(what)) => {
                self.enter(Phase::Suspect, None);
                self.state.message = what;
            }
            (Phase::Ready, Health::Ok) => {
                self.state.streak = 0;
                if self.state.ready_since_ms.is_some_and(|since| self.now_ms - since >= self.policy.stable_ms) {
                    self.state.quick_ends = 0;
                    self.state.attempts = 1;
                }
            }
            (Phase::Ready, failing) => {
                self.state.streak += 1;
                if self.state.streak >= self.policy.suspect_after {
                    self.enter(Phase::Suspect, None);
                    self.state.message = match failing {
                        Health::Failing(what) | Health::Other(what) => format!("probes fail: {what}"),
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
                    self.state.ready_since_ms.get_or_insert(self.now_ms);
                    self.actions.push(Action::Open);
                }
            }
            (Phase::Suspect, Health::Other(what)) => {
                self.state.streak = 0;
                self.state.message = what;
            }
            (Phase::Suspect, _) => self.state.streak = 0,
            _ => {}
        }
    }

    /// The route says so too ([`State::lapses`]); requests in flight have until the shim asks the server to end.
    fn lease(&mut self, lease: Lease) {
        let lapses = lease != Lease::Renewed;
        if std::mem::replace(&mut self.state.lapses, lapses) != lapses && self.state.phase == Phase::Ready {
            self.actions.push(if lapses { Action::Close } else { Action::Open });
        }
        if lease == Lease::Over && self.state.process == Process::Alive {
            self.actions.push(Action::Kill);
        }
    }

    fn due(&mut self) {
        match self.state.phase {
            Phase::Backoff => self.queue(),
            // That nothing was heard of it may be this agent's own fault, which was halted: it counts after a look only.
            Phase::Loading => self.look(),
            Phase::Draining => self.terminate(),
            Phase::Stopping if self.state.process == Process::Alive => {
                self.state.deadline_ms = Some(self.now_ms + KILL_AGAIN_MS);
                self.actions.push(Action::Kill);
            }
            _ => self.state.deadline_ms = None,
        }
    }

    fn progressed(&mut self) {
        self.state.looking_since_ms = None;
        self.state.deadline_ms = Some(self.now_ms + self.policy.load_timeout_ms);
    }

    fn look(&mut self) {
        self.state.looking_since_ms = Some(self.now_ms);
        self.state.deadline_ms = Some(self.now_ms + LOOK_MS);
        self.actions.push(Action::Look);
    }

    fn looked(&mut self, begun_ms: u64, progress: bool, health: Health) {
        // Of an earlier load, or one that was given up and asked for anew.
        if self.state.phase != Phase::Loading || self.state.looking_since_ms.is_none_or(|since| begun_ms < since) {
            return;
        }
        match health {
            Health::Ok | Health::Other(_) => self.probed(health),
            _ if progress => self.progressed(),
            _ if self.now_ms.saturating_sub(begun_ms) > LOOK_MS => self.look(),
            Health::Loading | Health::Failing(_) => {
                let seconds = self.policy.load_timeout_ms / 1000;
                self.state.quick_ends += 1;
                self.terminate();
                self.state.message = format!("no progress for {seconds} s while the model loaded");
            }
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
        let gave_up = ended.gave_up();
        let lease_lost = ended.lease_lost;
        self.state.lapses = false;
        self.state.last_end = Some(ended);
        let served_ms = self.state.ready_since_ms.take().map_or(0, |since| self.now_ms.saturating_sub(since));
        if !self.state.wanted {
            self.stopped();
            return;
        }
        match phase {
            // It says nothing about the server.
            _ if lease_lost => {
                let pause = self.policy.backoff_first_ms;
                self.enter(Phase::Backoff, Some(pause));
                self.state.message = format!("llama-server {reason}; it is started again under a claim that stands");
                return;
            }
            // Ended by us, for lack of progress (which was counted then), or wanted again meanwhile.
            Phase::Draining | Phase::Stopping => {}
            Phase::Loading if gave_up => {
                self.fail(format!("the model can't be served: llama-server {reason}"));
                return;
            }
            _ if served_ms >= self.policy.stable_ms => (self.state.quick_ends, self.state.attempts) = (1, 1),
            _ => self.state.quick_ends += 1,
        }
        if self.state.quick_ends >= self.policy.quick_ends_max {
            let times = self.state.quick_ends;
            self.fail(format!("crash loop: ended {times} times in a row; the last time llama-server {reason}"));
        } else {
            let why = std::mem::take(&mut self.state.message);
            let comma = if why.is_empty() { "" } else { ": " };
            let bound = self.policy.quick_ends_max;
            self.back_off(
                format!("{why}{comma}llama-server {reason}"),
                &format!("; {bound} quick ends are a crash loop"),
            );
        }
    }

    fn fail(&mut self, message: String) {
        self.enter(Phase::Failed, None);
        self.state.message = message;
    }

    fn back_off(&mut self, message: String, bound: &str) {
        // Attempts that started nothing make the pause as long as ends in a row do, and no longer.
        let longest = self.policy.quick_ends_max.saturating_sub(1).max(self.state.quick_ends);
        let in_vain = self.state.quick_ends.saturating_add(self.state.failed_launches).min(longest);
        let exponent = in_vain.saturating_sub(1).min(20);
        let pause = (self.policy.backoff_first_ms << exponent).min(self.policy.backoff_max_ms);
        // ±20 %, so that what failed together does not start together.
        let jitter = pause * (self.seed % 401) / 1000;
        let pause = pause - pause / 5 + jitter;
        self.enter(Phase::Backoff, Some(pause));
        self.state.attempts = self.state.attempts.saturating_add(1);
        let attempt = self.state.attempts;
        self.state.message = format!("{message}; it is started again in {pause} ms (attempt {attempt}{bound})");
    }
}
