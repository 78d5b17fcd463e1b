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
