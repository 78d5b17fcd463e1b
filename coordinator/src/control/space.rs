//! Whether the store is out of space (etcd's NOSPACE alarm): it is read, leases are renewed, and writes are refused, so that
//! nothing but the changes that are asked for shows it. Service and handle: the service asks the store now and then and tells
//! when that begins and ends; the handle says how it stands, for `/metrics`.

use super::events::{self, Events};
use crate::store::Store;
use drover_proto::{v1::Severity, world};
use std::time::Duration;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;

/// How often the store is asked.
const INTERVAL: Duration = Duration::from_secs(2);
/// How long it may take to answer.
const ANSWER: Duration = Duration::from_secs(1);

/// Handle: cheap to clone.
#[derive(Debug, Clone)]
pub struct Space(watch::Receiver<Option<Instant>>);

impl Space {
    /// Starts the service; it runs until `stop`.
    #[must_use]
    pub fn start(store: Store, events: Events, stop: CancellationToken) -> Self {
        let (tell, told) = watch::channel(None);
        tokio::spawn(world::task(stop.run_until_cancelled_owned(async move {
            let mut tick = interval(INTERVAL);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                // A store that does not answer is no news here: see [`super::reach`].
                let Ok(Ok(full)) = timeout(ANSWER, store.out_of_space()).await else { continue };
                let since: Option<Instant> = *tell.borrow();
                match (since, full) {
                    (None, true) => {
                        tracing::error!(
                            "the store is out of space (NOSPACE): changes are refused, serving goes on; compact and \
                             defragment it, then disarm the alarm (etcdctl compact, defrag, alarm disarm)"
                        );
                        tell.send_replace(Some(Instant::now()));
                    }
                    // While it lasted no event could be written.
                    (Some(since), false) => {
                        let message =
                            format!("it was out of space for {} s, and refused all changes", since.elapsed().as_secs());
                        events.record(events::FLEET.to_owned(), "StoreHasSpace", Severity::Warning, message);
                        tell.send_replace(None);
                    }
                    _ => {}
                }
            }
        })));
        Self(told)
    }

    /// Whether the store is out of space, as far as is known.
    #[must_use]
    pub fn is_out(&self) -> bool {
        self.0.borrow().is_some()
    }
}
