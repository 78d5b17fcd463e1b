//! Turns to be launched: a node launches a few servers at a time, in the order in which they asked.
//!
//! Servers that all start at once share the processor, and all become ready at the end, together; one after the other the
//! first ones serve early and the last is not later. A turn lasts until its server answers or ends, at most
//! [`TURN_MAX`]: one that loads for minutes waits for a disk or a GPU, and must not keep others from the processor.

use drover_proto::world;
use std::{sync::Arc, time::Duration};
use tokio::sync::{Semaphore, oneshot};

/// Longest time that a turn keeps others waiting.
const TURN_MAX: Duration = Duration::from_secs(5);

/// The turns of a node.
#[derive(Debug)]
pub struct Turns(Arc<Semaphore>);

/// A turn; over when dropped.
#[derive(Debug)]
pub struct Turn {
    _ends: oneshot::Sender<()>,
}

impl Turns {
    /// So many at once, at least one.
    #[must_use]
    pub fn new(at_once: u32) -> Self {
        Self(Arc::new(Semaphore::new(usize::try_from(at_once.max(1)).unwrap_or(Semaphore::MAX_PERMITS))))
    }

    /// Waits for a turn.
    pub async fn take(&self) -> Turn {
        let permit = self.0.clone().acquire_owned().await;
        let (ends, ended) = oneshot::channel::<()>();
        tokio::spawn(world::task(async move {
            let _ = tokio::time::timeout(TURN_MAX, ended).await;
            drop(permit);
        }));
        Turn { _ends: ends }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[tokio::test(start_paused = true)]
    async fn a_turn_ends_when_it_is_dropped_or_has_taken_too_long() {
        let turns = Turns::new(1);
        let first = turns.take().await;
        assert!(turns.take().now_or_never().is_none(), "one at a time");
        drop(first);
        let begun = tokio::time::Instant::now();
        let kept = turns.take().await;
        assert!(begun.elapsed() < TURN_MAX);
        let _next = turns.take().await;
        assert_eq!(begun.elapsed().as_secs(), TURN_MAX.as_secs(), "the one that takes long waits for something else");
        drop(kept);
    }
}
