//! What others see of an instance: its spans, its route, its entry on the board.

use super::{
    super::{board::Entry, state::Phase, trace},
    Supervisor,
};
use crate::proxy::{Route, RouteState};
use drover_proto::v1::Severity;
use tracing::info_span;

impl Supervisor {
    /// The steps of a start and of a stop, as spans.
    pub(super) fn trace(&mut self, before: Phase) {
        match self.state.phase {
            Phase::Queued => {
                if !self.spans.is_busy() {
                    // A restart: nobody asked for it, so it is a trace of its own.
                    self.spans.begin(trace::start(&self.claim.instance, &self.claim.spec.name, ""));
                }
                self.spans.step(|parent| info_span!(parent: parent, "queue"));
            }
            Phase::Starting => self.spans.step(|parent| info_span!(parent: parent, "launch")),
            Phase::Loading => self.spans.step(|parent| info_span!(parent: parent, "load")),
            Phase::Draining => self.spans.step(|parent| info_span!(parent: parent, "drain")),
            Phase::Stopping => self.spans.step(|parent| info_span!(parent: parent, "terminate")),
            Phase::Ready if before == Phase::Loading => self.spans.end(None),
            Phase::Stopped => self.spans.end(None),
            Phase::Failed | Phase::Backoff => self.spans.end(Some(&self.state.message)),
            _ => {}
        }
    }

    /// What goes into the history beside the states: a state that soon passes may never be reported. `before` is the phase
    /// that was left; `None` when this agent has just taken the instance over.
    pub(super) fn tell_of(&self, before: Option<Phase>) {
        let (token, message) = (self.claim.token, &self.state.message);
        let (reason, severity, what) = match (self.state.phase, before) {
            (Phase::Backoff, None) => (
                "BackOff",
                Severity::Warning,
                format!("token {token}, ended while no agent ran: llama-server {message}; it is started again"),
            ),
            (Phase::Backoff, Some(before)) => {
                let pid = if self.ended_pid == 0 { String::new() } else { format!("pid {}, ", self.ended_pid) };
                ("BackOff", Severity::Warning, format!("{pid}token {token}, was {before:?}: {message}"))
            }
            (Phase::Ready | Phase::Loading, None) => {
                let and = if self.state.phase == Phase::Ready { "and answers" } else { "and does not answer yet" };
                let pid = self.pid();
                ("Adopted", Severity::Info, format!("pid {pid}, token {token}: taken back by a new agent, {and}"))
            }
            // Of one that this node owns the report says so.
            (Phase::Stopped, Some(_)) if !self.is_owned() => {
                let how = self.state.last_end.as_ref().map_or_else(String::new, |end| format!(": llama-server {end}"));
                ("Stopped", Severity::Info, format!("pid {}, token {token}{how}", self.ended_pid))
            }
            _ => return,
        };
        self.context.events.tell(&self.claim.instance, reason, severity, what);
    }

    pub(super) fn route(&self) -> Route {
        let state = match self.state.phase {
            Phase::Ready if !self.state.lapses => RouteState::Open,
            Phase::Ready | Phase::Suspect | Phase::Draining => RouteState::Draining,
            _ => RouteState::Closed,
        };
        Route {
            instance: self.claim.instance.clone(),
            token: self.claim.token,
            socket: self.socket.clone(),
            log_dir: self.directory.log(),
            state,
        }
    }

    pub(super) fn pid(&self) -> i32 {
        self.run.as_ref().map_or(0, |(living, _)| living.pid())
    }

    fn is_owned(&self) -> bool {
        self.context.board.get(&self.claim.instance).is_some_and(|entry| entry.owned)
    }

    pub(super) fn publish(&self) {
        self.context.board.update(&self.claim.instance, self.entry());
    }

    pub(super) fn entry(&self) -> Entry {
        Entry {
            token: self.claim.token,
            owned: self.state.owned,
            state: self.state.reported(),
            pid: self.pid(),
            restarts: self.state.restarts,
            message: self.state.message.clone(),
            since: self.since,
            progressed_at: self.progress.told_at(),
            traceparent: self.spans.traceparent().to_owned(),
            exit_code: self.state.last_end.as_ref().and_then(|end| end.code),
            exit_signal: self.state.last_end.as_ref().and_then(|end| end.signal),
            memory_bytes: self.claim.memory_bytes,
        }
    }
}
