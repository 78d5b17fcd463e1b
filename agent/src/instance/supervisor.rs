//! One instance: feeds what happens to the state machine and does what that says.
//!
//! Owns the instance's directory, its process while there is one, its probes and its entry on the board. Decides nothing
//! itself; the registry talks to it through a [`Handle`].

use super::{
    board::Entry,
    claim::Claim,
    context::Context,
    handle::{Command, Handle},
    health,
    run::{self, Run, now_ms},
    state::{Action, Event, Phase, Policy, Process, State},
    trace::{self, Spans},
};
use crate::{
    clock,
    host::processes::Living,
    proxy::{Route, RouteState},
};
use drover_proto::v1::{Severity, Token};
use drover_shim::{
    failpoint::{self, Step},
    record::{Directory, Record},
};
use prost_types::Timestamp;
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};
use tracing::{Instrument as _, Span, info_span};

/// Pause between probes while the model loads, and when it is loaded.
const PROBE_LOADING: Duration = Duration::from_millis(50);
const PROBE_SERVING: Duration = Duration::from_secs(1);
/// How often a loading process is asked whether it has done anything. That is measured by its processor time alone: one
/// that only waits for a slow disk or for a GPU uses none meanwhile, so `load_timeout_ms` must outlast such a wait.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// How long a shim is waited for whose server has ended, and how often it is looked at.
const SHIM_PATIENCE: Duration = Duration::from_secs(1);
const SHIM_POLL: Duration = Duration::from_millis(5);

/// How an instance begins under this agent.
#[derive(Debug)]
pub enum Begin {
    /// Claimed now. The span covers it from the offer on.
    Claimed(Span),
    /// Its process was found alive; `ready` when it was seen to answer for the right model.
    Adopted {
        /// The process and its record.
        run: Run,
        /// Whether it answers.
        ready: bool,
    },
    /// Its process had ended.
    Ended(super::state::Ended),
    /// It had failed for good.
    Failed(String),
}

/// What the supervisor's own tasks tell it.
enum Message {
    Launched(Result<Run, run::Failed>),
    Event(Event),
}

struct Supervisor {
    context: Arc<Context>,
    claim: Claim,
    directory: Directory,
    socket: PathBuf,
    policy: Policy,
    state: State,
    since: Timestamp,
    spans: Spans,
    run: Option<(Arc<Living>, Record)>,
    /// Tasks of the present run; ended with it.
    tasks: JoinSet<()>,
    /// Which run a message is about: those of an earlier one are void.
    number: u64,
    messages: mpsc::Sender<(u64, Message)>,
    /// Whether the probes are to be quick, as while the model loads.
    loading: watch::Sender<bool>,
    raises: Vec<(Token, oneshot::Sender<bool>)>,
}

/// Starts the supervisor of an instance whose directory exists. Must be called on the agent's main runtime.
pub fn spawn(context: Arc<Context>, claim: Claim, directory: Directory, begin: Begin) -> Handle {
    let (commands, inbox) = mpsc::channel(32);
    let (messages, outcomes) = mpsc::channel(32);
    let policy = context.policy(&claim.spec);
    let socket = context.settings.socket_of(&claim.instance);
    let (state, spans, run) = match begin {
        Begin::Claimed(span) => (State::claimed(), Spans::of(span), None),
        Begin::Adopted { run, ready } => {
            let state = State::adopted(ready, claim.restarts, now_ms(), &policy);
            (state, Spans::default(), Some((run.living, run.record)))
        }
        Begin::Ended(ended) => (State::ended(ended, claim.restarts, now_ms()), Spans::default(), None),
        Begin::Failed(message) => (State::failed(message, claim.restarts), Spans::default(), None),
    };
    // What an earlier agent has seen begin did not begin now.
    let since = claim.since.filter(|(before, _)| *before == state.reported()).map_or_else(clock::now, |(_, at)| at);
    let supervisor = Supervisor {
        context,
        claim,
        directory,
        socket,
        policy,
        state,
        since,
        spans,
        run,
        tasks: JoinSet::new(),
        number: 0,
        messages,
        loading: watch::Sender::new(true),
        raises: Vec::new(),
    };
    // Before anybody can look: an instance is never missing from the board between two sets of claims.
    supervisor.publish();
    supervisor.context.routes.prepare(supervisor.route());
    let span = info_span!(target: "instance", "instance", id = supervisor.claim.instance);
    tokio::spawn(supervisor.serve(inbox, outcomes).instrument(span));
    Handle(commands)
}

