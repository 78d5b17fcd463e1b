//! The session's stream: hello, heartbeats where they have none of their own, offers, sets of claims, reports. On a thread of its own.
//!
//! Nothing here waits for disks, processes or other calls: what must be done is handed on.

use super::{
    heartbeats::{Beats, Heartbeats, Wanted},
    identity::Identity,
    remote::{Coordinators, Incoming},
    stream::{OUTGOING, Stream, message},
};
use crate::{
    clock::{self, boottime_ns},
    instance::{
        machine::Held,
        registry::{Registry, SessionSet},
    },
    mutant,
};
use anyhow::{Context as _, bail};
use drover_proto::{
    PROTOCOL_MAX, PROTOCOL_MIN, VERSION,
    status::{reason, reason_of},
    v1::{
        Capacity, ClaimSet, CommandAnswer, Hello, Leave, ModelInventory, NodeCommand, NodeEvent, Offer, RunSet,
        SessionRequest, SessionResponse, SpanCheckpoint, Welcome, session_request, session_response,
    },
    world,
};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

/// Why a stream is left that serves no heartbeat.
const UNANSWERED: &str = "a heartbeat was not answered in time: the next coordinator is asked";
/// Longest wait for the answer to a hello.
const WELCOME_DEADLINE: Duration = Duration::from_secs(5);
/// The same while the session lives: what is left of it must do for another coordinator too.
const WELCOME_DEADLINE_MIN: Duration = Duration::from_secs(1);
/// How long the coordinator may take to end a stream that this agent has ended.
const FAREWELL: Duration = Duration::from_secs(1);
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(10);
/// How often reports are looked through that were not acknowledged.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Shortest time between two rounds of reports.
const REPORTS_PAUSE: Duration = Duration::from_millis(40);

/// How often all that is here is told, to be compared with what the store says; more or less, so that nodes spread out.
const INVENTORY_INTERVAL: Duration = Duration::from_secs(30);

/// What a node says of itself.
#[derive(Debug, Clone)]
pub struct About {
    /// Identity of the machine.
    pub machine_id: String,
    /// Boot id.
    pub boot_id: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// What it has to give when nothing but its instances runs there.
    pub capacity: Capacity,
    /// Address of its proxy as coordinators reach it.
    pub proxy_address: String,
}

/// Says how the agent's spans stand; waits for nothing.
#[derive(Clone)]
pub struct Checkpoint(pub Arc<dyn Fn() -> SpanCheckpoint + Send + Sync>);

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint").finish_non_exhaustive()
    }
}

/// The session, on its own thread.
#[derive(Debug)]
pub struct Session {
    pub(super) registry: Arc<Registry>,
    pub(super) coordinators: Arc<dyn Coordinators>,
    pub(super) about: About,
    pub(super) identity: Arc<Identity>,
    pub(super) events: mpsc::Receiver<NodeEvent>,
    pub(super) checkpoint: Checkpoint,
    pub(super) models: watch::Receiver<ModelInventory>,
    pub(super) capacity: watch::Receiver<Capacity>,
    pub(super) commands: mpsc::Sender<NodeCommand>,
    pub(super) answers: mpsc::Receiver<CommandAnswer>,
    pub(super) sets: watch::Sender<Option<SessionSet>>,
    pub(super) offers: mpsc::Sender<Box<Offer>>,
    /// Number of the last stream whose claims were applied, and on which what runs without one was tried to be claimed again.
    pub(super) reconciled: watch::Receiver<u64>,
    /// The stream whose set of claims was applied last, and the set's revision.
    pub(super) applied: watch::Receiver<(u64, i64)>,
    /// The session that no other agent of this host may have: its id.
    pub(super) held: Option<(String, Held)>,
    /// The stream that heartbeats are for.
    pub(super) beating: watch::Sender<Option<Wanted>>,
    /// How they stand, by number of the stream; and the end that says so.
    pub(super) beats: watch::Receiver<(u64, Beats)>,
    pub(super) tell_beats: Arc<watch::Sender<(u64, Beats)>>,
}

impl Session {
    /// What sends its heartbeats over a connection of their own; where that is not kept at work the stream carries them.
    #[must_use]
    pub fn heartbeats(&self) -> Heartbeats {
        Heartbeats {
            registry: self.registry.clone(),
            coordinators: self.coordinators.clone(),
            wanted: self.beating.subscribe(),
            told: self.tell_beats.clone(),
        }
    }

