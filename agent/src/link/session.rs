//! The session's stream: hello, heartbeats, offers, sets of claims, reports. On a thread of its own.
//!
//! Nothing here waits for disks, processes or other calls: what must be done is handed on.

use super::{
    claims::Job,
    identity::Identity,
    stream::{OUTGOING, Stream, message},
};
use crate::{
    clock::{self, boottime_ns},
    instance::registry::Registry,
};
use anyhow::{Context as _, bail};
use drover_proto::{
    PROTOCOL_MAX, PROTOCOL_MIN, VERSION,
    status::{reason, reason_of},
    transport::Target,
    v1::{
        Capacity, ClaimSet, CommandAnswer, Hello, Leave, ModelInventory, NodeCommand, NodeEvent, RunSet,
        SessionRequest, SessionResponse, SpanCheckpoint, Welcome, node_service_client::NodeServiceClient,
        session_request, session_response,
    },
};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

const WELCOME_DEADLINE: Duration = Duration::from_secs(5);
/// How long the coordinator may take to end a stream that this agent has ended.
const FAREWELL: Duration = Duration::from_secs(1);
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(10);
/// How often reports are looked through that were not acknowledged.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Pause before the reports that did not fit.
const REPORTS_PAUSE: Duration = Duration::from_millis(20);

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

/// The session, on its own thread.
#[derive(Debug)]
pub struct Session {
    pub(super) registry: Arc<Registry>,
    pub(super) target: Target,
    pub(super) about: About,
    pub(super) identity: Arc<Identity>,
    pub(super) events: mpsc::Receiver<NodeEvent>,
    pub(super) telemetry: drover_telemetry::Handle,
    pub(super) models: watch::Receiver<ModelInventory>,
    pub(super) capacity: watch::Receiver<Capacity>,
    pub(super) commands: mpsc::Sender<NodeCommand>,
    pub(super) answers: mpsc::Receiver<CommandAnswer>,
    pub(super) sets: watch::Sender<Option<(u64, ClaimSet)>>,
    pub(super) jobs: mpsc::Sender<Job>,
}

