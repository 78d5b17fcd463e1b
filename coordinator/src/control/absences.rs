//! Planned absences: the leases of agents that have left and mean to be back are renewed in their stead, for as long as the
//! sessions' records say.
//!
//! Every replica does so for the sessions that it has served itself, and the leader for all: an absence outlives the
//! coordinator that heard of it, since the leader is replaced within less than a session's usual time to live. Owns
//! nothing but the times of its renewals; must never write a session's record.

use super::{clock, events::Events, leader::Leadership, mutant, view::View};
use crate::{
    plan::snapshot::Snapshot,
    store::{Error, Store},
};
use drover_proto::v1::Severity;
use std::{collections::BTreeMap, time::Duration};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

/// How often the sessions are looked through, and pause after a renewal that has failed.
const TICK: Duration = Duration::from_millis(500);

/// Keeps planned absences.
#[derive(Debug)]
pub struct Absences {
    /// The store.
    pub store: Store,
    /// The view.
    pub view: View,
    /// Whether this coordinator leads.
    pub leadership: Leadership,
    /// Events.
    pub events: Events,
    /// Id of this coordinator.
    pub coordinator: String,
}

impl Absences {
    /// Works until `stop`, and renews once more then: until another one has taken over.
    pub async fn run(self, stop: CancellationToken) {
        let mut kept = BTreeMap::new();
        let mut snapshots = self.view.subscribe();
        while !stop.is_cancelled() {
            let snapshot = snapshots.borrow_and_update().clone();
            self.look(&snapshot, &mut kept).await;
            tokio::select! {
                () = stop.cancelled() => {}
                _ = timeout(TICK, snapshots.changed()) => {}
            }
        }
        kept.values_mut().for_each(|kept: &mut Kept| kept.due = Instant::now());
        self.look(&self.view.snapshot(), &mut kept).await;
    }

    /// Renews what is due.
    async fn look(&self, snapshot: &Snapshot, kept: &mut BTreeMap<String, Kept>) {
        let (leads, now_ms) = (self.leadership.borrow().is_some(), clock::now_ms());
        let absent = absent(snapshot, &self.coordinator, leads, now_ms);
        kept.retain(|node, one| {
            let stays = absent.iter().any(|(name, session, _)| name == node && *session == one.session);
            if !stays {
                self.tell_end(snapshot, node, one);
            }
            stays
        });
        for (node, session, lease) in absent {
            let one = kept.entry(node.clone()).or_insert_with(|| Kept { session, due: Instant::now() });
            if one.due > Instant::now() {
                continue;
            }
            let pause = match self.store.renew(lease).await {
                Ok(ttl) => ttl / 3,
                // The view shows it in a moment.
                Err(Error::LeaseGone) => TICK,
                Err(error) => {
                    tracing::warn!(node, %error, "the session of an absent agent was not renewed");
                    TICK
                }
            };
            one.due = Instant::now() + pause;
        }
    }

    /// Told by whoever kept it when its time is over; who is back is told of anyway.
    fn tell_end(&self, snapshot: &Snapshot, node: &str, one: &Kept) {
        let over = snapshot.sessions.get(node).is_some_and(|s| {
            s.value.session_id == one.session
                && s.value.absent_until.as_ref().is_some_and(|t| clock::millis(t) <= clock::now_ms())
        });
        if over {
            let what = "its agent is not back in the time that it said: its session runs out".to_owned();
            self.events.record(format!("node/{node}"), "NotReturned", Severity::Warning, what);
        }
    }
}

/// A session that is kept.
#[derive(Debug)]
struct Kept {
    session: String,
    due: Instant,
}

