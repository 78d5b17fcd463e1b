//! Whether this replica has the store: it answers, and the view follows it. Everybody who must know asks here, and nobody
//! else pings.
//!
//! Service and handle: the service asks the store for a small key twice a second, and looks at the view; the handle tells
//! since when the store is out of reach, and why. A replica without the store goes on routing with what it saw last; it says
//! so, takes no session, and hands those that it has to the others while their leases live.

use super::{
    events::{self, Events},
    view::View,
};
use crate::store::{Store, keys};
use drover_proto::{v1::Severity, world};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

/// How often the store is asked.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long it may take to answer.
const ANSWER: Duration = Duration::from_secs(1);
/// Shorter than this is no outage that anybody needs to be told of.
const TOLD_AFTER: Duration = Duration::from_secs(1);

/// The store is out of reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// Since when: the first question that it did not answer, or the first look that found the view stale.
    pub since: Instant,
    /// Why, for people.
    pub why: Arc<str>,
}

impl Lost {
    /// For how long.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }
}

/// Handle: cheap to clone.
#[derive(Debug, Clone)]
pub struct Reach(watch::Receiver<Option<Lost>>);

impl Reach {
    /// Starts the service; it runs until `stop`. The store counts as out of reach until the view has read it.
    #[must_use]
    pub fn start(store: Store, view: View, events: Events, stop: CancellationToken) -> Self {
        let unread = Lost { since: Instant::now(), why: "this coordinator has not read the store yet".into() };
        let (tell, told) = watch::channel(Some(unread));
        tokio::spawn(world::task(stop.run_until_cancelled_owned(async move {
            let mut tick = interval(INTERVAL);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            // That it begins is no return.
            let mut reached = false;
            loop {
                tick.tick().await;
                let asked = Instant::now();
                let why = look(&store, &view).await;
                let was = tell.borrow().clone();
                tell.send_if_modified(|lost| change(lost, why, asked));
                match (was, tell.borrow().is_none()) {
                    (Some(lost), true) if reached && lost.elapsed() >= TOLD_AFTER => tell_back(&events, &lost),
                    _ => {}
                }
                reached |= tell.borrow().is_none();
            }
        })));
        Self(told)
    }

    /// Since when, and why, the store is out of reach; `None` while it is not.
    #[must_use]
    pub fn lost(&self) -> Option<Lost> {
        self.0.borrow().clone()
    }

    /// Waits until the store has been out of reach for so long.
    pub async fn lost_longer_than(&self, within: Duration) {
        let mut told = self.0.clone();
        loop {
            let since = told.borrow_and_update().as_ref().map(|lost| lost.since);
            let over = async {
                match since {
                    Some(since) => sleep_until(since + within).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // First, so that what has come back in the same moment is not lost.
                biased;
                // After the service's end nothing changes any more: its last word stands.
                Ok(()) = told.changed() => {}
                () = over => return,
            }
        }
    }
}

/// Why the store is out of reach, if it is.
async fn look(store: &Store, view: &View) -> Option<String> {
    if let Some(refused) = view.refused().borrow().clone() {
        return Some(refused);
    }
    match timeout(ANSWER, store.get(keys::SCHEMA)).await {
        Err(_) => Some(format!("the store did not answer within {} s", ANSWER.as_secs())),
        Ok(Err(error)) => Some(error.to_string()),
        Ok(Ok(_)) if view.live() => None,
        Ok(Ok(_)) => Some("the view of the store is stale: its watch is being made again".to_owned()),
    }
}

/// While it lasts no event can be written: `/readyz` and `/metrics` tell.
fn tell_back(events: &Events, lost: &Lost) {
    let message = format!("it was out of reach of this coordinator for {} s: {}", lost.elapsed().as_secs(), lost.why);
    events.record(events::FLEET.to_owned(), "StoreBack", Severity::Warning, message);
}

/// Takes what a look has shown; true when that is news.
fn change(lost: &mut Option<Lost>, why: Option<String>, asked: Instant) -> bool {
    match (why, lost.as_mut()) {
        (None, before) => {
            let news = before.is_some();
            *lost = None;
            news
        }
        (Some(why), Some(before)) => {
            // The latest reason, since when it began.
            let news = *before.why != *why;
            before.why = why.into();
            news
        }
        (Some(why), None) => {
            tracing::error!(why, "the store is out of reach");
            *lost = Some(Lost { since: asked, why: why.into() });
            true
        }
    }
}
