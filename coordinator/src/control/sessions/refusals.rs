//! Refused agents, for the history of their node: one that goes on asking is told of, once a minute, so that an operator sees
//! a second host of one name though only its own log says so. One that is let in in a moment is not.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Who asks for this long in vain does not just wait for an earlier agent's session to be free.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two events.
const AGAIN: Duration = Duration::from_secs(60);
/// Who has not asked for this long has given up, or was let in.
const FORGOTTEN: Duration = Duration::from_secs(15);
/// Nodes that are remembered; others are not told of.
const NODES_MAX: usize = 1024;

#[derive(Debug)]
struct Refused {
    since: Instant,
    last: Instant,
    told: Option<Instant>,
}

/// What was refused of late.
#[derive(Debug, Clone, Default)]
pub struct Refusals(Arc<Mutex<BTreeMap<String, Refused>>>);

impl Refusals {
    /// An agent of this node was refused; whether that is worth an event now.
    pub(super) fn is_news(&self, node: &str) -> bool {
        let now = Instant::now();
        // Nothing panics while it holds the lock; should it ever, the map is still whole.
        let mut nodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.retain(|_, refused| now - refused.last < FORGOTTEN);
        if nodes.len() >= NODES_MAX && !nodes.contains_key(node) {
            return false;
        }
        let refused = nodes.entry(node.to_owned()).or_insert(Refused { since: now, last: now, told: None });
        refused.last = now;
        let is_news = now - refused.since >= PATIENCE && refused.told.is_none_or(|told| now - told >= AGAIN);
        if is_news {
            refused.told = Some(now);
        }
        is_news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_asks_for_long_is_told_of_once_a_minute() {
        let refusals = Refusals::default();
        let mut told = 0;
        for _ in 0..65 {
            told += u32::from(refusals.is_news("a"));
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(told, 2);
        // Who was let in, and asks again much later, has just begun to wait.
        tokio::time::advance(FORGOTTEN).await;
        assert!(!refusals.is_news("a"));
    }
}
