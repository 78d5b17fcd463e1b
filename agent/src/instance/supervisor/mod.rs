//! One instance: feeds what happens to the state machine and does what that says.
//!
//! Owns the instance's directory, its process while there is one, its probes and its entry on the board. Decides nothing
//! itself; the registry talks to it through a [`Handle`].

mod keep;
mod progress;
mod tasks;
mod tell;

use super::{
    claim::Claim,
    context::Context,
    handle::{Command, Handle},
    machine,
    run::{self, Run, now_ms},
    state::{Action, Event, Phase, Policy, Process, State},
    trace::{self, Spans},
    turns::Turn,
};
use crate::clock;
use drover_proto::{
    v1::{Severity, Token},
    world,
};
use drover_shim::{
    failpoint::{self, Step},
    record::{Directory, Record},
};
use progress::Progress;
use prost_types::Timestamp;
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};
use tracing::{Instrument as _, Span, info_span};

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
    /// It may be launched; the others wait while this is held.
    Turn(Turn),
    /// It waits for its turn, as it should.
    Waits,
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
    progress: Progress,
    spans: Spans,
    run: Option<(Arc<dyn machine::Process>, Record)>,
    /// The process that ended last; 0 when the present attempt has had none yet.
    ended_pid: i32,
    /// Held from the launch until the server answers or ends, or has taken long.
    turn: Option<Turn>,
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
        progress: Progress::now(),
        spans,
        run,
        ended_pid: 0,
        turn: None,
        tasks: JoinSet::new(),
        number: 0,
        messages,
        loading: watch::Sender::new(true),
        raises: Vec::new(),
    };
    // Before anybody can look: an instance is never missing from the board between two sets of claims.
    supervisor.context.board.set(&supervisor.claim.instance, supervisor.entry());
    supervisor.tell_of(None);
    supervisor.context.routes.prepare(supervisor.route());
    let span = info_span!(target: "instance", "instance", id = supervisor.claim.instance);
    tokio::spawn(world::task(supervisor.serve(inbox, outcomes).instrument(span)));
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
                        // One that was claimed again after it had stopped waits to hear it, whatever was wanted before.
                        if wanted != self.state.wanted || self.state.phase == Phase::Claimed {
                            if !wanted {
                                self.spans.begin(trace::stop(&self.claim.instance, &traceparent));
                            }
                            self.take(Event::Want(wanted)).await;
                        }
                    }
                    Some(Command::Own(owned)) => {
                        if owned != self.state.owned {
                            self.take(Event::Owned(owned)).await;
                        }
                    }
                    Some(Command::Force) => self.take(Event::Force).await,
                    Some(Command::Restore(claim)) => self.restore(*claim),
                    Some(Command::Raise(token, answer)) => {
                        self.raises.push((token, answer));
                        self.settle_raises().await;
                    }
                    Some(Command::Discard(answer)) => {
                        // Who has given up waiting does not know what has become of it.
                        let waited_for = !answer.is_closed();
                        let possible = waited_for && self.state.process == Process::None && self.discard().await;
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
                if let Event::Ended(ended) = &event {
                    if ended.oom_killed == Some(true) {
                        let (events, instance) = (&self.context.events, &self.claim.instance);
                        events.tell(instance, "OomKilled", Severity::Error, format!("llama-server {ended}"));
                    }
                    if ended.lease_lost {
                        let (events, instance, token) = (&self.context.events, &self.claim.instance, self.claim.token);
                        let message = format!("pid {}, token {token}: llama-server {ended}", self.pid());
                        events.tell(instance, "LeaseLost", Severity::Warning, message);
                    }
                    failpoint::at(Step::StopSettled);
                    self.ended_pid = self.pid();
                    self.run = None;
                    self.tasks = JoinSet::new();
                }
                self.take(event).await;
            }
            Message::Waits => {
                if self.progress.made() {
                    self.publish();
                }
            }
            Message::Turn(turn) => {
                self.turn = Some(turn);
                self.take(Event::Turn).await;
            }
            Message::Launched(Ok(run)) => {
                self.run = Some((run.living, run.record));
                self.take(Event::Launched).await;
                self.watch();
                self.settle_raises().await;
            }
            // It ran, however short: that is a launch and an end, which counts as every other one does.
            Message::Launched(Err(run::Failed { ended: Some((pid, ended)), .. })) => {
                self.take(Event::Launched).await;
                self.ended_pid = pid;
                self.take(Event::Ended(ended)).await;
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
        if event == Event::Progress && before.phase == Phase::Loading {
            self.progress.made();
        }
        let (state, actions) = self.state.clone().step(event, now_ms(), &self.policy, world::random_u64());
        self.state = state;
        if before.phase != self.state.phase {
            self.since = clock::now();
            self.progress = Progress::now();
            self.trace(before.phase);
            let why = if self.state.message.is_empty() { String::new() } else { format!(": {}", self.state.message) };
            tracing::info!(from = ?before.phase, pid = self.pid(), token = %self.claim.token, "{:?}{why}", self.state.phase);
            self.keep();
            self.tell_of(Some(before.phase));
        }
        // A route is in force before its consequence is told: who hears "ready" may send requests at once.
        for action in actions {
            self.act(action).await;
        }
        let starts = matches!(self.state.phase, Phase::Starting | Phase::Loading);
        if !starts {
            self.turn = None;
        }
        self.loading.send_if_modified(|loading| std::mem::replace(loading, starts) != starts);
        self.publish();
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::Queue => self.queue(),
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
            Action::Look => self.look(),
            Action::Terminate | Action::Kill => {
                let Some((living, _)) = &self.run else { return };
                let done = if action == Action::Kill { living.kill_tree() } else { living.terminate() };
                failpoint::at(Step::StopSigtermSent);
                if let Err(error) = done {
                    let message = format!("pid {} can't be signalled: {error}", living.pid());
                    self.context.events.tell(&self.claim.instance, "SignalFailed", Severity::Error, message);
                }
            }
        }
    }
}
