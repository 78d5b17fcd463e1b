//! The stream of a session: reads what the agent says, tells it what it owns and may claim.

use super::{
    Cache, Settings, absence,
    node_record::{self, Told},
    open::{self, Opened},
    outbox::Outbox,
};
use crate::{
    audit::Audit,
    control::{clock, commands, events::Events, status::Statuses, view::View},
    plan::snapshot::Snapshot,
    store::{self, Store},
};
use drover_proto::{
    ids,
    status::{reason, with_reason},
    v1::{
        CommandAnswer, Heartbeat, HeartbeatAck, Hello, NodeEvent, SessionRequest, SessionResponse, Severity, StatusAck,
        StatusReport, Welcome, session_request, session_response::Message,
    },
};
use std::{collections::BTreeMap, time::Duration};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

/// Longest wait for an agent's first message.
const HELLO: Duration = Duration::from_secs(5);
/// Longest wait for the view to see a session that was just written.
const CATCH_UP: Duration = Duration::from_secs(5);
/// Messages on their way to an agent; a slow agent slows only its own stream.
const OUTBOUND: usize = 64;
/// Reports that wait to be recorded.
const REPORTS: usize = 1024;
/// Answers to commands that wait to be written; what does not fit is left out, and its caller waits in vain.
const ANSWERS: usize = 16;

/// Events about an instance that are no history of the node: many nodes may decline one offer, again and again, and an agent
/// that begins takes back all that it has at once.
const NOT_OF_THE_NODE: [&str; 2] = ["OfferDeclined", "Adopted"];

type Answers = mpsc::Sender<Result<SessionResponse, Status>>;

/// Serves sessions.
#[derive(Debug, Clone)]
pub struct Sessions {
    /// The store; it renews leases over a connection of their own.
    pub store: Store,
    /// The view.
    pub view: View,
    /// Events.
    pub events: Events,
    /// What owners report.
    pub statuses: Statuses,
    /// Checkpoints of span sources.
    pub audit: Audit,
    /// What each node has part in.
    pub shares: Cache,
    /// Settings.
    pub settings: Settings,
    /// Ends all streams: this coordinator goes away, agents move to another.
    pub stop: CancellationToken,
}

