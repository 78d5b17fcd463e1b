//! The stream of a session: reads what the agent says ([`inward`]), tells it what it owns and may claim.

mod inward;

use super::{
    Refusals, Settings, Streams, attach,
    heartbeats::{self, HAND_OVER},
    node_record::{self, Told},
    open::{self, Opened},
    outbox::{self, Outbox},
    reconcile::Reconcile,
    status::{away, ms, status_of, store_status},
};
use crate::{
    audit::Audit,
    control::{clock, commands, events::Events, mutant, reach::Reach, status::Statuses, view::View},
    plan::snapshot::Snapshot,
    store::Store,
};
use drover_proto::{
    limits,
    status::{reason, with_reason},
    v1::{
        Hello, Leave, ReconcileRequest, SessionRequest, SessionResponse, Severity, Welcome, session_request,
        session_response::Message,
    },
    world,
};
use futures::{Stream, TryStreamExt as _};
use inward::{Inward, record_reports};
use std::time::Duration;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

/// Longest wait for an agent's first message.
const HELLO: Duration = Duration::from_secs(5);
/// Longest wait for the view to see a session that was just written.
const CATCH_UP: Duration = Duration::from_secs(5);
/// A store that has been out of reach for less than this may answer in a moment: a Hello then waits for it.
const AWAY: Duration = Duration::from_secs(1);
/// Messages on their way to an agent; a slow agent slows only its own stream.
const OUTBOUND: usize = 64;
/// Reports that wait to be recorded.
const REPORTS: usize = 1024;
/// Answers to commands that wait to be written; what does not fit is left out, and its caller waits in vain.
const ANSWERS: usize = 16;

/// What an agent says on its stream, as it comes.
pub trait Inbound: Stream<Item = Result<SessionRequest, Status>> + Send + Unpin + 'static {}
impl<S: Stream<Item = Result<SessionRequest, Status>> + Send + Unpin + 'static> Inbound for S {}

type Answers = mpsc::Sender<Result<SessionResponse, Status>>;

