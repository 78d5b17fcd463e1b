//! What a simulation does with the twin beyond what a client may: it reads the history, knows when leases end, and sets the
//! content back to a copy.

use super::{Memory, State};
use crate::store::{Changes, Error};
use std::sync::atomic::Ordering;
use tokio::time::Instant;

/// A copy of the content, as a snapshot of etcd is.
#[derive(Debug, Clone)]
pub struct Copy(State);

impl Memory {
    /// The changes of revision `from`; `None` while that is to come.
    ///
    /// # Errors
    /// [`Error::Compacted`].
    pub fn changes(&self, from: i64) -> Result<Option<Changes>, Error> {
        self.shared.with(|state| state.changes(from, ""))
    }

    /// When a lease ends if nobody renews it; `None` when it has ended.
    #[must_use]
    pub fn lease_until(&self, lease: i64) -> Option<Instant> {
        self.shared.with(|state| state.lease_until(lease))
    }

    /// A copy of the content as it is.
    #[must_use]
    pub fn copy(&self) -> Copy {
        Copy(self.shared.with(|state| state.clone()))
    }

    /// Sets the content back to a copy, as a restore of etcd does: revisions go backwards, watches break, leases have their
    /// full time again, and the cluster is another one.
    pub fn restore(&self, copy: &Copy, cluster_id: u64) {
        self.shared.with(|state| state.restore(&copy.0, Instant::now()));
        self.shared.cluster_id.store(cluster_id, Ordering::Relaxed);
        // Watches look again, and so does the task that ends leases.
        self.shared.revision.send_modify(|_| ());
        self.shared.leases_changed.notify_one();
    }

    /// Gives every lease its full time again, as a new leader of etcd does.
    pub fn refresh_leases(&self) {
        self.shared.with(|state| state.refresh_leases(Instant::now()));
        self.shared.leases_changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Backend as _, Op, Txn};
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn leases_get_their_full_time_again() {
        let store = Memory::start(1);
        let ttl = Duration::from_secs(10);
        let lease = store.grant(ttl).await.unwrap();
        let begun = Instant::now();
        tokio::time::sleep(ttl / 2).await;
        assert_eq!(store.lease_until(lease), Some(begun + ttl));
        store.refresh_leases();
        tokio::time::sleep(ttl * 9 / 10).await;
        assert!(store.lease_until(lease).is_some());
        tokio::time::sleep(ttl / 5).await;
        assert_eq!(store.lease_until(lease), None);
        assert_eq!(store.changes(2), Ok(None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_is_set_back_has_what_the_copy_had_and_its_watches_break() {
        let store = Memory::start(1);
        let put = |key: &str, lease| Txn {
            then: vec![Op::Put { key: key.to_owned(), value: vec![1], lease }],
            ..Txn::default()
        };
        let ttl = Duration::from_secs(10);
        let lease = store.grant(ttl).await.unwrap();
        store.txn(put("a", lease)).await.unwrap();
        let copy = store.copy();
        let mut watch = store.watch("", 3).await.unwrap();
        let later = store.grant(ttl).await.unwrap();
        store.txn(put("b", later)).await.unwrap();
        assert_eq!(watch.next().await.unwrap().revision, 3);
        tokio::time::sleep(ttl * 9 / 10).await;
        store.restore(&copy, 2);
        assert!(matches!(watch.next().await, Err(Error::Unavailable(_))), "it was of the store before");
        let listing = store.list("").await.unwrap();
        assert_eq!((listing.revision, listing.items.len()), (2, 1));
        assert_eq!(store.cluster_id().await, Ok(2));
        // What was granted since the copy is unknown, and no id comes again.
        assert_eq!(store.txn(put("c", later)).await, Err(Error::LeaseGone));
        assert!(store.grant(ttl).await.unwrap() > later);
        let mut watch = store.watch("", 3).await.unwrap();
        tokio::time::sleep(ttl * 9 / 10).await;
        assert!(store.get("a").await.unwrap().is_some(), "its lease has its full time again");
        store.txn(put("d", 0)).await.unwrap();
        assert_eq!(watch.next().await.unwrap().revision, 3, "revisions come again");
    }
}
