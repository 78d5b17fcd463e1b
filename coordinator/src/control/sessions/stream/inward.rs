//! What an agent says on its stream, and where each of it goes on to: nothing here waits for the store.

use super::{
    super::{
        node_record::Told,
        reconcile::{self, Reconcile},
    },
    Answers, Sessions,
};
use crate::control::{mutant, status::Statuses};
use drover_proto::{
    ids,
    v1::{
        CommandAnswer, NodeEvent, RunSet, SessionRequest, SessionResponse, Severity, StatusAck, StatusReport,
        session_request, session_response::Message,
    },
    world,
};
use std::{collections::BTreeMap, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};

/// Pause before a node that had differences is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Events about an instance that are no history of the node: many nodes may decline one offer, again and again, and an agent
/// that begins takes back all that it has at once.
const NOT_OF_THE_NODE: [&str; 2] = ["OfferDeclined", "Adopted"];

/// Where what a node says goes on to.
pub(super) struct Inward {
    pub(super) beats: mpsc::Sender<u64>,
    pub(super) reports: mpsc::Sender<StatusReport>,
    pub(super) tell: watch::Sender<Told>,
    pub(super) answer: mpsc::Sender<CommandAnswer>,
    pub(super) reconcile: Reconcile,
    /// When the node is to be asked for another inventory.
    pub(super) ask_at: Option<Instant>,
}

impl Sessions {
    pub(super) async fn take(&self, node: &str, message: SessionRequest, inward: &Inward) {
        match message.message {
            // A heartbeat that finds the queue full is answered by those before it.
            Some(session_request::Message::Heartbeat(beat)) => drop(inward.beats.try_send(beat.sequence)),
            // What finds the queue full is left out: it is not acknowledged, so the agent says it again. Waiting for room here
            // would leave heartbeats unread for as long as the store takes.
            Some(session_request::Message::Status(report)) => drop(inward.reports.try_send(report)),
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

    /// Compares a node's inventory with the store, tells what differs and removes what is left of runs that are no more.
    pub(super) fn reconcile(&self, node: &str, set: RunSet, inward: &mut Inward) {
        if mutant::on(mutant::name::NO_RECONCILE) {
            return;
        }
        let snapshot = self.view.snapshot();
        // A view that is behind what the node knows would show differences that there are not.
        let news = if snapshot.revision >= set.claims_revision {
            inward.reconcile.take(reconcile::differences(&snapshot, node, &set), Instant::now())
        } else {
            reconcile::News { look_again: true, ..reconcile::News::default() }
        };
        inward.ask_at = news.look_again.then(|| Instant::now() + LOOK_AGAIN);
        for (id, kind, difference) in &news.found {
            let message = format!("{kind:?} at {node}: {difference}");
            self.events.record(format!("instance/{id}"), "Differs", kind.severity(), message);
        }
        for (id, kind, lasted) in &news.over {
            let message = format!("{kind:?} at {node} is over after {:.1} s", lasted.as_secs_f32());
            self.events.record(format!("instance/{id}"), "Agrees", Severity::Info, message);
        }
        if !news.found.is_empty() {
            let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
            news.found.iter().for_each(|(_, kind, _)| *kinds.entry(format!("{kind:?}")).or_default() += 1);
            let kinds = kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect::<Vec<_>>().join(", ");
            let message = format!("what runs there and what the store says differ: {kinds}");
            self.events.record(format!("node/{node}"), "Differs", Severity::Warning, message);
        }
        let left = reconcile::run_records(&snapshot, node, &set);
        if !left.is_empty() {
            let (statuses, node) = (self.statuses.clone(), node.to_owned());
            tokio::spawn(world::task(async move {
                for (id, token) in left {
                    if let Err(error) = statuses.close_own_run(&node, &id, &token).await {
                        return tracing::warn!(%error, node, id, "the record of a run that is no more was not removed");
                    }
                }
            }));
        }
        // What was recorded as it is writes nothing.
        set.statuses.into_iter().for_each(|report| drop(inward.reports.try_send(report)));
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

/// Records reports: of several for one instance that have queued up, the last one; those of different instances together.
pub(super) async fn record_reports(
    statuses: Statuses,
    node: String,
    stream: i64,
    mut reported: mpsc::Receiver<StatusReport>,
    answers: Answers,
) {
    let (mut batch, mut written) = (Vec::new(), 0);
    while reported.recv_many(&mut batch, 64).await > 0 {
        let latest: BTreeMap<String, StatusReport> = batch.drain(..).map(|r| (r.instance.clone(), r)).collect();
        let latest: Vec<StatusReport> = latest.into_values().collect();
        for (report, recorded) in latest.iter().zip(statuses.record_all(&node, stream, &latest, &mut written).await) {
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