/// Serves sessions.
#[derive(Debug, Clone)]
pub struct Sessions {
    /// The store; it renews leases over a connection of their own.
    pub store: Store,
    /// The view.
    pub view: View,
    /// Whether the store can be reached.
    pub reach: Reach,
    /// Events.
    pub events: Events,
    /// What owners report.
    pub statuses: Statuses,
    /// Checkpoints of span sources.
    pub audit: Audit,
    /// Agents that were refused of late.
    pub refusals: Refusals,
    /// The streams that are served here.
    pub streams: Streams,
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
        mut inbound: impl Inbound,
    ) -> Result<ReceiverStream<Result<SessionResponse, Status>>, Status> {
        let first = timeout(HELLO, inbound.try_next())
            .await
            .map_err(|_| Status::deadline_exceeded("no Hello came within 5 s"))??;
        let Some(SessionRequest { message: Some(session_request::Message::Hello(hello)) }) = first else {
            return Err(Status::invalid_argument("the first message of a session must be Hello"));
        };
        let protocol = open::protocol(&hello).map_err(status_of)?;
        // At once, so that the agent finds one that can serve it while its session lives.
        if let Some(lost) = self.reach.lost().filter(|lost| lost.elapsed() >= AWAY) {
            return Err(away(&format!("this coordinator can't reach the store ({}): ask another one", lost.why)));
        }
        let opened = open::open(&self.store, &self.view, &self.settings, &node, &hello).await;
        let opened = opened.map_err(|error| {
            self.tell_refused(&node, &error);
            status_of(error)
        })?;
        let (answers, stream) = mpsc::channel(OUTBOUND);
        let mut outbox = Outbox::new(hello.runs.clone());
        let welcome = match self.welcome(&node, protocol, &opened, &mut outbox).await {
            Ok(welcome) => welcome,
            Err(status) => {
                let store = self.store.clone();
                tokio::spawn(world::task(async move { attach::detach(&store, &node, &opened).await }));
                return Err(status);
            }
        };
        // Before the agent may send heartbeats for it.
        let serving = self.streams.begin(&node, &opened);
        // The channel is empty and its receiver is in hand.
        let _ = answers.try_send(Ok(welcome));
        self.tell_joined(&node, &hello, &opened);
        let session = self.clone();
        tokio::spawn(world::task(async move {
            session.run(node, opened, inbound, outbox, answers).await;
            drop(serving);
        }));
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
        let reached = self.view.at_least(opened.revision, CATCH_UP).await;
        reached.map_err(|e| with_reason(Code::Unavailable, reason::STORE_UNAVAILABLE, e.to_string()))?;
        let (snapshot, shares) = self.view.shared().borrow().clone();
        let cluster_id = self.store.cluster_id().await.map_err(store_status)?;
        Ok(SessionResponse {
            message: Some(Message::Welcome(Welcome {
                protocol,
                session_id: opened.session_id.clone(),
                session_revision: opened.revision,
                ttl_ms: ms(opened.ttl),
                // The lease may be one that a coordinator with other settings was granted.
                heartbeat_interval_ms: ms(self.settings.heartbeat_interval.min(opened.ttl / 3)),
                store_generation: snapshot.generation(),
                cluster_id,
                claims: Some(outbox.claim_set(&snapshot, &shares, node, clock::now_ms())),
                resumed: opened.resumed,
                coordinator: self.settings.coordinator.clone(),
                store_id: snapshot.schema.as_ref().map(|s| s.value.id.clone()).unwrap_or_default(),
            })),
        })
    }

    fn tell_refused(&self, node: &str, error: &open::Error) {
        let open::Error::Refused {
            reason: reason::NODE_BOUND | reason::SESSION_EXISTS | reason::STORE_CHANGED,
            message,
        } = error
        else {
            return;
        };
        if self.refusals.is_news(node) {
            let message = format!("an agent asks for its session and is refused: {message}");
            self.events.record(format!("node/{node}"), "NodeRefused", Severity::Warning, message);
        }
    }

    fn tell_joined(&self, node: &str, hello: &Hello, opened: &Opened) {
        let (reason, how) =
            if opened.resumed { ("Resumed", "resumed its session") } else { ("Joined", "opened a session") };
        let message = format!("agent {} {how}, {} runs on record", hello.agent_version, hello.runs.len());
        self.events.record(format!("node/{node}"), reason, Severity::Info, message);
    }

    async fn run(self, node: String, opened: Opened, mut inbound: impl Inbound, mut outbox: Outbox, answers: Answers) {
        let (beats, heartbeats) = mpsc::channel(heartbeats::WAITING);
        let (reports, reported) = mpsc::channel(REPORTS);
        let acknowledge = |ack| SessionResponse { message: Some(Message::HeartbeatAck(ack)) };
        let (store, ttl) = (self.store.clone(), self.settings.ttl);
        let renew = heartbeats::renew(store, opened.lease, ttl, heartbeats, answers.clone(), acknowledge);
        let record = record_reports(self.statuses.clone(), node.clone(), opened.revision, reported, answers.clone());
        let (tell, told) = watch::channel(Told::default());
        let node_record = node_record::keep(self.store.clone(), node.clone(), (opened.joined_at, opened.schema), told);
        let (answer, answered) = mpsc::channel(ANSWERS);
        let answer_commands = commands::write_answers(self.store.clone(), self.view.clone(), node.clone(), answered);
        let mut inward = Inward { beats, reports, tell, answer, reconcile: Reconcile::default(), ask_at: None };
        let mut views = self.view.shared();
        let talk = async {
            loop {
                let (due, again_ms) = {
                    let (snapshot, shares) = views.borrow_and_update().clone();
                    if let Err(gone) = still_ours(&snapshot, &node, &opened, &self.settings.coordinator) {
                        let _ = answers.send(Err(gone)).await;
                        return None;
                    }
                    outbox.due(&snapshot, &shares, &node, clock::now_ms())
                };
                for message in due {
                    if answers.send(Ok(message)).await.is_err() {
                        return None;
                    }
                }
                tokio::select! {
                    () = until(again_ms) => {}
                    () = at(inward.ask_at) => {
                        inward.ask_at = None;
                        let ask = SessionResponse { message: Some(Message::Reconcile(ReconcileRequest {})) };
                        if answers.send(Ok(ask)).await.is_err() {
                            return None;
                        }
                    }
                    changed = views.changed() => if changed.is_err() { return None },
                    message = inbound.try_next() => match message {
                        Ok(Some(SessionRequest { message: Some(session_request::Message::Runs(set)) })) => {
                            let full = set.clone();
                            inward.tell.send_modify(|told| {
                                told.alive = Some(outbox::alive(&set.runs));
                                if set.reconciled {
                                    told.inventory_of = Some(opened.session_id.clone());
                                }
                            });
                            outbox.set_runs(set.runs);
                            if full.full {
                                self.reconcile(&node, full, &mut inward);
                            }
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
            why = self.view.until_refused() => {
                let _ = answers.try_send(Err(with_reason(Code::Unavailable, reason::STORE_CHANGED, why)));
                None
            }
            () = self.stop.cancelled() => {
                let _ = answers.try_send(Err(away("this coordinator is shutting down")));
                None
            }
            () = hand_over(&self.reach, self.settings.ttl) => {
                tracing::warn!(node, "the store is out of reach: the session is handed over to another coordinator");
                let _ = answers.try_send(Err(away("this coordinator can't reach the store: go on at another one")));
                None
            }
        };
        match leave {
            // The agent waits for this end: it must not be back before it is written that it has left.
            Some(leave) => self.left(&node, &opened, leave).await,
            // It goes on elsewhere with what it has.
            None if self.stop.is_cancelled() => {}
            None => {
                drop(answers);
                attach::detach(&self.store, &node, &opened).await;
            }
        }
        tracing::debug!(node, "a session's stream has ended; its lease goes on until it runs out or is resumed");
    }

    async fn left(&self, node: &str, opened: &Opened, leave: Leave) {
        let within = Duration::from_millis(u64::try_from(leave.return_within_ms).unwrap_or(0));
        match attach::leave(&self.store, node, opened, within).await {
            Ok(true) if !within.is_zero() => {
                let shown = within.min(limits::ABSENCE_MAX).as_secs_f32().round();
                let what = format!("its agent means to be back within {shown} s: its session is kept so long");
                self.events.record(format!("node/{node}"), "Left", Severity::Info, what);
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(node, %error, "the session of an agent that leaves is not kept"),
        }
    }
}

/// Waits until then; for ever when there is no such time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
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
        _ if snapshot.generation() != opened.generation => moved("the store was restored meanwhile".to_owned()),
        _ if snapshot.revision < opened.revision => Ok(()),
        // An older coordinator that writes the record leaves the stream's id out.
        Some(s)
            if s.value.session_id == opened.session_id
                && s.value.coordinator == coordinator
                && (s.value.stream.is_empty() || s.value.stream == opened.stream) =>
        {
            Ok(())
        }
        Some(s) if s.value.session_id == opened.session_id => moved(format!(
            "{node} has gone on with its session on another stream, at coordinator {}",
            s.value.coordinator
        )),
        Some(_) => moved(format!("{node} has opened another session")),
        None => moved(format!("the session of {node} has ended: its lease ran out")),
    }
}

/// Waits until the store has been out of reach for so long that sessions are better off elsewhere.
async fn hand_over(reach: &Reach, ttl: Duration) {
    reach.lost_longer_than(ttl.mul_f64(HAND_OVER)).await;
    if mutant::on(mutant::name::NO_HAND_OVER) {
        std::future::pending::<()>().await;
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
        let opened = Opened { revision: 5, ..Opened::example("s", "first") };
        let ours = |revision, session: Option<(&str, &str, &str)>| {
            let mut snapshot = Snapshot { revision, ..Snapshot::default() };
            if let Some((id, coordinator, stream)) = session {
                let [session_id, coordinator, stream] = [id, coordinator, stream].map(str::to_owned);
                let value = record::Session { session_id, coordinator, stream, ..record::Session::default() };
                let stored = Stored { value, create_revision: 5, mod_revision: revision };
                snapshot.sessions.insert("a".to_owned(), Arc::new(stored));
            }
            still_ours(&snapshot, "a", &opened, "one").is_ok()
        };
        assert!(ours(4, None), "the view has not seen it yet");
        assert!(ours(9, Some(("s", "one", "first"))));
        assert!(ours(9, Some(("s", "one", ""))), "an older coordinator has written it");
        assert!(!ours(9, Some(("s", "one", "second"))), "its agent has come back by another stream");
        assert!(!ours(9, Some(("s", "two", "first"))));
        assert!(!ours(9, Some(("t", "one", "first"))));
        assert!(!ours(9, None));
        let restored = record::Schema { generation: 2, ..record::Schema::default() };
        let schema = Some(Arc::new(Stored { value: restored, create_revision: 1, mod_revision: 1 }));
        let restored = Snapshot { revision: 3, schema, ..Snapshot::default() };
        assert!(still_ours(&restored, "a", &opened, "one").is_err(), "whatever its revisions are");
    }
}
