//! Heartbeats: what each renews, and the streams that carry nothing else.
//!
//! A heartbeat causes one renewal, and is acknowledged after the store's answer. It comes over the session's own stream, or
//! over one for heartbeats alone ([`Sessions::heartbeats`]): that is served on the runtime of the connections, where no other
//! work of this coordinator holds it up, and ends with the session's stream ([`Streams`]). Must never: renew anything of its
//! own accord.

use super::{
    Opened, Sessions,
    status::{away, ms},
};
use crate::{
    control::mutant,
    store::{self, Store},
};
use drover_proto::{
    status::{reason, with_reason},
    v1::{HeartbeatAck, HeartbeatsRequest, HeartbeatsResponse},
    world,
};
use futures::{Stream, TryStreamExt as _};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

/// Longest wait for the first heartbeat of a stream.
const FIRST: Duration = Duration::from_secs(5);
/// Share of a session's time to live after which a coordinator that can't renew it hands it over: longer than etcd takes to
/// elect a leader, and soon enough for the agent to be elsewhere before its time is over.
pub(super) const HAND_OVER: f64 = 0.35;
/// Share of a session's time to live that one renewal may take.
const RENEWAL: f64 = 0.2;
/// Heartbeats that wait for their renewal: one that finds no room is answered by those before it.
pub(super) const WAITING: usize = 4;

/// What agents say over a stream of heartbeats.
pub trait Beats: Stream<Item = Result<HeartbeatsRequest, Status>> + Send + Unpin + 'static {}
impl<S: Stream<Item = Result<HeartbeatsRequest, Status>> + Send + Unpin + 'static> Beats for S {}

/// The sessions' streams that this coordinator serves, by node: what heartbeats may renew.
#[derive(Debug, Clone, Default)]
pub struct Streams(Arc<Mutex<HashMap<String, Served>>>);

#[derive(Debug, Clone)]
struct Served {
    session_id: String,
    /// Revision that the stream was welcomed with: no two streams have the same.
    revision: i64,
    lease: i64,
    ended: CancellationToken,
}

/// A session's stream, for as long as it is served.
#[derive(Debug)]
pub(super) struct Serving {
    streams: Streams,
    node: String,
    revision: i64,
}

impl Streams {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Served>> {
        // Nothing panics while it holds the lock; should it ever, the map is still whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream is welcomed: heartbeats for the node's stream before it end.
    pub(super) fn begin(&self, node: &str, opened: &Opened) -> Serving {
        let served = Served {
            session_id: opened.session_id.clone(),
            revision: opened.revision,
            lease: opened.lease,
            ended: CancellationToken::new(),
        };
        if let Some(before) = self.lock().insert(node.to_owned(), served) {
            before.ended.cancel();
        }
        Serving { streams: self.clone(), node: node.to_owned(), revision: opened.revision }
    }