impl Session {
    /// Keeps a session until it is told to stop.
    pub async fn keep(mut self, stop: CancellationToken) {
        let mut first = 0;
        let mut pause = RETRY_MIN;
        let mut told = String::new();
        while !stop.is_cancelled() {
            let began = Instant::now();
            match self.stream(first, &stop).await {
                Ok(()) => told.clear(),
                Err(error) => {
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
            first = (first + 1) % self.target.len();
            let jitter = pause.mul_f64(0.5 + 0.5 * rand::random::<f64>());
            tokio::select! {
                () = sleep(jitter) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// One stream, from its hello to its end. `Ok` when it ended to be resumed, or because it was told to.
    async fn stream(&mut self, first: usize, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut stream = tokio::select! {
            opened = self.open(first) => opened?,
            () = stop.cancelled() => return Ok(()),
        };
        self.serve(&mut stream, stop).await
    }

    async fn open(&mut self, first: usize) -> anyhow::Result<Stream> {
        let connection = self.target.connect(first).await?;
        let mut client = NodeServiceClient::new(connection)
            .max_decoding_message_size(drover_proto::limits::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(drover_proto::limits::MESSAGE_BYTES_MAX);
        let (outgoing, requests) = mpsc::channel(OUTGOING);
        let sent_ns = boottime_ns();
        outgoing.send(message(session_request::Message::Hello(self.hello()))).await?;
        let open = client.session(ReceiverStream::new(requests));
        let opened = timeout(WELCOME_DEADLINE, open).await.context("the coordinator does not answer")?;
        let mut incoming = opened.map_err(|status| explain(&status))?.into_inner();
        let answer = timeout(WELCOME_DEADLINE, incoming.message()).await.context("no answer to the hello in time")?;
        let answer = answer.map_err(|status| explain(&status))?.context("the coordinator closed the stream")?;
        let Some(session_response::Message::Welcome(welcome)) = answer.message else {
            bail!("the coordinator's first message is no welcome");
        };
        self.welcomed(welcome, outgoing, incoming, sent_ns)
    }

    fn hello(&self) -> Hello {
        let stored = self.identity.stored();
        Hello {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            agent_version: VERSION.to_owned(),
            machine_id: self.about.machine_id.clone(),
            boot_id: self.about.boot_id.clone(),
            resume_session_id: stored.session_id,
            store_generation: stored.store_generation,
            labels: self.about.labels.clone().into_iter().collect::<HashMap<_, _>>(),
            capacity: Some(self.capacity.borrow().clone()),
            proxy_address: self.about.proxy_address.clone(),
            runs: self.registry.recorded_runs(),
            models: Some(self.models.borrow().clone()),
        }
    }

    fn welcomed(
        &mut self,
        welcome: Welcome,
        outgoing: mpsc::Sender<SessionRequest>,
        incoming: Streaming<SessionResponse>,
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
        self.identity.welcome(&welcome, &self.registry.context().events).map_err(anyhow::Error::msg)?;
        self.registry.context().session.extend(sent_ns, ttl);
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
        self.take_claims(session.number, &session.id, welcome.claims.unwrap_or_default());
        Ok(Stream::new(session, ttl, interval, outgoing, incoming))
    }

    async fn serve(&mut self, stream: &mut Stream, stop: &CancellationToken) -> anyhow::Result<()> {
        let outcome = self.talk(stream, stop).await;
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
            tokio::select! {
                answer = stream.incoming.message() => match answer {
                    Ok(Some(answer)) => self.hear(stream, answer),
                    Ok(None) => bail!("the coordinator closed the stream"),
                    Err(status) => return Err(explain(&status)),
                },
                _ = heartbeat.tick() => {
                    if stream.last_answer.elapsed() > stream.ttl.mul_f64(0.6) {
                        bail!("no heartbeat was answered for {} ms", stream.last_answer.elapsed().as_millis());
                    }
                    stream.heartbeat()?;
                }
                changed = board.changed() => {
                    changed.context("the board is gone")?;
                    self.report(stream);
                }
                () = sleep(REPORTS_PAUSE), if stream.behind => self.report(stream),
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
                    self.registry.context().session.extend(sent_ns, milliseconds(ack.ttl_ms));
                }
            }
            Some(session_response::Message::Offer(offer)) => {
                let queued = self.jobs.try_send(Job::Offer(Box::new(offer)));
                tracing::debug!(taken = queued.is_ok(), "an offer has come");
            }
            Some(session_response::Message::Claims(set)) => self.take_claims(stream.number, &stream.session_id, set),
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
            Some(session_response::Message::Welcome(_)) => tracing::warn!("a second welcome on one stream is ignored"),
            // Of a newer coordinator: what we do not know we were not to rely on.
            None => {}
        }
    }

    fn take_claims(&self, number: u64, session_id: &str, set: ClaimSet) {
        self.identity.moved(session_id, set.session_revision);
        self.sets.send_replace(Some((number, set)));
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
            }
        }
    }

    /// Says what runs here when that has changed.
    fn tell_runs(&self, stream: &mut Stream) -> anyhow::Result<()> {
        let runs = self.registry.recorded_runs();
        if stream.runs.as_ref() != Some(&runs) {
            stream.send(session_request::Message::Runs(RunSet { runs: runs.clone() }))?;
            stream.runs = Some(runs);
        }
        Ok(())
    }

    fn checkpoint(&self) -> session_request::Message {
        let checkpoint = self.telemetry.checkpoint();
        session_request::Message::Checkpoint(SpanCheckpoint {
            epoch: checkpoint.epoch,
            highest_sequence: checkpoint.highest_sequence,
            acknowledged_through: checkpoint.acknowledged_through,
            given_up: checkpoint.given_up,
            sampled_out: checkpoint.sampled_out,
            program: "drover-agent".to_owned(),
        })
    }
}

fn milliseconds(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

/// What a refusal means, with the way out.
fn explain(status: &tonic::Status) -> anyhow::Error {
    let text = format!("{}: {}", status.code(), status.message());
    match reason_of(status).as_deref() {
        Some(reason::SESSION_EXISTS) => anyhow::anyhow!(
            "the node has a session that this agent does not know; it runs out by itself, and this agent waits for that ({text})"
        ),
        Some(reason::NODE_BOUND) => anyhow::anyhow!("this node's name belongs to another machine: rename one ({text})"),
        Some(reason::UNAUTHENTICATED) => {
            anyhow::anyhow!("the join secret is not the fleet's: see join_secret_file ({text})")
        }
        _ => anyhow::anyhow!("{text}"),
    }
}
