//! For how long each claim has stood as it is, as the leader has seen it.

use crate::plan::{Held, snapshot::Snapshot};
use drover_proto::v1::InstanceState;
use prost_types::Timestamp;
use std::collections::BTreeMap;
use tokio::time::Instant;

/// What shows progress when it changes. The node's own times are only compared with each other.
#[derive(Debug, Clone, PartialEq)]
struct Mark {
    wanted: bool,
    state: InstanceState,
    pid: i64,
    restarts: i32,
    progressed_at: Option<Timestamp>,
    /// Of the agent, which has its time anew when it was started again.
    agent_id: String,
}

#[derive(Debug)]
struct Since {
    /// Revision of the claim.
    claim: i64,
    mark: Mark,
    /// When that changed last.
    moved: Instant,
    /// When it failed first without having been ready since.
    failing: Option<Instant>,
    ready: Option<Instant>,
}

/// The standing claims, by instance.
#[derive(Debug, Default)]
pub(super) struct Claims(BTreeMap<String, Since>);

impl Claims {
    /// Looks at a snapshot. What was not seen counts for nobody: `live_since` is when the view was last mended, `None` while it is
    /// broken.
    pub(super) fn note(
        &mut self,
        snapshot: &Snapshot,
        live_since: Option<Instant>,
        now: Instant,
    ) -> BTreeMap<String, Held> {
        let standing = |id: &str| snapshot.claims.get(id).map(|claim| claim.mod_revision);
        self.0.retain(|id, since| standing(id) == Some(since.claim));
        for (id, claim) in &snapshot.claims {
            let node = claim.value.node.as_str();
            let mark = mark(snapshot, id, node);
            let begun =
                || Since { claim: claim.mod_revision, mark: mark.clone(), moved: now, failing: None, ready: None };
            let since = self.0.entry(id.clone()).or_insert_with(begun);
            let ended = mark.restarts > since.mark.restarts;
            // A planned absence has a bound of its own.
            let absent = snapshot.sessions.get(node).is_some_and(|session| session.value.absent_until.is_some());
            if absent || since.mark != mark {
                since.moved = now;
            }
            match mark.state {
                InstanceState::Ready => {
                    since.failing = None;
                    since.ready.get_or_insert(now);
                }
                // It has served, and may again.
                InstanceState::Suspect => {}
                state => {
                    since.ready = None;
                    if ended || matches!(state, InstanceState::Backoff | InstanceState::Failed) {
                        since.failing.get_or_insert(now);
                    }
                }
            }
            since.mark = mark;
        }
        let ms = |since: Instant| {
            let since = live_since.map_or(now, |live| live.max(since));
            i64::try_from(now.saturating_duration_since(since).as_millis()).unwrap_or(i64::MAX)
        };
        let held = |since: &Since| Held {
            idle_ms: ms(since.moved),
            failing_ms: since.failing.map(ms),
            ready_ms: since.ready.map(ms),
        };
        self.0.iter().map(|(id, since)| (id.clone(), held(since))).collect()
    }
}

