//! What others see of an instance: its spans, its route, its entry on the board.

use super::{
    super::{board::Entry, state::Phase, trace},
    Supervisor,
};
use crate::proxy::{Route, RouteState};
use tracing::info_span;

impl Supervisor {
    /// The steps of a start and of a stop, as spans.
    pub(super) fn trace(&mut self, before: Phase) {
        match self.state.phase {
            Phase::Starting => {
                if !self.spans.is_busy() {
                    // A restart: nobody asked for it, so it is a trace of its own.
                    self.spans.begin(trace::start(&self.claim.instance, &self.claim.spec.name, ""));
                }
                self.spans.step(|parent| info_span!(parent: parent, "launch"));
            }
            Phase::Loading => self.spans.step(|parent| info_span!(parent: parent, "load")),
            Phase::Draining => self.spans.step(|parent| info_span!(parent: parent, "drain")),
            Phase::Stopping => self.spans.step(|parent| info_span!(parent: parent, "terminate")),
            Phase::Ready if before == Phase::Loading => self.spans.end(None),
            Phase::Stopped => self.spans.end(None),
            Phase::Failed | Phase::Backoff => self.spans.end(Some(&self.state.message)),
            _ => {}
        }
    }

    pub(super) fn route(&self) -> Route {
        let state = match self.state.phase {
            Phase::Ready => RouteState::Open,
            Phase::Suspect | Phase::Draining => RouteState::Draining,
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

    pub(super) fn publish(&self) {
        let board = &self.context.board;
        let owned = board.get(&self.claim.instance).is_some_and(|entry| entry.owned);
        board.set(
            &self.claim.instance,
            Entry {
                token: self.claim.token,
                owned,
                state: self.state.reported(),
                pid: self.pid(),
                restarts: self.state.restarts,
                message: self.state.message.clone(),
                since: self.since,
                traceparent: self.spans.traceparent().to_owned(),
                exit_code: self.state.last_end.as_ref().and_then(|end| end.code),
                exit_signal: self.state.last_end.as_ref().and_then(|end| end.signal),
                memory_bytes: self.claim.memory_bytes,
            },
        );
    }
}
