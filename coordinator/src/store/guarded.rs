//! A store that takes no write while it is known not to be the one that was used before: it came back empty, as an older copy,
//! or as another one. Whoever writes does so through this, so that nobody has to ask.
//!
//! Must never: decide which store is the right one; who follows it does ([`crate::control::view::View::refused`]). What is
//! written before that was noticed is told apart by what each transaction compares.

use super::{Backend, Error, KeyValue, Listing, Store, Txn, TxnOutcome, Watch};
use async_trait::async_trait;
use std::time::Duration;
use tokio::sync::watch;

/// The store, and why it is not used, if it is not.
#[derive(Debug)]
pub struct Guarded {
    store: Store,
    refused: watch::Receiver<Option<String>>,
}

impl Guarded {
    /// Guards a store by the word of whoever follows it.
    #[must_use]
    pub fn new(store: Store, refused: watch::Receiver<Option<String>>) -> Self {
        Self { store, refused }
    }

    fn check(&self) -> Result<(), Error> {
        self.refused.borrow().as_ref().map_or(Ok(()), |why| Err(Error::Changed(why.clone())))
    }
}

#[async_trait]
impl Backend for Guarded {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, Error> {
        self.store.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, Error> {
        self.store.list(prefix).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, Error> {
        if txn.writes() {
            self.check()?;
        }
        self.store.txn(txn).await
    }

    async fn grant(&self, ttl: Duration) -> Result<i64, Error> {
        self.check()?;
        self.store.grant(ttl).await
    }

    async fn renew(&self, lease: i64) -> Result<Duration, Error> {
        self.check()?;
        self.store.renew(lease).await
    }

    async fn revoke(&self, lease: i64) -> Result<(), Error> {
        self.check()?;
        self.store.revoke(lease).await
    }

    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<Watch, Error> {
        self.store.watch(prefix, from_revision).await
    }

    async fn cluster_id(&self) -> Result<u64, Error> {
        self.store.cluster_id().await
    }

    async fn out_of_space(&self) -> Result<bool, Error> {
        self.store.out_of_space().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Op, memory::Memory};
    use std::sync::Arc;

    #[tokio::test]
    async fn nothing_is_written_while_it_is_refused_and_all_can_be_read() {
        let (refuse, refused) = watch::channel(None);
        let store: Store = Arc::new(Memory::start(1));
        let guarded = Guarded::new(store.clone(), refused);
        let put = || Txn { then: vec![Op::Put { key: "a".to_owned(), value: vec![1], lease: 0 }], ..Txn::default() };
        let read = || Txn { then: vec![Op::Get("a".to_owned())], ..Txn::default() };
        let lease = guarded.grant(Duration::from_secs(5)).await.unwrap();
        let before = guarded.txn(put()).await.unwrap().revision;
        refuse.send_replace(Some("it is empty".to_owned()));
        let refusal = Error::Changed("it is empty".to_owned());
        assert_eq!(guarded.txn(put()).await, Err(refusal.clone()));
        assert_eq!(guarded.grant(Duration::from_secs(5)).await, Err(refusal.clone()));
        assert_eq!(guarded.renew(lease).await, Err(refusal.clone()));
        assert_eq!(guarded.revoke(lease).await, Err(refusal));
        assert_eq!(guarded.txn(read()).await.unwrap().revision, before, "nothing was written");
        assert!(guarded.get("a").await.unwrap().is_some());
        refuse.send_replace(None);
        assert!(guarded.txn(put()).await.unwrap().revision > before);
    }
}