    /// The stream that heartbeats are for; `None` where it has ended, or is another coordinator's.
    fn find(&self, node: &str, beat: &HeartbeatsRequest) -> Option<Served> {
        let served = self.lock().get(node).cloned()?;
        (served.session_id == beat.session_id && served.revision == beat.stream_revision).then_some(served)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let mut streams = self.streams.lock();
        if streams.get(&self.node).is_some_and(|served| served.revision == self.revision)
            && let Some(served) = streams.remove(&self.node)
        {
            served.ended.cancel();
        }
    }
}

impl Sessions {
    /// Serves heartbeats of `node` until they end, or the session's stream does.
    #[allow(clippy::result_large_err)] // tonic's own type
    pub async fn heartbeats(
        &self,
        node: &str,
        mut inbound: impl Beats,
    ) -> Result<ReceiverStream<Result<HeartbeatsResponse, Status>>, Status> {
        let first = timeout(FIRST, inbound.try_next())
            .await
            .map_err(|_| Status::deadline_exceeded("no heartbeat came within 5 s"))??;
        let first = first.ok_or_else(|| Status::invalid_argument("the stream has no heartbeat"))?;
        let served = self.streams.find(node, &first).ok_or_else(not_here)?;
        let (answers, stream) = mpsc::channel(WAITING);
        let (beats, heartbeats) = mpsc::channel(WAITING);
        let _ = beats.try_send(first.sequence);
        let acknowledge = |ack| HeartbeatsResponse { ack: Some(ack) };
        let renew =
            renew(self.store.clone(), served.lease, self.settings.ttl, heartbeats, answers.clone(), acknowledge);
        let stop = self.stop.clone();
        tokio::spawn(world::task(async move {
            let read = async {
                while let Ok(Some(beat)) = inbound.try_next().await {
                    let _ = beats.try_send(beat.sequence);
                }
            };
            tokio::select! {
                () = renew => {}
                () = read => {}
                () = served.ended.cancelled() => drop(answers.try_send(Err(not_here()))),
                () = stop.cancelled() => drop(answers.try_send(Err(away("this coordinator is shutting down")))),
            }
        }));
        Ok(ReceiverStream::new(stream))
    }
}

fn not_here() -> Status {
    with_reason(Code::Aborted, reason::SESSION_MOVED, "this coordinator does not serve that stream of the session")
}

/// Renews the lease for each heartbeat, and acknowledges it after the store's answer.
pub(super) async fn renew<A: Send>(
    store: Store,
    lease: i64,
    ttl: Duration,
    mut heartbeats: mpsc::Receiver<u64>,
    answers: mpsc::Sender<Result<A, Status>>,
    acknowledge: impl Fn(HeartbeatAck) -> A + Send,
) {
    if mutant::on(mutant::name::RENEWAL_WITHOUT_HEARTBEAT) {
        let store = store.clone();
        tokio::spawn(world::task(async move {
            while store.renew(lease).await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }));
    }
    // The first of those in a row that were not answered.
    let mut failing: Option<Instant> = None;
    while let Some(sequence) = heartbeats.recv().await {
        let asked = Instant::now();
        let renewed = timeout(ttl.mul_f64(RENEWAL), store.renew(lease)).await;
        let silent = |_| Err(store::Error::Unavailable("no answer in time".to_owned()));
        match renewed.unwrap_or_else(silent) {
            Ok(ttl) => {
                failing = None;
                let ack = acknowledge(HeartbeatAck { sequence, ttl_ms: ms(ttl) });
                let _ = answers.send(Ok(ack)).await;
            }
            Err(store::Error::LeaseGone) => {
                let gone = with_reason(Code::Aborted, reason::SESSION_MOVED, "the session's lease has run out");
                let _ = answers.send(Err(gone)).await;
                return;
            }
            // Not acknowledged: the agent counts its time from the last one that was.
            Err(error) => {
                tracing::warn!(%error, "a session's lease was not renewed");
                let since = *failing.get_or_insert(asked);
                if since.elapsed() >= ttl.mul_f64(HAND_OVER) && !mutant::on(mutant::name::NO_HAND_OVER) {
                    let _ = answers
                        .send(Err(away("the session can't be renewed here: go on at another coordinator")))
                        .await;
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::Memory;

    fn beat(revision: i64) -> HeartbeatsRequest {
        HeartbeatsRequest { session_id: "s".to_owned(), stream_revision: revision, sequence: 1 }
    }

    #[test]
    fn heartbeats_are_for_the_stream_that_is_served_and_end_with_it() {
        let streams = Streams::default();
        let opened = |revision| Opened { revision, ..Opened::example("s", "first") };
        assert!(streams.find("a", &beat(7)).is_none(), "another coordinator serves it");
        let first = streams.begin("a", &opened(7));
        let found = streams.find("a", &beat(7)).unwrap();
        let of_another = HeartbeatsRequest { session_id: "t".to_owned(), ..beat(7) };
        assert!(streams.find("a", &of_another).is_none() && streams.find("b", &beat(7)).is_none());
        assert!(streams.find("a", &beat(6)).is_none());
        let second = streams.begin("a", &opened(9));
        assert!(found.ended.is_cancelled() && streams.find("a", &beat(7)).is_none(), "it has gone on by another");
        drop(first);
        let found = streams.find("a", &beat(9)).unwrap();
        assert!(!found.ended.is_cancelled(), "the end of the older one is none of its");
        drop(second);
        assert!(found.ended.is_cancelled() && streams.find("a", &beat(9)).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn each_is_answered_after_the_store_and_one_of_a_lost_lease_is_told_so() {
        let store: Store = Arc::new(Memory::start(1));
        let lease = store.grant(Duration::from_secs(10)).await.unwrap();
        let (beats, heartbeats) = mpsc::channel(WAITING);
        let (answers, mut answered) = mpsc::channel(WAITING);
        tokio::spawn(renew(store.clone(), lease, Duration::from_secs(10), heartbeats, answers, |ack| ack));
        beats.send(5).await.unwrap();
        assert_eq!(answered.recv().await.unwrap().unwrap(), HeartbeatAck { sequence: 5, ttl_ms: 10_000 });
        store.revoke(lease).await.unwrap();
        beats.send(6).await.unwrap();
        assert_eq!(answered.recv().await.unwrap().unwrap_err().code(), Code::Aborted);
        assert!(answered.recv().await.is_none(), "there is nothing more to renew");
    }
}
