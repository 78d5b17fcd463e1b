//! What is said and heard on an open stream, until it ends.

use super::{
    super::{heartbeats::Beats, stream::Stream},
    Session, lives_from, milliseconds,
    open::explain,
};
use crate::{clock, instance::registry::SessionSet, mutant};
use anyhow::{Context as _, bail};
use drover_proto::{
    v1::{ClaimSet, Offer, RunSet, SessionResponse, session_request, session_response},
    world,
};
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

/// Why a stream is left that serves no heartbeat.
const UNANSWERED: &str = "a heartbeat was not answered in time: the next coordinator is asked";
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(10);
/// How often reports are looked through that were not acknowledged.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Shortest time between two rounds of reports.
const REPORTS_PAUSE: Duration = Duration::from_millis(40);
/// How often all that is here is told, to be compared with what the store says; more or less, so that nodes spread out.
const INVENTORY_INTERVAL: Duration = Duration::from_secs(30);

impl Session {
    pub(super) async fn talk(&mut self, stream: &mut Stream, stop: &CancellationToken) -> anyhow::Result<()> {
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

    pub(super) fn take_claims(&self, stream: &Stream, mut set: ClaimSet) {
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
}

/// Waits until then; for ever when there is no such time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// An offer with its deadline on this host's clock: those of coordinators may show another time.
fn by_our_clock(mut offer: Offer) -> Offer {
    if offer.valid_ms > 0 && !mutant::on(mutant::name::OFFERS_BY_TWO_CLOCKS) {
        offer.deadline = Some(clock::after(milliseconds(offer.valid_ms)));
    }
    offer
}
