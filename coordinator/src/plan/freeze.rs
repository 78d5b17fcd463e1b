//! PURE. The freeze: where too many nodes are lost at once, what is wrong is more likely what connects them than they themselves,
//! and their servers run. Then nothing is replaced, until nodes come back, are lost for so long that they count no more, or an
//! operator says otherwise.

use super::snapshot::{Snapshot, millis};
use std::fmt;

/// How long a lost node counts among those seen, in milliseconds.
const SEEN_MS: i64 = 3_600_000;

/// How many nodes are lost, and what follows. Its figures come from the store, so that every replica and every next leader finds
/// the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freeze {
    /// Nodes without a session that had one within the last hour. One that was removed on purpose has no record any more, and
    /// one with a planned absence keeps its session.
    pub lost: usize,
    /// Those and the connected ones.
    pub seen: usize,
    /// More are lost than replacement bears.
    pub over: bool,
    /// An operator lets it go on all the same until then, in milliseconds since the epoch; 0 when nobody does.
    pub override_until_ms: i64,
}

impl Freeze {
    /// As it is now; `share_percent` of the nodes seen may be lost, and not more.
    #[must_use]
    pub fn of(snapshot: &Snapshot, now_ms: i64, share_percent: u32) -> Self {
        let lost = snapshot.nodes.iter().filter(|(name, node)| {
            // The reconciler has not noted it yet: it was lost a moment ago.
            let for_ms = node.value.lost_at.as_ref().map_or(0, |at| now_ms.saturating_sub(millis(at)));
            !snapshot.sessions.contains_key(*name) && for_ms < SEEN_MS
        });
        let (lost, connected) = (lost.count(), snapshot.sessions.len());
        let seen = lost + connected;
        let until = snapshot.freeze.as_ref().and_then(|f| f.value.override_until.as_ref()).map_or(0, millis);
        let override_until_ms = if until > now_ms { until } else { 0 };
        let over = lost as u128 * 100 > seen as u128 * u128::from(share_percent);
        Self { lost, seen, over, override_until_ms }
    }

    /// Whether nothing is replaced.
    #[must_use]
    pub fn frozen(&self) -> bool {
        self.over && self.override_until_ms == 0
    }
}

impl fmt::Display for Freeze {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} nodes seen in the last hour are lost", self.lost, self.seen)
    }
}