impl Sessions {
    /// Opens or resumes the session of `node` and serves it until the stream ends.
    #[allow(clippy::result_large_err)] // tonic's own type
    pub async fn serve(
        &self,
        node: String,
        mut inbound: Streaming<SessionRequest>,
    ) -> Result<ReceiverStream<Result<SessionResponse, Status>>, Status> {
        let first = tokio::time::timeout(HELLO, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no Hello came within 5 s"))??;
        let Some(SessionRequest { message: Some(session_request::Message::Hello(hello)) }) = first else {
            return Err(Status::invalid_argument("the first message of a session must be Hello"));
        };
        let protocol = open::protocol(&hello).map_err(status_of)?;
        let opened = open::open(&self.store, &self.view, &self.settings, &node, &hello).await.map_err(status_of)?;
        let (answers, stream) = mpsc::channel(OUTBOUND);
        let mut outbox = Outbox::new(hello.runs.clone());
        let welcome = self.welcome(&node, protocol, &opened, &mut outbox).await?;
        // The channel is empty and its receiver is in hand.
        let _ = answers.try_send(Ok(welcome));
        self.tell_joined(&node, &hello, &opened);
        let session = self.clone();
        tokio::spawn(async move { session.run(node, opened, inbound, outbox, answers).await });
        Ok(ReceiverStream::new(stream))
    }

    #[allow(clippy::result_large_err)] // tonic's own type
    async fn welcome(
        &self,
        node: &str,
        protocol: u32,
        opened: &Opened,
        outbox: &mut Outbox,
    ) -> Result<SessionResponse, Status> {
        // The view at the bump's revision or later shows every claim that this session can still have.
        let snapshot = self
            .view
            .at_least(opened.revision, CATCH_UP)
            .await
            .map_err(|e| with_reason(Code::Unavailable, reason::STORE_UNAVAILABLE, e.to_string()))?;
        let cluster_id = self.store.cluster_id().await.map_err(store_status)?;
        Ok(SessionResponse {
            message: Some(Message::Welcome(Welcome {
                protocol,
                session_id: opened.session_id.clone(),
                session_revision: opened.revision,
                ttl_ms: ms(self.settings.ttl),
                heartbeat_interval_ms: ms(self.settings.heartbeat_interval),
                store_generation: snapshot.generation(),
                cluster_id,
                claims: Some(outbox.claim_set(&snapshot, &self.shares.of(&snapshot), node)),
                resumed: opened.resumed,
                coordinator: self.settings.coordinator.clone(),
            })),
        })
    }

    fn tell_joined(&self, node: &str, hello: &Hello, opened: &Opened) {
        let (reason, how) =
            if opened.resumed { ("Resumed", "resumed its session") } else { ("Joined", "opened a session") };
        let message = format!("agent {} {how}, {} runs on record", hello.agent_version, hello.runs.len());
        self.events.record(format!("node/{node}"), reason, Severity::Info, message);
    }

    async fn run(
        self,
        node: String,
        opened: Opened,
        mut inbound: Streaming<SessionRequest>,
        mut outbox: Outbox,
        answers: Answers,
    ) {
        let (beats, heartbeats) = mpsc::channel(4);
        let (reports, reported) = mpsc::channel(REPORTS);
        let renew = renew(self.store.clone(), opened.lease, heartbeats, answers.clone());
        let record = record_reports(self.statuses.clone(), node.clone(), reported, answers.clone());
        let (tell, told) = watch::channel(Told::default());
        let node_record = node_record::keep(self.store.clone(), node.clone(), opened.joined_at, told);
        let (answer, answered) = mpsc::channel(ANSWERS);
        let answer_commands = commands::write_answers(self.store.clone(), self.view.clone(), node.clone(), answered);
        let inward = Inward { beats, reports, tell, answer };
        let mut snapshots = self.view.subscribe();
        let talk = async {
            loop {
                let (due, again_ms) = {
                    let snapshot = snapshots.borrow_and_update().clone();
                    if let Err(gone) = still_ours(&snapshot, &node, &opened, &self.settings.coordinator) {
                        let _ = answers.send(Err(gone)).await;
                        return None;
                    }
                    outbox.due(&snapshot, &self.shares.of(&snapshot), &node, clock::now_ms())
                };
                for message in due {
                    if answers.send(Ok(message)).await.is_err() {
                        return None;
                    }
                }
                tokio::select! {
                    () = until(again_ms) => {}
                    changed = snapshots.changed() => if changed.is_err() { return None },
                    message = inbound.message() => match message {
                        Ok(Some(SessionRequest { message: Some(session_request::Message::Runs(set)) })) => {
                            outbox.set_runs(set.runs);
                            let unclaimed = outbox.unclaimed(&self.view.snapshot(), &node);
                            inward.tell.send_modify(|told| told.unclaimed = Some(unclaimed));
                        }
                        Ok(Some(SessionRequest { message: Some(session_request::Message::Leave(leave)) })) => {
                            return Some(leave);
                        }
                        Ok(Some(message)) => self.take(&node, message, &inward).await,
                        Ok(None) | Err(_) => return None,
                    },
                }
            }
        };
        let leave = tokio::select! {
            () = async { tokio::join!(renew, record, node_record, answer_commands); } => None,
            leave = talk => leave,
            () = self.stop.cancelled() => {
                let away = with_reason(Code::Unavailable, reason::STORE_UNAVAILABLE, "this coordinator is shutting down");
                let _ = answers.try_send(Err(away));
                None
            }
        };
        let left = match leave {
            Some(leave) => {
                let ours = absence::leaving(&self.store, &node, &opened.session_id, &self.settings.coordinator).await;
                ours.map(|revision| (leave.return_within_ms, revision))
            }
            None => None,
        };
        // The agent waits for this end.
        drop(answers);
        if let Some((within_ms, revision)) = left {
            let within = Duration::from_millis(u64::try_from(within_ms).unwrap_or(0));
            let lease = (opened.lease, revision);
            let keep = absence::keep(&self.store, &self.view, &self.events, &node, lease, within);
            let _ = self.stop.run_until_cancelled(keep).await;
        }
        tracing::debug!(node, "a session's stream has ended; its lease goes on until it runs out or is resumed");
    }

    async fn take(&self, node: &str, message: SessionRequest, inward: &Inward) {
        match message.message {
            // A heartbeat that finds the queue full is answered by those before it.
            Some(session_request::Message::Heartbeat(beat)) => drop(inward.beats.try_send(beat)),
            Some(session_request::Message::Status(report)) => {
                let _ = inward.reports.send(report).await;
            }
            Some(session_request::Message::Event(event)) => self.node_event(node, event),
            Some(session_request::Message::Checkpoint(checkpoint)) => self.audit.checkpoint(node, checkpoint),
            Some(session_request::Message::Models(models)) => {
                inward.tell.send_modify(|told| told.models = Some(models));
            }
            Some(session_request::Message::Capacity(capacity)) => {
                inward.tell.send_modify(|told| told.capacity = Some(capacity));
            }
            Some(session_request::Message::CommandAnswer(answer)) => {
                if inward.answer.try_send(answer).is_err() {
                    tracing::warn!(node, "too many answers to commands at once: one is left out");
                }
            }
            Some(
                session_request::Message::Hello(_)
                | session_request::Message::Runs(_)
                | session_request::Message::Leave(_),
            )
            | None => {
                tracing::warn!(node, "a message of the session is of no known kind, or a second Hello");
            }
        }
    }

    fn node_event(&self, node: &str, event: NodeEvent) {
        let about_instance = ids::check_instance_id(&event.instance).is_ok();
        let reason: String = event.reason.chars().filter(char::is_ascii_alphanumeric).take(48).collect();
        let severity = event.severity();
        let message: String = event.message.chars().take(2000).collect();
        if about_instance && !NOT_OF_THE_NODE.contains(&reason.as_str()) {
            return self.events.record_by_node(node, &event.instance, &reason, severity, message);
        }
        let object = if about_instance { format!("instance/{}", event.instance) } else { format!("node/{node}") };
        self.events.record_from(format!("node/{node}"), object, &reason, severity, message);
    }
}

/// Where what a node says goes on to.
struct Inward {
    beats: mpsc::Sender<Heartbeat>,
    reports: mpsc::Sender<StatusReport>,
    tell: watch::Sender<Told>,
    answer: mpsc::Sender<CommandAnswer>,
}

/// Waits until a time of the wall clock; for ever when there is none.
async fn until(at_ms: Option<i64>) {
    match at_ms {
        None => std::future::pending().await,
        Some(at) => {
            let left = u64::try_from(at - clock::now_ms()).unwrap_or(0);
            tokio::time::sleep(Duration::from_millis(left)).await;
        }
    }
}

/// The stream goes on while its session stands and no other coordinator serves it.
#[allow(clippy::result_large_err)] // tonic's own type
fn still_ours(snapshot: &Snapshot, node: &str, opened: &Opened, coordinator: &str) -> Result<(), Status> {
    let moved = |why: String| Err(with_reason(Code::Aborted, reason::SESSION_MOVED, why));
    match snapshot.sessions.get(node) {
        _ if snapshot.revision < opened.revision => Ok(()),
        Some(s) if s.value.session_id == opened.session_id && s.value.coordinator == coordinator => Ok(()),
        Some(s) if s.value.session_id == opened.session_id => {
            moved(format!("{node} has gone on with its session at coordinator {}", s.value.coordinator))
        }
        Some(_) => moved(format!("{node} has opened another session")),
        None => moved(format!("the session of {node} has ended: its lease ran out")),
    }
}

/// Renews the lease for each heartbeat, and acknowledges it after the store's answer.
async fn renew(store: Store, lease: i64, mut heartbeats: mpsc::Receiver<Heartbeat>, answers: Answers) {
    while let Some(beat) = heartbeats.recv().await {
        match store.renew(lease).await {
            Ok(ttl) => {
                let ack = HeartbeatAck { sequence: beat.sequence, ttl_ms: ms(ttl) };
                let _ = answers.send(Ok(SessionResponse { message: Some(Message::HeartbeatAck(ack)) })).await;
            }
            Err(store::Error::LeaseGone) => {
                let gone = with_reason(Code::Aborted, reason::SESSION_MOVED, "the session's lease has run out");
                let _ = answers.send(Err(gone)).await;
                return;
            }
            // Not acknowledged: the agent counts its time from the last one that was.
            Err(error) => tracing::warn!(%error, "a session's lease was not renewed"),
        }
    }
}

/// Records reports: of several for one instance that have queued up, the last one; those of different instances together.
async fn record_reports(
    statuses: Statuses,
    node: String,
    mut reported: mpsc::Receiver<StatusReport>,
    answers: Answers,
) {
    let (mut batch, mut written) = (Vec::new(), 0);
    while reported.recv_many(&mut batch, 64).await > 0 {
        let latest: BTreeMap<String, StatusReport> = batch.drain(..).map(|r| (r.instance.clone(), r)).collect();
        let latest: Vec<StatusReport> = latest.into_values().collect();
        for (report, recorded) in latest.iter().zip(statuses.record_all(&node, &latest, &mut written).await) {
            match recorded {
                Ok(accepted) => {
                    let (instance, state) = (report.instance.clone(), report.state);
                    let ack = StatusAck { instance, token: report.token, accepted, state };
                    let _ = answers.send(Ok(SessionResponse { message: Some(Message::StatusAck(ack)) })).await;
                }
                // Not acknowledged: the agent reports it again.
                Err(error) => tracing::warn!(%error, instance = report.instance, "a report was not recorded"),
            }
        }
    }
}

fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn status_of(error: open::Error) -> Status {
    match error {
        open::Error::Refused { reason: why @ (reason::INVALID_FIELD | reason::PROTOCOL_MISMATCH), message } => {
            with_reason(Code::InvalidArgument, why, message)
        }
        open::Error::Refused { reason, message } => with_reason(Code::FailedPrecondition, reason, message),
        open::Error::Store(store::Error::LeaseGone) => {
            with_reason(Code::FailedPrecondition, reason::SESSION_EXISTS, "the session is just ending: open a new one")
        }
        open::Error::Store(error) => store_status(error),
    }
}

/// A store's error as a status.
#[must_use]
pub(crate) fn store_status(error: store::Error) -> Status {
    use store::Error as E;
    match error {
        E::OutcomeUnknown(_) => with_reason(Code::Unknown, reason::OUTCOME_UNKNOWN, error.to_string()),
        E::NoSpace(_) => with_reason(Code::ResourceExhausted, reason::STORE_UNAVAILABLE, error.to_string()),
        E::Rejected(_) | E::Corrupt { .. } => {
            tracing::error!(%error, "the store");
            with_reason(Code::Internal, reason::STORE_UNAVAILABLE, error.to_string())
        }
        E::Unavailable(_) | E::LeaseGone | E::Compacted(_) => {
            with_reason(Code::Unavailable, reason::STORE_UNAVAILABLE, error.to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::snapshot::Stored;
    use drover_proto::store::v1 as record;
    use std::sync::Arc;

    #[test]
    fn a_stream_ends_with_its_session_and_when_another_coordinator_serves_it() {
        let (session_id, joined_at) = ("s".to_owned(), None);
        let opened = Opened { session_id, lease: 1, revision: 5, resumed: false, joined_at };
        let ours = |revision, session: Option<(&str, &str)>| {
            let mut snapshot = Snapshot { revision, ..Snapshot::default() };
            if let Some((id, coordinator)) = session {
                let (session_id, coordinator) = (id.to_owned(), coordinator.to_owned());
                let value = record::Session { session_id, coordinator, ..record::Session::default() };
                let stored = Stored { value, create_revision: 5, mod_revision: revision };
                snapshot.sessions.insert("a".to_owned(), Arc::new(stored));
            }
            still_ours(&snapshot, "a", &opened, "one").is_ok()
        };
        assert!(ours(4, None), "the view has not seen it yet");
        assert!(ours(9, Some(("s", "one"))));
        assert!(!ours(9, Some(("s", "two"))));
        assert!(!ours(9, Some(("t", "one"))));
        assert!(!ours(9, None));
    }
}