/// PURE. Sessions that this coordinator keeps now: node, id, lease.
fn absent(snapshot: &Snapshot, coordinator: &str, leads: bool, now_ms: i64) -> Vec<(String, String, i64)> {
    let leads = leads && !mutant::on(mutant::name::ABSENCE_KEPT_BY_ONE);
    let kept = snapshot.sessions.iter().filter(|(_, session)| {
        let session = &session.value;
        let away = session.absent_until.as_ref().is_some_and(|until| clock::millis(until) > now_ms);
        away && session.stream.is_empty() && (leads || session.coordinator == coordinator)
    });
    kept.map(|(node, s)| (node.clone(), s.value.session_id.clone(), s.value.lease)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        control::leader::Term,
        store::{Txn, keys, memory::Memory, records, schema},
    };
    use drover_proto::store::v1 as record;
    use std::sync::Arc;
    use tokio::sync::watch;

    const TTL: Duration = Duration::from_secs(10);

    struct World {
        store: Store,
        lead: watch::Sender<Option<Term>>,
        lease: i64,
    }

    impl World {
        /// A coordinator "one", and a session that "two" served last, away for six times its time to live.
        async fn new(leads: bool) -> Self {
            let store: Store = Arc::new(Memory::start(1));
            schema::open(&store, None).await.unwrap();
            let view = View::start(store.clone(), CancellationToken::new());
            let (events, _) = Events::start(store.clone(), "coordinator/one".to_owned());
            let (lead, leadership) =
                watch::channel(leads.then_some(Term { revision: 1, schema: 1, since: Instant::now(), lease: 0 }));
            let lease = store.grant(TTL).await.unwrap();
            let coordinator = "one".to_owned();
            let absences = Absences { store: store.clone(), view, leadership, events, coordinator };
            tokio::spawn(absences.run(CancellationToken::new()));
            let world = Self { store, lead, lease };
            world.write(Some(TTL * 6), "").await;
            world
        }

        async fn write(&self, away: Option<Duration>, stream: &str) {
            let absent_until = away.map(|d| clock::timestamp(clock::now_ms() + i64::try_from(d.as_millis()).unwrap()));
            let [session_id, coordinator, stream] = ["s", "two", stream].map(str::to_owned);
            let lease = self.lease;
            let session =
                record::Session { session_id, coordinator, lease, stream, absent_until, ..record::Session::default() };
            let then = vec![records::put(keys::session("a"), &session, lease)];
            self.store.txn(Txn { then, ..Txn::default() }).await.unwrap();
        }

        async fn stands_after(&self, time: Duration) -> bool {
            tokio::time::sleep(time).await;
            self.store.get(&keys::session("a")).await.unwrap().is_some()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_leader_keeps_what_another_coordinator_was_told() {
        let world = World::new(true).await;
        assert!(world.stands_after(TTL * 3).await);
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_lead_keeps_only_its_own() {
        let world = World::new(false).await;
        assert!(!world.stands_after(TTL * 3 / 2).await);
    }

    #[tokio::test(start_paused = true)]
    async fn who_comes_to_lead_goes_on_with_it() {
        let world = World::new(false).await;
        assert!(world.stands_after(TTL / 2).await);
        world.lead.send_replace(Some(Term { revision: 2, schema: 1, since: Instant::now(), lease: 0 }));
        assert!(world.stands_after(TTL * 3).await);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_back_renews_for_itself() {
        let world = World::new(true).await;
        assert!(world.stands_after(TTL).await);
        // Its agent has resumed it, and died.
        world.write(None, "stream").await;
        assert!(!world.stands_after(TTL * 3 / 2).await);
    }

    #[test]
    fn it_is_kept_until_its_time_is_over() {
        let value = record::Session {
            session_id: "s".to_owned(),
            coordinator: "one".to_owned(),
            absent_until: Some(clock::timestamp(5_000)),
            ..record::Session::default()
        };
        let stored = crate::plan::snapshot::Stored { value, create_revision: 1, mod_revision: 1 };
        let mut snapshot = Snapshot::default();
        snapshot.sessions.insert("a".to_owned(), Arc::new(stored));
        assert_eq!(absent(&snapshot, "one", false, 4_999).len(), 1);
        assert_eq!(absent(&snapshot, "one", true, 5_000).len(), 0);
        assert_eq!(absent(&snapshot, "two", false, 4_999).len(), 0);
        assert_eq!(absent(&snapshot, "two", true, 4_999).len(), 1);
    }
}