impl Supervisor {
    async fn serve(mut self, mut commands: mpsc::Receiver<Command>, mut outcomes: mpsc::Receiver<(u64, Message)>) {
        self.context.routes.set(self.route()).await;
        if self.run.is_some() {
            self.watch();
        }
        self.take(Event::Begin).await;
        loop {
            let now = now_ms();
            let pause = self.state.deadline_ms.map(|due| Duration::from_millis(due.saturating_sub(now)));
            tokio::select! {
                command = commands.recv() => match command {
                    // The agent ends: processes live on, and are found again by the next one.
                    None => return,
                    Some(Command::Want(wanted, traceparent)) => {
                        if wanted != self.state.wanted {
                            if !wanted {
                                self.spans.begin(trace::stop(&self.claim.instance, &traceparent));
                            }
                            self.take(Event::Want(wanted)).await;
                        }
                    }
                    Some(Command::Restore(claim)) => self.restore(*claim),
                    Some(Command::Raise(token, answer)) => {
                        self.raises.push((token, answer));
                        self.settle_raises().await;
                    }
                    Some(Command::Discard(answer)) => {
                        let possible = self.state.process == Process::None && self.discard().await;
                        let _ = answer.send(possible);
                        if possible {
                            return;
                        }
                    }
                },
                Some((number, message)) = outcomes.recv() => {
                    if number == self.number {
                        self.hear(message).await;
                    }
                }
                () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => self.take(Event::Tick).await,
            }
        }
    }

    async fn hear(&mut self, message: Message) {
        match message {
            Message::Event(event) => {
                if matches!(event, Event::Ended(_)) {
                    failpoint::at(Step::StopSettled);
                    self.run = None;
                    self.tasks = JoinSet::new();
                }
                self.take(event).await;
            }
            Message::Launched(Ok(run)) => {
                self.run = Some((run.living, run.record));
                self.take(Event::Launched).await;
                self.watch();
                self.settle_raises().await;
            }
            Message::Launched(Err(failed)) => {
                self.take(Event::LaunchFailed { message: failed.message, retry: failed.retry }).await;
                self.settle_raises().await;
            }
        }
    }