fn mark(snapshot: &Snapshot, id: &str, node: &str) -> Mark {
    let token = snapshot.token(id);
    let status = snapshot.statuses.get(id).map(|status| &status.value).filter(|status| status.token == token);
    Mark {
        wanted: snapshot.instances.get(id).is_some_and(|instance| instance.value.wanted),
        state: snapshot.state(id),
        pid: status.map_or(0, |status| status.pid),
        restarts: status.map_or(0, |status| status.restarts),
        progressed_at: status.and_then(|status| status.progressed_at),
        agent_id: snapshot.sessions.get(node).map(|session| session.value.agent_id.clone()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::snapshot::Stored;
    use InstanceState::{Backoff, Failed, Loading, Ready, Starting, Suspect};
    use drover_proto::{store::v1 as record, v1::Token};
    use std::{sync::Arc, time::Duration};

    const ID: &str = "m-222222";

    fn stored<T>(value: T, mod_revision: i64) -> Arc<Stored<T>> {
        Arc::new(Stored { value, create_revision: mod_revision, mod_revision })
    }

    fn claimed(revision: i64) -> Snapshot {
        let mut snapshot = Snapshot::default();
        let claim = record::Claim { node: "a".to_owned(), ..record::Claim::default() };
        snapshot.claims.insert(ID.to_owned(), stored(claim, revision));
        snapshot.sessions.insert("a".to_owned(), stored(record::Session::default(), 1));
        snapshot
    }

    fn reported(state: InstanceState, progressed_s: i64) -> Snapshot {
        let mut snapshot = claimed(5);
        let progressed_at = Some(Timestamp { seconds: progressed_s, nanos: 0 });
        let token = Some(Token { generation: 0, revision: 5 });
        let status = record::Status { token, state: state.into(), progressed_at, ..record::Status::default() };
        snapshot.statuses.insert(ID.to_owned(), stored(status, 6));
        snapshot
    }

    struct Leader {
        claims: Claims,
        live: Option<Instant>,
    }

    impl Leader {
        fn new() -> Self {
            Self { claims: Claims::default(), live: Some(Instant::now()) }
        }

        /// Looks, a second after the last time.
        async fn sees(&mut self, snapshot: &Snapshot) -> Held {
            tokio::time::advance(Duration::from_secs(1)).await;
            self.claims.note(snapshot, self.live, Instant::now())[ID]
        }
    }

    #[tokio::test(start_paused = true)]
    async fn every_change_that_shows_progress_begins_the_time_anew() {
        let mut leader = Leader::new();
        assert_eq!(leader.sees(&claimed(5)).await.idle_ms, 0);
        assert_eq!(leader.sees(&claimed(5)).await.idle_ms, 1000);
        assert_eq!(leader.sees(&reported(Starting, 1)).await.idle_ms, 0, "another state");
        assert_eq!(leader.sees(&reported(Loading, 1)).await.idle_ms, 0);
        assert_eq!(leader.sees(&reported(Loading, 1)).await.idle_ms, 1000);
        assert_eq!(leader.sees(&reported(Loading, 2)).await.idle_ms, 0, "the model loads");
        assert_eq!(leader.sees(&reported(Loading, 1)).await.idle_ms, 0, "a clock that was put back counts as well");
        assert_eq!(leader.sees(&reported(Loading, 1)).await.idle_ms, 1000);
        let mut again = reported(Loading, 1);
        let session = record::Session { agent_id: "another".to_owned(), ..record::Session::default() };
        again.sessions.insert("a".to_owned(), stored(session, 2));
        assert_eq!(leader.sees(&again).await.idle_ms, 0, "its agent was started again");
        assert_eq!(leader.sees(&claimed(9)).await.idle_ms, 0, "another claim");
    }

    #[tokio::test(start_paused = true)]
    async fn a_status_under_an_earlier_claim_says_nothing() {
        let mut leader = Leader::new();
        leader.sees(&claimed(9)).await;
        let mut stale = claimed(9);
        stale.statuses = reported(Failed, 1).statuses;
        let held = leader.sees(&stale).await;
        assert_eq!((held.idle_ms, held.failing_ms), (1000, None));
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_is_counted_from_its_first_failure_until_it_is_ready() {
        let mut leader = Leader::new();
        assert_eq!(leader.sees(&reported(Loading, 1)).await.failing_ms, None);
        assert_eq!(leader.sees(&reported(Backoff, 2)).await.failing_ms, Some(0));
        assert_eq!(leader.sees(&reported(Loading, 3)).await.failing_ms, Some(1000), "the next attempt");
        assert_eq!(leader.sees(&reported(Failed, 4)).await.failing_ms, Some(2000));
        assert_eq!(leader.sees(&reported(Ready, 5)).await, Held { idle_ms: 0, failing_ms: None, ready_ms: Some(0) });
        assert_eq!(leader.sees(&reported(Suspect, 6)).await.ready_ms, Some(1000));
        let held = leader.sees(&reported(Loading, 7)).await;
        assert_eq!((held.failing_ms, held.ready_ms), (None, None));
        // An end between two looks shows by the count of starts.
        let mut ended = reported(Loading, 8);
        let mut status = ended.statuses[ID].as_ref().clone();
        status.value.restarts = 1;
        ended.statuses.insert(ID.to_owned(), Arc::new(status));
        assert_eq!(leader.sees(&ended).await.failing_ms, Some(0));
    }

    #[tokio::test(start_paused = true)]
    async fn what_could_not_be_seen_is_not_counted() {
        let mut leader = Leader::new();
        leader.sees(&reported(Failed, 1)).await;
        leader.live = None;
        let held = leader.sees(&reported(Failed, 1)).await;
        assert_eq!((held.idle_ms, held.failing_ms), (0, Some(0)), "the view is broken");
        leader.live = Some(Instant::now());
        let held = leader.sees(&reported(Failed, 1)).await;
        assert_eq!((held.idle_ms, held.failing_ms), (1000, Some(1000)), "it was mended a second ago");
    }

    #[tokio::test(start_paused = true)]
    async fn a_planned_absence_does_not_count() {
        let mut leader = Leader::new();
        let mut absent = reported(Loading, 1);
        let session = record::Session { absent_until: Some(Timestamp::default()), ..record::Session::default() };
        absent.sessions.insert("a".to_owned(), stored(session, 2));
        leader.sees(&absent).await;
        assert_eq!(leader.sees(&absent).await.idle_ms, 0);
    }
}
