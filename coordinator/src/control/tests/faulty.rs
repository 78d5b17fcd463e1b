//! A store that fails as real ones do: out of space, or with a write that commits late.

use crate::store::{Backend, Error, KeyValue, Listing, Txn, TxnOutcome, WATCH_QUEUE, Watch, memory::Memory};
use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::sync::{mpsc, watch};

#[derive(Debug)]
pub(crate) struct Faulty {
    inner: Memory,
    pub(crate) grants: AtomicUsize,
    pub(crate) txns: AtomicUsize,
    /// Writes are refused.
    pub(crate) full: AtomicBool,
    /// The next transaction is held back, its outcome unknown to its caller.
    pub(crate) hold: AtomicBool,
    held: Mutex<Option<Txn>>,
    /// The next transaction is done, its outcome unknown to its caller.
    pub(crate) unanswered: AtomicBool,
    /// Done before the next transaction, by somebody else.
    before: Mutex<Option<Txn>>,
    /// Nothing can be read, and watches break; what is written and renewed is.
    pub(crate) blind: watch::Sender<bool>,
}

impl Faulty {
    pub(crate) fn start() -> Self {
        Self::over(Memory::start(1))
    }

    pub(crate) fn over(inner: Memory) -> Self {
        Self {
            inner,
            grants: AtomicUsize::new(0),
            txns: AtomicUsize::new(0),
            full: AtomicBool::new(false),
            hold: AtomicBool::new(false),
            held: Mutex::new(None),
            unanswered: AtomicBool::new(false),
            before: Mutex::new(None),
            blind: watch::Sender::new(false),
        }
    }

    fn sees(&self) -> Result<(), Error> {
        if *self.blind.borrow() { Err(Error::Unavailable("blind on purpose".to_owned())) } else { Ok(()) }
    }

    /// Somebody else does this between now and the next transaction, and nobody has seen it by then.
    pub(crate) fn before_next_txn(&self, txn: Txn) {
        *self.before.lock().unwrap() = Some(txn);
    }

    /// Somebody else does this now.
    pub(crate) async fn by_others(&self, txn: Txn) {
        assert!(self.inner.txn(txn).await.unwrap().succeeded);
    }

    /// The transaction held back commits now, if it still may.
    pub(crate) async fn commit_held(&self) -> TxnOutcome {
        let held = self.held.lock().unwrap().take().unwrap();
        self.inner.txn(held).await.unwrap()
    }
}

#[async_trait::async_trait]
impl Backend for Faulty {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, Error> {
        self.sees()?;
        self.inner.get(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Listing, Error> {
        self.sees()?;
        self.inner.list(prefix).await
    }
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, Error> {
        self.txns.fetch_add(1, SeqCst);
        let before = self.before.lock().unwrap().take();
        if let Some(before) = before {
            assert!(self.inner.txn(before).await?.succeeded);
        }
        if self.hold.swap(false, SeqCst) {
            *self.held.lock().unwrap() = Some(txn);
            return Err(Error::OutcomeUnknown("held back".to_owned()));
        }
        if self.unanswered.swap(false, SeqCst) {
            self.inner.txn(txn).await?;
            return Err(Error::OutcomeUnknown("its answer was lost".to_owned()));
        }
        if self.full.load(SeqCst) && txn.writes() {
            return Err(Error::NoSpace("on purpose".to_owned()));
        }
        self.inner.txn(txn).await
    }
    async fn grant(&self, ttl: Duration) -> Result<i64, Error> {
        self.grants.fetch_add(1, SeqCst);
        self.inner.grant(ttl).await
    }
    async fn renew(&self, lease: i64) -> Result<Duration, Error> {
        self.inner.renew(lease).await
    }
    async fn revoke(&self, lease: i64) -> Result<(), Error> {
        self.inner.revoke(lease).await
    }
    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<Watch, Error> {
        self.sees()?;
        let mut inner = self.inner.watch(prefix, from_revision).await?;
        let (sender, changes) = mpsc::channel(WATCH_QUEUE);
        let mut blind = self.blind.subscribe();
        tokio::spawn(async move {
            loop {
                let broken = async { drop(blind.wait_for(|blind| *blind).await) };
                let next = tokio::select! {
                    () = broken => Err(Error::Unavailable("blind on purpose".to_owned())),
                    next = inner.next() => next,
                };
                let over = next.is_err();
                if sender.send(next).await.is_err() || over {
                    return;
                }
            }
        });
        Ok(Watch { changes })
    }
    async fn cluster_id(&self) -> Result<u64, Error> {
        self.inner.cluster_id().await
    }
}
