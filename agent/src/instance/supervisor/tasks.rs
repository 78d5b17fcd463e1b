//! The present run: its launch, and the tasks that watch, probe and time its process until it ends.

use super::{
    super::{
        run::now_ms,
        state::{Event, Health, Lease, Phase},
        traces,
    },
    Message, Supervisor, progress,
};
use crate::clock;
use drover_proto::world;
use drover_shim::failpoint::{self, Step};
use std::{pin::pin, time::Duration};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tracing::{Instrument as _, Span};

/// Pause between probes when the model is loaded. While it loads, a share of the time that this has taken so far: the end of
/// a load is seen late by that share at most, and a long one is not asked for every moment.
const PROBE_SERVING: Duration = Duration::from_secs(1);
const PROBE_LOADING_SHARE: u32 = 10;
const PROBE_LOADING_MIN: Duration = Duration::from_millis(5);
/// How often a loading process is asked whether it has done anything: used the processor, or read. One that waits for a
/// GPU does neither, so `load_timeout_ms` must outlast such a wait.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// How often the lease is looked at that a server ends with: while it lapses, and at least.
const LEASE_PAUSE: Duration = Duration::from_millis(100);
const LEASE_LOOK: Duration = Duration::from_secs(1);

impl Supervisor {
    pub(super) fn queue(&mut self) {
        self.number += 1;
        let (context, messages, number) = (self.context.clone(), self.messages.clone(), self.number);
        self.tasks = JoinSet::new();
        self.tasks.spawn(world::task(async move {
            let mut turn = pin!(context.turns.take());
            loop {
                // A turn ends, whoever has it; how many wait before this one nobody can bound.
                let message = match timeout(progress::TOLD_EVERY, &mut turn).await {
                    Ok(turn) => Message::Turn(turn),
                    Err(_) => Message::Waits,
                };
                let over = matches!(message, Message::Turn(_));
                if messages.send((number, message)).await.is_err() || over {
                    return;
                }
            }
        }));
    }

    pub(super) fn launch(&mut self) {
        self.number += 1;
        self.tasks = JoinSet::new();
        self.claim.restarts = self.state.restarts;
        self.ended_pid = 0;
        let (context, claim, directory) = (self.context.clone(), self.claim.clone(), self.directory.clone());
        let (messages, number) = (self.messages.clone(), self.number);
        // Not among the run's tasks: a launch can't be called back, and its outcome must be heard.
        let launch = async move {
            let launched = context.machine.launch(&context, &claim, &directory).await;
            let _ = messages.send((number, Message::Launched(launched))).await;
        };
        tokio::spawn(world::task(launch.instrument(self.spans.current())));
    }

    /// Watches the process and probes it, until it ends.
    pub(super) fn watch(&mut self) {
        let Some((living, record)) = &self.run else { return };
        let (living, record, directory) = (living.clone(), record.clone(), self.directory.clone());
        let (watched, of, machine) = (living.clone(), record.clone(), self.context.machine.clone());
        // In no span: it lives as long as the process, and would keep the start's span open.
        self.task(Span::none(), async move {
            watched.ended().await;
            failpoint::at(Step::StopEnded);
            Event::Ended(machine.ended(&directory, &of).await)
        });
        let (messages, number, socket) = (self.messages.clone(), self.number, self.socket.clone());
        let model = traces::model(&record.arguments);
        // An adopted one that is ready has said what it serves.
        let mut confirmed = self.state.phase == Phase::Ready;
        let (loading, machine) = (self.loading.subscribe(), self.context.machine.clone());
        self.tasks.spawn(world::task(async move {
            let begun = Instant::now();
            loop {
                // What serves on the socket is asked until it has said the right thing once: a process does not change its model.
                let health = machine.probe(&socket, (!confirmed).then_some(model.as_path())).await;
                confirmed |= health == Health::Ok;
                let loads = health != Health::Ok && *loading.borrow();
                // The next probe begins after this one has ended: none piles up on another.
                if messages.send((number, Message::Event(Event::Probed(health)))).await.is_err() {
                    return;
                }
                let share = (begun.elapsed() / PROBE_LOADING_SHARE).clamp(PROBE_LOADING_MIN, PROBE_SERVING);
                sleep(if loads { share } else { PROBE_SERVING }).await;
            }
        }));
        if self.claim.ends_with_lease() {
            self.watch_lease();
        }
        let (messages, mut loading) = (self.messages.clone(), self.loading.subscribe());
        self.tasks.spawn(world::task(async move {
            let (mut done, mut at) = (living.work(), Instant::now());
            while *loading.borrow_and_update() {
                let _ = timeout(PROGRESS_INTERVAL, loading.changed()).await;
                let now = living.work();
                if progress::shows(done, now, at.elapsed()) {
                    if messages.send((number, Message::Event(Event::Progress))).await.is_err() {
                        return;
                    }
                    (done, at) = (now, Instant::now());
                }
            }
        }));
    }

    /// Takes requests away from a server whose lease is not renewed, while that may still end well, and ends one that its
    /// shim has not ended in time. What the shim goes by is gone by here too.
    fn watch_lease(&mut self) {
        let (messages, number, directory) = (self.messages.clone(), self.number, self.directory.clone());
        let machine = self.context.machine.clone();
        self.tasks.spawn(world::task(async move {
            let mut told = Lease::Renewed;
            loop {
                // What can't be read was told last.
                let Some(times) = machine.lease(&directory) else {
                    sleep(LEASE_PAUSE).await;
                    continue;
                };
                let now_ns = clock::boottime_ns();
                let lease = match now_ns {
                    now if now >= times.kill_ns => Lease::Over,
                    now if now >= times.drain_ns => Lease::Lapses,
                    _ => Lease::Renewed,
                };
                // Killed again for as long as it lives.
                if (lease != told || lease == Lease::Over)
                    && messages.send((number, Message::Event(Event::Lease(lease)))).await.is_err()
                {
                    return;
                }
                told = lease;
                let left = Duration::from_nanos(times.drain_ns.saturating_sub(now_ns));
                sleep(left.clamp(LEASE_PAUSE, LEASE_LOOK)).await;
            }
        }));
    }

    /// Looks for as long as between two looks at its progress whether the process does anything, then whether it answers.
    pub(super) fn look(&mut self) {
        let Some((living, record)) = &self.run else { return };
        let (living, model, socket) = (living.clone(), traces::model(&record.arguments), self.socket.clone());
        let (machine, begun_ms) = (self.context.machine.clone(), now_ms());
        self.task(Span::none(), async move {
            let before = living.work();
            sleep(PROGRESS_INTERVAL).await;
            let now = living.work();
            let health = machine.probe(&socket, Some(&model)).await;
            Event::Looked { begun_ms, progress: now.is_none() || now != before, health }
        });
    }

    /// A task of the present run, which ends in an event; done within a span.
    pub(super) fn task(&mut self, span: Span, work: impl Future<Output = Event> + Send + 'static) {
        let (messages, number) = (self.messages.clone(), self.number);
        let work = async move {
            let event = work.await;
            let _ = messages.send((number, Message::Event(event))).await;
        };
        self.tasks.spawn(world::task(work.instrument(span)));
    }
}