    async fn take(&mut self, event: Event) {
        let before = self.state.clone();
        let (state, actions) = self.state.clone().step(event, now_ms(), &self.policy, rand::random());
        self.state = state;
        if before.phase != self.state.phase {
            self.since = clock::now();
            self.trace(before.phase);
            let why = if self.state.message.is_empty() { String::new() } else { format!(": {}", self.state.message) };
            tracing::info!(from = ?before.phase, pid = self.pid(), token = %self.claim.token, "{:?}{why}", self.state.phase);
            self.keep();
        }
        // A route is in force before its consequence is told: who hears "ready" may send requests at once.
        for action in actions {
            self.act(action).await;
        }
        self.loading.send_if_modified(|loading| {
            let now = matches!(self.state.phase, Phase::Starting | Phase::Loading);
            std::mem::replace(loading, now) != now
        });
        self.publish();
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::Launch => self.launch(),
            Action::Open | Action::Close => {
                self.context.routes.set(self.route()).await;
                if action == Action::Open {
                    failpoint::at(Step::StartRouted);
                }
            }
            Action::Drain(ms) => {
                failpoint::at(Step::StopRouteDraining);
                let (context, instance) = (self.context.clone(), self.claim.instance.clone());
                self.task(self.spans.current(), async move {
                    if !context.routes.wait_drained(&instance, Duration::from_millis(ms)).await {
                        tracing::warn!(instance, "requests were still in flight at the end of drain_timeout_ms = {ms}");
                    }
                    failpoint::at(Step::StopDrained);
                    Event::Drained
                });
            }
            Action::Terminate | Action::Kill => {
                let Some((living, _)) = &self.run else { return };
                let done = if action == Action::Kill { living.kill_session() } else { living.terminate() };
                failpoint::at(Step::StopSigtermSent);
                if let Err(error) = done {
                    let message = format!("pid {} can't be signalled: {error}", living.pid());
                    self.context.events.tell(&self.claim.instance, "SignalFailed", Severity::Error, message);
                }
            }
        }
    }

    fn launch(&mut self) {
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
    fn watch(&mut self) {
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
    fn task(&mut self, span: Span, work: impl Future<Output = Event> + Send + 'static) {
        let (messages, number) = (self.messages.clone(), self.number);
        self.tasks.spawn(
            async move {
                let event = work.await;
                let _ = messages.send((number, Message::Event(event))).await;
            }
            .instrument(span),
        );
    }

    /// The steps of a start and of a stop, as spans.
    fn trace(&mut self, before: Phase) {
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

    /// Keeps what the next agent has to know.
    fn keep(&mut self) {
        let failed = (self.state.phase == Phase::Failed).then(|| self.state.message.clone());
        let lasting = matches!(self.state.phase, Phase::Ready | Phase::Failed);
        if failed == self.claim.failed && self.state.restarts == self.claim.restarts && !lasting {
            return;
        }
        if lasting {
            self.claim.since = Some((self.state.reported(), self.since));
        }
        self.claim.failed = failed;
        self.claim.restarts = self.state.restarts;
        if let Err(error) = self.claim.write(self.directory.path()) {
            tracing::warn!(instance = self.claim.instance, %error, "what was learnt is not on disk");
        }
    }

    /// Takes what is to run, and what it reserves, from the set of claims when the file that said so was lost: the next
    /// start needs it.
    fn restore(&mut self, claim: Claim) {
        if !self.claim.is_lost() || claim.is_lost() {
            return;
        }
        let lost = &self.claim;
        self.policy = self.context.policy(&claim.spec);
        self.claim = Claim {
            token: lost.token,
            restarts: lost.restarts,
            failed: lost.failed.clone(),
            since: lost.since,
            ..claim
        };
        if let Err(error) = self.claim.write(self.directory.path()) {
            tracing::warn!(instance = self.claim.instance, %error, "the restored claim is not on disk");
        }
        self.publish();
    }

    /// Raises the token, unless a launch is under way: then its outcome comes first.
    async fn settle_raises(&mut self) {
        if self.state.process == Process::Launching {
            return;
        }
        for (token, answer) in std::mem::take(&mut self.raises) {
            let raised = token <= self.claim.token || self.raise(token);
            if raised {
                self.context.routes.set(self.route()).await;
            }
            self.publish();
            let _ = answer.send(raised);
        }
    }

    fn raise(&mut self, token: Token) -> bool {
        let claim = Claim { token, ..self.claim.clone() };
        match run::raise(&self.directory, &claim) {
            Ok(()) => {
                if let Some((_, record)) = &mut self.run {
                    record.token = super::claim::stored_token(token);
                }
                self.claim = claim;
                true
            }
            Err(error) => {
                tracing::error!(instance = self.claim.instance, %error, "the token could not be raised to {token}");
                false
            }
        }
    }

    fn route(&self) -> Route {
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

    fn pid(&self) -> i32 {
        self.run.as_ref().map_or(0, |(living, _)| living.pid())
    }

    fn publish(&self) {
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

    /// Removes everything of the instance; false, and nothing is removed, while a shim does not let go of it.
    async fn discard(&mut self) -> bool {
        failpoint::at(Step::StopReported);
        let removed = async {
            // One that has made the end durable lets go in a moment.
            while !super::adopt::remove(&self.directory, &self.socket) {
                tokio::time::sleep(SHIM_POLL).await;
            }
        };
        if tokio::time::timeout(SHIM_PATIENCE, removed).await.is_err() {
            return false;
        }
        failpoint::at(Step::StopRemoved);
        self.tasks = JoinSet::new();
        self.context.routes.remove(&self.claim.instance);
        self.context.board.remove(&self.claim.instance);
        true
    }
}
