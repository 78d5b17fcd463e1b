//! The session's stream, on a thread of its own: opened ([`open`]: hello and welcome), kept ([`talk`]: heartbeats where they have
//! none of their own, offers, sets of claims, reports), ended in order, and opened again elsewhere when it breaks.
//!
//! Nothing here waits for disks, processes or other calls: what must be done is handed on.

mod open;
mod talk;

use super::{
    heartbeats::{Beats, Heartbeats, Wanted},
    identity::Identity,
    remote::Coordinators,
    stream::Stream,
};
use crate::{
    clock::boottime_ns,
    instance::{
        machine::Held,
        registry::{Registry, SessionSet},
    },
    mutant,
};
use drover_proto::{
    v1::{
        Capacity, CommandAnswer, Leave, ModelInventory, NodeCommand, NodeEvent, Offer, SpanCheckpoint, session_request,
    },
    world,
};
use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// How long the coordinator may take to end a stream that this agent has ended.
const FAREWELL: Duration = Duration::from_secs(1);
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);

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

    fn checkpoint(&self) -> session_request::Message {
        session_request::Message::Checkpoint((self.checkpoint.0)())
    }
}

/// From when a lease lives whose renewal was asked for at `sent_ns`: the store may have granted it right then.
pub(super) fn lives_from(sent_ns: u64) -> u64 {
    if mutant::on(mutant::name::DEADLINE_FROM_RECEIVE_TIME) { boottime_ns() } else { sent_ns }
}

/// PURE. Where a node begins in a list of so many coordinators: the same place each time, another one for other nodes.
fn spread(node: &str, coordinators: usize) -> usize {
    // FNV-1a, 32 bits: http://www.isthe.com/chongo/tech/comp/fnv/
    let hash = node.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash as usize % coordinators.max(1)
}

pub(super) fn milliseconds(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_of_a_fleet_begin_with_different_coordinators() {
        let mut begin = [0; 3];
        (0..300).for_each(|n| begin[spread(&format!("host-{n}"), 3)] += 1);
        assert!(begin.iter().all(|nodes| (60..=140).contains(nodes)), "{begin:?}");
        assert_eq!(spread("host-1", 1), 0);
    }
}
