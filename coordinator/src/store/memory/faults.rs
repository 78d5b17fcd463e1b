//! What a simulation does with the twin beyond what a client may: it reads the history, and knows when leases end.

use super::Memory;
use crate::store::{Changes, Error};
use tokio::time::Instant;

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

    /// Gives every lease its full time again, as a new leader of etcd does.
    pub fn refresh_leases(&self) {
        self.shared.with(|state| state.refresh_leases(Instant::now()));
        self.shared.leases_changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Backend as _;
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
}
