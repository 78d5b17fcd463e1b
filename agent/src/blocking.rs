//! Work that may hang, as a look at a network file system may: done beside the runtime, waited for with a deadline.
//!
//! A thread that hangs in the kernel can't be called back. So that they do not pile up there is one at a time for each
//! thing that is looked at: who comes after it waits for it, and once it is late nobody waits any more.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::time::timeout;

/// Where one look at a time has room.
#[derive(Debug, Default)]
struct Place {
    taken: Arc<tokio::sync::Mutex<()>>,
    /// Whether the present look has been given up, and goes on.
    late: AtomicBool,
}

/// Places of the looks that are under way or waited for.
static PLACES: Mutex<BTreeMap<String, Arc<Place>>> = Mutex::new(BTreeMap::new());

/// Why there is no outcome.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It was not done in time; it may go on.
    #[error("no answer within {0:?}: its file system or disk hangs, or is very slow")]
    Late(Duration),
    /// It has ended without an outcome.
    #[error("it has ended without an outcome: {0}")]
    Broken(String),
}

/// Does work that reads files, at most for `limit`. `thing` is what is looked at, a path say.
///
/// # Errors
/// There was no outcome in time.
pub async fn within<T: Send + 'static>(
    limit: Duration,
    thing: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let place = {
        // Nothing panics while it holds the lock; should it ever, the map is still whole.
        let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
        places.retain(|_, place| Arc::strong_count(place) > 1);
        places.entry(thing.to_owned()).or_default().clone()
    };
    if place.late.load(Ordering::Acquire) {
        return Err(Error::Late(limit));
    }
    let done = async {
        let taken = place.taken.clone().lock_owned().await;
        let place = place.clone();
        tokio::task::spawn_blocking(move || {
            let outcome = work();
            place.late.store(false, Ordering::Release);
            drop(taken);
            outcome
        })
        .await
    };
    match timeout(limit, done).await {
        Ok(outcome) => outcome.map_err(|error| Error::Broken(error.to_string())),
        Err(_) => {
            place.late.store(place.taken.try_lock().is_err(), Ordering::Release);
            Err(Error::Late(limit))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    };

    #[tokio::test]
    async fn what_hangs_is_given_up_and_never_piles_up() {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let (release, hang) = mpsc::sync_channel::<()>(1);
        let short = Duration::from_millis(50);
        let first = within(short, "hung", move || {
            STARTED.fetch_add(1, Ordering::SeqCst);
            let _ = hang.recv();
        });
        assert_eq!(first.await, Err(Error::Late(short)));
        // At once: with a deadline that the test would not live to see.
        let never = Duration::from_secs(3600);
        assert_eq!(within(never, "hung", || ()).await, Err(Error::Late(never)));
        for _ in 0..5 {
            let again = within(short, "hung", || STARTED.fetch_add(1, Ordering::SeqCst));
            assert_eq!(again.await, Err(Error::Late(short)));
        }
        assert_eq!(STARTED.load(Ordering::SeqCst), 1, "one thread hangs, not six");
        // Others are not held up, and neither is this one when it has come back.
        assert_eq!(within(Duration::from_secs(30), "other", || 7).await, Ok(7));
        release.send(()).unwrap();
        while within(Duration::from_secs(30), "hung", || 8).await != Ok(8) {
            tokio::task::yield_now().await;
        }
    }
}