    /// Keeps a session until it is told to stop.
    pub async fn keep(mut self, stop: CancellationToken) {
        // Not all agents of a fleet begin with the same coordinator.
        let mut first = spread(&self.registry.context().settings.node, self.coordinators.count());
        let mut pause = RETRY_MIN;
        let mut told = String::new();
        while !stop.is_cancelled() {
            let began = Instant::now();
            match self.stream(&mut first, &stop).await {
                Ok(()) => told.clear(),
                Err(error) => {
                    first = (first + 1) % self.coordinators.count();
                    let text = format!("{error:#}");
                    // The same trouble is told once, not with every attempt.
                    if text == told {
                        tracing::debug!("no session: {text}");
                    } else {
                        tracing::warn!("no session: {text}");
                    }
                    told = text;
                }
            }
            // A stream that lasted was a good one: whatever ended it, the next coordinator is asked at once.
            pause = if began.elapsed() > RETRY_MAX { RETRY_MIN } else { (pause * 2).min(RETRY_MAX) };
            let jitter = pause.mul_f64(0.5 + 0.5 * world::random_share());
            tokio::select! {
                () = sleep(jitter) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// One stream, from its hello to its end, at the first coordinator that can be connected to, beginning with `first`,
    /// which is set to it. `Ok` when it ended to be resumed, or because it was told to.
    async fn stream(&mut self, first: &mut usize, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut stream = tokio::select! {
            opened = self.open(first) => opened.inspect_err(|_| self.let_go())?,
            () = stop.cancelled() => return Ok(()),
        };
        self.serve(&mut stream, stop).await
    }

    async fn open(&mut self, first: &mut usize) -> anyhow::Result<Stream> {
        let hello = self.hello()?;
        let (at, mut coordinator) = self.coordinators.connect(*first).await?;
        *first = at;
        let (outgoing, requests) = mpsc::channel(OUTGOING);
        let sent_ns = boottime_ns();
        let deadline = welcome_deadline(self.registry.context().session.left());
        outgoing.send(message(session_request::Message::Hello(hello))).await?;
        let opened =
            timeout(deadline, coordinator.session(requests)).await.context("the coordinator does not answer")?;
        let mut incoming = opened.map_err(|status| explain(&status))?;
        let answer = timeout(deadline, incoming.message()).await.context("no answer to the hello in time")?;
        let answer = answer.map_err(|status| explain(&status))?.context("the coordinator closed the stream")?;
        let Some(session_response::Message::Welcome(welcome)) = answer.message else {
            bail!("the coordinator's first message is no welcome");
        };
        self.welcomed(welcome, at, outgoing, incoming, sent_ns)
    }

    /// Holds the session that is to be resumed; false when another agent of this host has it.
    fn hold(&mut self, id: &str) -> bool {
        if id.is_empty() || self.held.as_ref().is_some_and(|(held, _)| held == id) {
            return true;
        }
        let held = self.registry.context().machine.hold_session(id);
        let Some(held) = held else { return false };
        self.held = Some((id.to_owned(), held));
        true
    }

    /// Lets go of a session that this agent knows from its disk alone: it may be that of another agent of this host, which
    /// must not wait for one that is refused.
    fn let_go(&mut self) {
        let ours = self.identity.session().id;
        self.held.take_if(|(held, _)| *held != ours);
    }

    fn hello(&mut self) -> anyhow::Result<Hello> {
        let runs = self.registry.recorded_runs();
        runs.iter().filter_map(|run| run.token).for_each(|token| self.identity.saw(token));
        let about = self.identity.introduction();
        if !self.hold(&about.session_id) {
            bail!(
                "another agent of this host has this node's session: state_dir = {} is a copy of its, or its of this one: \
                 run one agent, or give this one a name and a state_dir of its own",
                self.registry.context().settings.state_dir.display()
            );
        }
        Ok(Hello {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            agent_version: VERSION.to_owned(),
            machine_id: self.about.machine_id.clone(),
            boot_id: self.about.boot_id.clone(),
            agent_id: about.agent_id,
            resume_session_id: about.session_id,
            new_session_id: about.next_session_id,
            store_id: about.store_id,
            store_generation: about.store_generation,
            store_revision: about.store_revision,
            labels: self.about.labels.clone().into_iter().collect::<HashMap<_, _>>(),
            capacity: Some(self.capacity.borrow().clone()),
            proxy_address: self.about.proxy_address.clone(),
            runs,
            models: Some(self.models.borrow().clone()),
        })
    }

    fn welcomed(
        &mut self,
        welcome: Welcome,
        coordinator: usize,
        outgoing: mpsc::Sender<SessionRequest>,
        incoming: Incoming,
        sent_ns: u64,
    ) -> anyhow::Result<Stream> {
        let (ttl, interval) = (milliseconds(welcome.ttl_ms), milliseconds(welcome.heartbeat_interval_ms));
        if ttl.is_zero() || interval.is_zero() {
            bail!("the coordinator's welcome has ttl {ttl:?} and heartbeat interval {interval:?}");
        }
        if !(PROTOCOL_MIN..=PROTOCOL_MAX).contains(&welcome.protocol) {
            bail!(
                "the coordinator speaks protocol {}, this agent {PROTOCOL_MIN} to {PROTOCOL_MAX}: upgrade the older one",
                welcome.protocol
            );
        }
        self.identity.welcome(&welcome, coordinator, &self.registry.context().events).map_err(anyhow::Error::msg)?;
        if !self.hold(&welcome.session_id) {
            tracing::warn!(
                session = welcome.session_id,
                "another process of this host has a name made of this session's id"
            );
        }
        self.registry.context().session.welcome(&welcome.session_id, lives_from(sent_ns), ttl);
        let session = self.identity.session();
        tracing::info!(
            session = welcome.session_id,
            coordinator = welcome.coordinator,
            resumed = welcome.resumed,
            ttl_ms = welcome.ttl_ms,
            "this node has a session"
        );
        self.models.mark_unchanged();
        // What has changed since the hello was written is told once more.
        self.capacity.mark_changed();
        let stream = Stream::new(session, welcome.store_generation, ttl, interval, outgoing, incoming);
        self.beating.send_replace(Some(Wanted {
            stream: stream.number,
            session_id: stream.session_id.clone(),
            revision: welcome.session_revision,
            coordinator,
            ttl,
            interval,
        }));
        self.take_claims(&stream, welcome.claims.unwrap_or_default());
        Ok(stream)
    }

    async fn serve(&mut self, stream: &mut Stream, stop: &CancellationToken) -> anyhow::Result<()> {
        let outcome = self.talk(stream, stop).await;
        self.beating.send_replace(None);
        // Whichever part of the agent was seen to end first.
        if stop.is_cancelled() { self.farewell(stream).await } else { outcome }
    }

    /// Ends a stream in order.
    async fn farewell(&mut self, stream: &mut Stream) -> anyhow::Result<()> {
        stream.send(self.checkpoint())?;
        let return_within = self.registry.context().settings.return_within;
        if !return_within.is_zero() {
            let return_within_ms = i64::try_from(return_within.as_millis()).unwrap_or(i64::MAX);
            stream.send(session_request::Message::Leave(Leave { return_within_ms }))?;
        }
        // Closing our side is what tells the coordinator that this is an orderly end; when it has heard all of it, it
        // closes its own.
        stream.close();
        let heard = async { while let Ok(Some(_)) = stream.incoming.message().await {} };
        let _ = timeout(FAREWELL, heard).await;
        Ok(())
    }

    async fn talk(&mut self, stream: &mut Stream, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut heartbeat = interval(stream.interval);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut checkpoint = interval(CHECKPOINT_INTERVAL);
        checkpoint.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut again = interval(REPORT_INTERVAL);
        again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut board = self.registry.context().board.watch();
        loop {
            let give_up_at = stream.give_up_at();
            tokio::select! {
                answer = stream.incoming.message() => match answer {
                    Ok(Some(answer)) => self.hear(stream, answer),
                    Ok(None) => bail!("the coordinator closed the stream"),
                    Err(status) => return Err(explain(&status)),
                },
                _ = heartbeat.tick() => stream.heartbeat()?,
                changed = self.beats.changed() => {
                    changed.context("the agent ends")?;
                    let (number, beats) = *self.beats.borrow_and_update();
                    if number == stream.number {
                        if beats == Beats::Unanswered {
                            bail!("{UNANSWERED}");
                        }
                        stream.beats_elsewhere = beats == Beats::Up;
                        // Where they were answered until now the next one is due at once.
                        stream.heartbeat()?;
                    }
                }
                applied = self.applied.changed() => {
                    applied.context("the agent ends")?;
                    let (number, _) = *self.applied.borrow_and_update();
                    if number == stream.number && stream.inventory_at.is_none() {
                        stream.inventory_at = Some(Instant::now());
                    }
                }
                changed = self.reconciled.changed() => {
                    changed.context("the agent ends")?;
                    self.tell_runs(stream)?;
                }
                () = at(stream.inventory_at) => self.tell_inventory(stream)?,
                () = at(give_up_at) => bail!("{UNANSWERED}"),
                changed = board.changed() => {
                    changed.context("the board is gone")?;
                    // The first change goes out at once, and what follows it together: each round is a write to the store.
                    if stream.reported.is_none_or(|at| at.elapsed() >= REPORTS_PAUSE) {
                        self.report(stream);
                    } else {
                        stream.behind = true;
                    }
                }
                () = sleep(REPORTS_PAUSE), if stream.behind || stream.reports.holds_back() => self.report(stream),
                _ = again.tick() => {
                    self.report(stream);
                    self.tell_runs(stream)?;
                }
                event = self.events.recv() => {
                    let event = event.context("the agent ends")?;
                    stream.send(session_request::Message::Event(event))?;
                }
                changed = self.models.changed() => {
                    changed.context("the agent ends")?;
                    let models = self.models.borrow_and_update().clone();
                    stream.send(session_request::Message::Models(models))?;
                }
                changed = self.capacity.changed() => {
                    changed.context("the agent ends")?;
                    let capacity = self.capacity.borrow_and_update().clone();
                    stream.send(session_request::Message::Capacity(capacity))?;
                }
                answer = self.answers.recv() => {
                    let answer = answer.context("the agent ends")?;
                    stream.send(session_request::Message::CommandAnswer(answer))?;
                }
                _ = checkpoint.tick() => stream.send(self.checkpoint())?,
                () = self.identity.resume_asked() => {
                    tracing::info!("the session is resumed to settle what is not known");
                    return Ok(());
                }
                () = stop.cancelled() => return Ok(()),
            }
        }
    }

    fn hear(&mut self, stream: &mut Stream, answer: SessionResponse) {
        match answer.message {
            Some(session_response::Message::HeartbeatAck(ack)) => {
                if let Some(sent_ns) = stream.answered(ack.sequence) {
                    let ttl = milliseconds(ack.ttl_ms);
                    self.registry.context().session.extend(&stream.session_id, lives_from(sent_ns), ttl);
                }
            }
            Some(session_response::Message::Offer(offer)) => {
                let queued = self.offers.try_send(Box::new(by_our_clock(offer)));
                tracing::debug!(taken = queued.is_ok(), "an offer has come");
            }
            Some(session_response::Message::Claims(set)) => self.take_claims(stream, set),
            Some(session_response::Message::StatusAck(ack)) => {
                if !ack.accepted {
                    let token = ack.token.unwrap_or_default();
                    tracing::warn!(instance = ack.instance, %token, "a report was refused: its token is not that of the claim");
                }
                stream.reports.acknowledged(&ack);
            }
            Some(session_response::Message::Command(command)) => {
                // What does not fit is not answered: whoever asked learns it by the clock.
                let queued = self.commands.try_send(command);
                tracing::debug!(taken = queued.is_ok(), "a command has come");
            }
            // Before the claims are applied it would show what is about to change; then it comes by itself.
            Some(session_response::Message::Reconcile(_)) => {
                stream.inventory_at = stream.inventory_at.map(|_| Instant::now());
            }
            Some(session_response::Message::Welcome(_)) => tracing::warn!("a second welcome on one stream is ignored"),
            // Of a newer coordinator: what we do not know we were not to rely on.
            None => {}
        }
    }

    fn take_claims(&self, stream: &Stream, mut set: ClaimSet) {
        self.identity.moved(&stream.session_id, set.session_revision);
        if set.store_generation == 0 {
            // An older coordinator does not say.
            set.store_generation = stream.generation;
        }
        let (stream, session) = (stream.number, stream.session_id.clone());
        self.sets.send_replace(Some(SessionSet { stream, session, set }));
    }

    fn report(&self, stream: &mut Stream) {
        let entries = self.registry.context().board.all();
        let now = clock::boottime();
        stream.reports.retain(&entries);
        stream.behind = false;
        for (instance, report) in stream.reports.due(&entries, now) {
            if !stream.has_room_for_reports() || stream.send(session_request::Message::Status(report)).is_err() {
                stream.behind = true;
                return;
            }
            if let Some(entry) = entries.get(&instance) {
                stream.reports.sent(&instance, entry.clone(), now);
                stream.reported = Some(Instant::now());
            }
        }
    }

    /// Says what runs here when that has changed.
    fn tell_runs(&mut self, stream: &mut Stream) -> anyhow::Result<()> {
        let (runs, reconciled) = (self.registry.recorded_runs(), self.is_reconciled(stream));
        if stream.runs.as_ref() != Some(&(runs.clone(), reconciled)) {
            let set = RunSet { runs: runs.clone(), reconciled, ..RunSet::default() };
            stream.send(session_request::Message::Runs(set))?;
            stream.runs = Some((runs, reconciled));
        }
        Ok(())
    }

    /// Whether what runs without a claim was tried to be claimed again since the stream was welcomed.
    fn is_reconciled(&mut self, stream: &Stream) -> bool {
        *self.reconciled.borrow_and_update() >= stream.number
    }

    /// Says all that is here, for the coordinator to compare with what the store says.
    fn tell_inventory(&mut self, stream: &mut Stream) -> anyhow::Result<()> {
        let reconciled = self.is_reconciled(stream);
        stream.runs = Some((self.registry.recorded_runs(), reconciled));
        let set = RunSet {
            runs: self.registry.inventory(),
            reconciled,
            full: true,
            claims_revision: self.applied.borrow().1,
            statuses: stream.reports.acknowledged_of(&self.registry.context().board.all()),
        };
        let spread = 0.9 + 0.2 * world::random_share();
        stream.inventory_at = Some(Instant::now() + INVENTORY_INTERVAL.mul_f64(spread));
        stream.send(session_request::Message::Runs(set))
    }

    fn checkpoint(&self) -> session_request::Message {
        session_request::Message::Checkpoint((self.checkpoint.0)())
    }
}

/// From when a lease lives whose renewal was asked for at `sent_ns`: the store may have granted it right then.
pub(super) fn lives_from(sent_ns: u64) -> u64 {
    if mutant::on(mutant::name::DEADLINE_FROM_RECEIVE_TIME) { boottime_ns() } else { sent_ns }
}

/// Waits until then; for ever when there is no such time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// PURE. How long to wait for the answer to a hello when so much is left of the session.
fn welcome_deadline(left: Duration) -> Duration {
    if left.is_zero() { WELCOME_DEADLINE } else { (left / 2).clamp(WELCOME_DEADLINE_MIN, WELCOME_DEADLINE) }
}

/// PURE. Where a node begins in a list of so many coordinators: the same place each time, another one for other nodes.
fn spread(node: &str, coordinators: usize) -> usize {
    // FNV-1a, 32 bits: http://www.isthe.com/chongo/tech/comp/fnv/
    let hash = node.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash as usize % coordinators.max(1)
}

/// An offer with its deadline on this host's clock: those of coordinators may show another time.
fn by_our_clock(mut offer: Offer) -> Offer {
    if offer.valid_ms > 0 && !mutant::on(mutant::name::OFFERS_BY_TWO_CLOCKS) {
        offer.deadline = Some(clock::after(milliseconds(offer.valid_ms)));
    }
    offer
}

pub(super) fn milliseconds(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

/// What a refusal means, with the way out.
fn explain(status: &tonic::Status) -> anyhow::Error {
    let text = format!("{}: {}", status.code(), status.message());
    match reason_of(status).as_deref() {
        Some(reason::SESSION_EXISTS) => anyhow::anyhow!(
            "the node has a session that this agent does not get; it ends by itself unless its owner returns, and this agent waits ({text})"
        ),
        Some(reason::NODE_BOUND) => anyhow::anyhow!("this node's name belongs to another machine: rename one ({text})"),
        Some(reason::UNAUTHENTICATED) => {
            anyhow::anyhow!("the join secret is not the fleet's: see join_secret_file ({text})")
        }
        _ => anyhow::anyhow!("{text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_waits_no_longer_than_half_of_what_is_left_of_the_session() {
        let deadline = |left_ms: u64| welcome_deadline(Duration::from_millis(left_ms)).as_millis();
        assert_eq!([0, 100, 4_000, 60_000].map(deadline), [5_000, 1_000, 2_000, 5_000]);
    }

    #[test]
    fn the_nodes_of_a_fleet_begin_with_different_coordinators() {
        let mut begin = [0; 3];
        (0..300).for_each(|n| begin[spread(&format!("host-{n}"), 3)] += 1);
        assert!(begin.iter().all(|nodes| (60..=140).contains(nodes)), "{begin:?}");
        assert_eq!(spread("host-1", 1), 0);
    }
}
