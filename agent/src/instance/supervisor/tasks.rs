//! The present run: its launch, and the tasks that watch, probe and time its process until it ends.

use super::{
    super::{health, run, state::Event},
    Message, Supervisor,
};
use drover_shim::failpoint::{self, Step};
use std::time::Duration;
use tokio::task::JoinSet;
use tracing::{Instrument as _, Span};

/// Pause between probes while the model loads, and when it is loaded.
const PROBE_LOADING: Duration = Duration::from_millis(50);
const PROBE_SERVING: Duration = Duration::from_secs(1);
/// How often a loading process is asked whether it has done anything. That is measured by its processor time alone: one
/// that only waits for a slow disk or for a GPU uses none meanwhile, so `load_timeout_ms` must outlast such a wait.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

impl Supervisor {
    pub(super) fn launch(&mut self) {
        self.number += 1;
        self.tasks = JoinSet::new();
        self.claim.restarts = self.state.restarts;
        let (context, claim, directory) = (self.context.clone(), self.claim.clone(), self.directory.clone());
        let (messages, number) = (self.messages.clone(), self.number);
        // Not among the run's tasks: a launch can't be called back, and its outcome must be heard.
        tokio::spawn(
            async move {
                let launched = run::launch(&context, &claim, &directory).await;
                let _ = messages.send((number, Message::Launched(launched))).await;
            }
            .instrument(self.spans.current()),
        );
    }

    /// Watches the process and probes it, until it ends.
    pub(super) fn watch(&mut self) {
        let Some((living, record)) = &self.run else { return };
        let (living, record, directory) = (living.clone(), record.clone(), self.directory.clone());
        let watched = living.clone();
        // In no span: it lives as long as the process, and would keep the start's span open.
        self.task(Span::none(), async move {
            watched.ended().await;
            failpoint::at(Step::StopEnded);
            Event::Ended(run::ended(&directory, Some(&record)).await)
        });
        let (messages, number, socket) = (self.messages.clone(), self.number, self.socket.clone());
        let mut loading = self.loading.subscribe();
        self.tasks.spawn(async move {
            loop {
                let health = health::probe(&socket).await;
                // The next probe begins after this one has ended: none piles up on another.
                if messages.send((number, Message::Event(Event::Probed(health)))).await.is_err() {
                    return;
                }
                let pause = if *loading.borrow_and_update() { PROBE_LOADING } else { PROBE_SERVING };
                let _ = tokio::time::timeout(pause, loading.changed()).await;
            }
        });
        let (messages, mut loading) = (self.messages.clone(), self.loading.subscribe());
        self.tasks.spawn(async move {
            let mut used = living.cpu_ticks();
            while *loading.borrow_and_update() {
                let _ = tokio::time::timeout(PROGRESS_INTERVAL, loading.changed()).await;
                let now = living.cpu_ticks();
                if now != used && messages.send((number, Message::Event(Event::Progress))).await.is_err() {
                    return;
                }
                used = now;
            }
        });
    }

    /// A task of the present run, which ends in an event; done within a span.
    pub(super) fn task(&mut self, span: Span, work: impl Future<Output = Event> + Send + 'static) {
        let (messages, number) = (self.messages.clone(), self.number);
        self.tasks.spawn(
            async move {
                let event = work.await;
                let _ = messages.send((number, Message::Event(event))).await;
            }
            .instrument(span),
        );
    }
}
