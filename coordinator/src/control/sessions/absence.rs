//! A planned absence: the lease of an agent that has said it will be back is renewed in its stead.
//!
//! Until it is back, its time is over, or this coordinator ends: then the lease runs out as it does for one that was lost.

use crate::{
    control::{events::Events, view::View},
    store::{Error, Store, keys, records},
};
use drover_proto::{limits, store::v1 as record, v1::Severity};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// Pause after a renewal that has failed.
const RETRY: Duration = Duration::from_millis(500);

/// Revision of the record of a session that is about to be left; `None` when it can't be read, or is served by another
/// coordinator. To be asked before the agent hears the end of its stream: it may be back right afterwards, and then the
/// record is that of its return.
pub(super) async fn leaving(store: &Store, node: &str, session_id: &str, coordinator: &str) -> Option<i64> {
    let stored = match store.get(&keys::session(node)).await {
        Ok(stored) => stored?,
        Err(error) => {
            tracing::warn!(node, %error, "the session of an agent that leaves is not kept: its record can't be read");
            return None;
        }
    };
    let session = records::decode::<record::Session>(&stored).ok()?;
    (session.session_id == session_id && session.coordinator == coordinator).then_some(stored.mod_revision)
}

/// Renews `lease` for at most `within`, until the session's record is no longer of this `revision`: who resumes it writes
/// it first.
pub(super) async fn keep(
    store: &Store,
    view: &View,
    events: &Events,
    node: &str,
    (lease, revision): (i64, i64),
    within: Duration,
) {
    let within = within.min(limits::ABSENCE_MAX);
    if within.is_zero() {
        return;
    }
    let until = Instant::now() + within;
    let shown = format!("{} s", within.as_secs_f32().round());
    let tell = |reason, severity, what| events.record(format!("node/{node}"), reason, severity, what);
    tell("Left", Severity::Info, format!("its agent means to be back within {shown}: its session is kept so long"));
    let mut snapshots = view.subscribe();
    loop {
        let pause = match store.renew(lease).await {
            Ok(ttl) => ttl / 3,
            Err(Error::LeaseGone) => return,
            Err(error) => {
                tracing::warn!(node, %error, "the session of an absent agent was not renewed");
                RETRY
            }
        };
        let left = until.saturating_duration_since(Instant::now());
        let moved = snapshots.wait_for(|snapshot| {
            snapshot.revision >= revision && snapshot.sessions.get(node).is_none_or(|s| s.mod_revision != revision)
        });
        if timeout(pause.min(left), moved).await.is_ok() {
            return;
        }
        if Instant::now() >= until {
            let what = format!("its agent is not back within {shown}: its session runs out");
            return tell("NotReturned", Severity::Warning, what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Txn, memory::Memory, schema};
    use std::sync::Arc;
    use tokio_util::sync::CancellationToken;

    const TTL: Duration = Duration::from_secs(10);

    struct World {
        store: Store,
        view: View,
        events: Events,
        lease: i64,
    }

    impl World {
        async fn new() -> Self {
            let store: Store = Arc::new(Memory::start(1));
            schema::open(&store).await.unwrap();
            let view = View::start(store.clone(), CancellationToken::new());
            let (events, _) = Events::start(store.clone(), "coordinator/test".to_owned());
            let lease = store.grant(TTL).await.unwrap();
            let world = Self { store, view, events, lease };
            world.write(1).await;
            world
        }

        async fn write(&self, version: u64) {
            let (session_id, coordinator) = ("s".to_owned(), "one".to_owned());
            let session =
                record::Session { session_id, coordinator, lease: self.lease, version, ..record::Session::default() };
            let then = vec![records::put(keys::session("a"), &session, self.lease)];
            self.store.txn(Txn { then, ..Txn::default() }).await.unwrap();
        }

        /// Keeps the session; how long it was kept.
        async fn keep(&self, revision: i64, within: Duration) -> Duration {
            let begun = Instant::now();
            keep(&self.store, &self.view, &self.events, "a", (self.lease, revision), within).await;
            begun.elapsed()
        }

        async fn stands(&self) -> bool {
            self.store.get(&keys::session("a")).await.unwrap().is_some()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_is_kept_for_the_time_said_and_no_longer() {
        let world = World::new().await;
        let revision = leaving(&world.store, "a", "s", "one").await.unwrap();
        assert_eq!(world.keep(revision, TTL * 6).await, TTL * 6);
        assert!(world.stands().await);
        tokio::time::sleep(TTL + TTL / 10).await;
        assert!(!world.stands().await);
        assert!(world.keep(revision, TTL * 6).await < TTL, "there is nothing to keep");
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_back_before_the_renewals_begin_is_not_kept_once_more() {
        let world = World::new().await;
        let revision = leaving(&world.store, "a", "s", "one").await.unwrap();
        world.write(2).await;
        assert!(world.keep(revision, TTL * 6).await < TTL);
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_session_of_this_coordinator_is_kept_and_for_no_more_than_the_limit() {
        let world = World::new().await;
        assert_eq!(leaving(&world.store, "a", "s", "two").await, None);
        assert_eq!(leaving(&world.store, "a", "t", "one").await, None);
        assert_eq!(leaving(&world.store, "b", "s", "one").await, None);
        let revision = leaving(&world.store, "a", "s", "one").await.unwrap();
        assert_eq!(world.keep(revision, limits::ABSENCE_MAX * 9).await, limits::ABSENCE_MAX);
    }
}
