//! Heartbeats over a connection of their own, from a thread of their own: nothing that the session's stream carries, and
//! nothing that its thread does, delays them.
//!
//! They are for the stream that the session has now, at the coordinator that serves it, and end with it. Where that
//! coordinator knows no such call, or the connection breaks, the stream carries them meanwhile: it is told which
//! ([`Beats`]). Must never: choose a coordinator, or open a session.

use super::{
    remote::Coordinators,
    session::{lives_from, milliseconds},
    stream::{Unanswered, patience},
};
use crate::instance::registry::Registry;
use anyhow::{Context as _, bail};
use drover_proto::v1::HeartbeatsRequest;
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

/// Pause before another connection is tried; the stream carries the heartbeats meanwhile.
const RETRY: Duration = Duration::from_secs(1);
/// Heartbeats that wait to be written.
const OUTGOING: usize = 4;

/// A session's stream that heartbeats are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Its number.
    pub(super) stream: u64,
    pub(super) session_id: String,
    /// Revision that it was welcomed with.
    pub(super) revision: i64,
    /// The coordinator that serves it, as a number of the list.
    pub(super) coordinator: usize,
    pub(super) ttl: Duration,
    pub(super) interval: Duration,
}

/// How the heartbeats of a stream stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Beats {
    /// The stream must carry them.
    Down,
    /// They are answered here.
    Up,
    /// One was not answered in time: what is left of the session is worth more elsewhere.
    Unanswered,
}

/// Sends the heartbeats.
#[derive(Debug)]
pub struct Heartbeats {
    pub(super) registry: Arc<Registry>,
    pub(super) coordinators: Arc<dyn Coordinators>,
    pub(super) wanted: watch::Receiver<Option<Wanted>>,
    /// Number of the stream, and how its heartbeats stand.
    pub(super) told: Arc<watch::Sender<(u64, Beats)>>,
}

impl Heartbeats {
    /// Sends them for whichever stream there is, until it is told to stop.
    pub async fn keep(mut self, stop: CancellationToken) {
        let work = async {
            loop {
                let wanted = self.wanted.borrow_and_update().clone();
                let (registry, coordinators, told) = (&self.registry, &self.coordinators, &self.told);
                let work = async {
                    match wanted {
                        Some(wanted) => serve(registry, coordinators.as_ref(), told, &wanted).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = work => {}
                    changed = self.wanted.changed() => if changed.is_err() { return },
                }
            }
        };
        stop.run_until_cancelled(work).await;
    }
}

/// For one stream, for as long as it is wanted: ends never.
async fn serve(
    registry: &Registry,
    coordinators: &dyn Coordinators,
    told: &watch::Sender<(u64, Beats)>,
    wanted: &Wanted,
) {
    loop {
        let Err(error) = beat(registry, coordinators, told, wanted).await;
        let unknown = error.downcast_ref::<Status>().is_some_and(|status| status.code() == Code::Unimplemented);
        tracing::debug!("heartbeats go over the session's stream: {error:#}");
        told.send_replace((wanted.stream, if error.is::<Silence>() { Beats::Unanswered } else { Beats::Down }));
        if unknown {
            // An older coordinator: another stream may be another's.
            return std::future::pending().await;
        }
        sleep(RETRY).await;
    }
}

/// A heartbeat was not answered in time.
#[derive(Debug, thiserror::Error)]
#[error("a heartbeat was not answered in time")]
struct Silence;

/// Over one connection; ends with an error.
async fn beat(
    registry: &Registry,
    coordinators: &dyn Coordinators,
    told: &watch::Sender<(u64, Beats)>,
    wanted: &Wanted,
) -> anyhow::Result<std::convert::Infallible> {
    let patience = patience(wanted.ttl);
    let connected =
        timeout(patience, coordinators.connect(wanted.coordinator)).await.context("no connection in time")?;
    let (at, mut coordinator) = connected?;
    if at != wanted.coordinator {
        bail!("the coordinator of the session takes no further connection");
    }
    let (outgoing, requests) = mpsc::channel(OUTGOING);
    let mut unanswered = Unanswered::default();
    let request = |sequence| HeartbeatsRequest {
        session_id: wanted.session_id.clone(),
        stream_revision: wanted.revision,
        sequence,
    };
    outgoing.send(request(unanswered.send())).await?;
    let mut incoming = timeout(patience, coordinator.heartbeats(requests)).await.context("no answer in time")??;
    let mut tick = interval_at(Instant::now() + wanted.interval, wanted.interval);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let oldest = unanswered.oldest();
        tokio::select! {
            answer = incoming.message() => {
                let answer = answer?.context("the coordinator has ended the stream of heartbeats")?;
                let ack = answer.ack.unwrap_or_default();
                if let Some(sent_ns) = unanswered.answered(ack.sequence) {
                    let ttl = milliseconds(ack.ttl_ms);
                    registry.context().session.extend(&wanted.session_id, lives_from(sent_ns), ttl);
                    told.send_if_modified(|told| {
                        let now = (wanted.stream, Beats::Up);
                        std::mem::replace(told, now) != now
                    });
                }
            }
            _ = tick.tick() => outgoing.try_send(request(unanswered.send())).context("the coordinator does not read")?,
            () = async {
                match oldest {
                    Some(sent) => sleep_until(sent + patience).await,
                    None => std::future::pending().await,
                }
            } => return Err(Silence.into()),
        }
    }
}
