//! etcd as a coordinator reaches it: over a network, and with what may become of a call.
//!
//! The store itself is the twin in memory. A call is executed by the world, so that it happens though its coordinator has
//! died meanwhile; a write that gets no answer may have happened, may happen later, or never.

use crate::{
    network::Reach,
    world::{Sim, lock},
};
use async_trait::async_trait;
use drover_coordinator::store::{Backend, Error, KeyValue, Listing, Txn, TxnOutcome, WATCH_QUEUE, Watch};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};

/// Longest wait for an answer.
const DEADLINE: Duration = Duration::from_secs(5);

/// The store for one life of a coordinator.
#[derive(Debug)]
pub struct Client {
    pub sim: Arc<Sim>,
    pub coordinator: usize,
}

#[derive(Debug)]
enum Request {
    Get(String),
    List(String),
    Txn(Txn),
    Grant(Duration),
    Renew(i64),
    Revoke(i64),
}

#[derive(Debug)]
enum Reply {
    Get(Option<KeyValue>),
    List(Listing),
    Txn(TxnOutcome),
    Grant(i64),
    Renew(Duration),
    Done,
}

impl Request {
    fn writes(&self) -> bool {
        match self {
            Self::Get(_) | Self::List(_) | Self::Renew(_) => false,
            Self::Txn(txn) => txn.writes(),
            Self::Grant(_) | Self::Revoke(_) => true,
        }
    }
}

async fn execute(sim: &Sim, request: Request) -> Result<Reply, Error> {
    let store = &sim.store;
    let reply = match request {
        Request::Get(key) => Reply::Get(store.get(&key).await?),
        Request::List(prefix) => Reply::List(store.list(&prefix).await?),
        Request::Txn(txn) => Reply::Txn(store.txn(txn).await?),
        Request::Grant(ttl) => Reply::Grant(store.grant(ttl).await?),
        Request::Renew(lease) => {
            let ttl = store.renew(lease).await?;
            sim.judge(|checker, now| {
                let sessions = &checker.state().sessions;
                let node =
                    sessions.iter().find(|(_, session)| session.value.lease == lease).map(|(node, _)| node.clone());
                if let Some(node) = node {
                    checker.renewed(now, &node);
                }
            });
            Reply::Renew(ttl)
        }
        Request::Revoke(lease) => {
            store.revoke(lease).await?;
            Reply::Done
        }
    };
    sim.judge(|_, _| ());
    Ok(reply)
}

impl Client {
    async fn call(&self, request: Request) -> Result<Reply, Error> {
        let writes = request.writes();
        let unanswered = || {
            let what = "no answer in time".to_owned();
            if writes { Error::OutcomeUnknown(what) } else { Error::Unavailable(what) }
        };
        let reach = lock(&self.sim.network).store_reach(self.coordinator);
        let bad = lock(&self.sim.network).faults_on();
        let (there, back, lost, late) = {
            let mut chance = self.sim.chance();
            let late = bad && chance.permille(self.sim.settings.late_commits);
            let never = chance.permille(300);
            let late_ms = late.then(|| chance.spread_ms(5, 30_000));
            (chance.between(0, 4), chance.between(0, 4), never, late_ms)
        };
        match reach {
            Reach::Refused => return Err(Error::Unavailable("connection refused".to_owned())),
            Reach::Silent => {
                // What had left before the cut was seen arrives when it heals, or never.
                if writes && !lost {
                    self.later(request, 1000);
                }
                sleep(DEADLINE).await;
                return Err(unanswered());
            }
            Reach::Up => {}
        }
        if let Some(ms) = late {
            if writes && !lost {
                self.later(request, ms);
            }
            sleep(DEADLINE).await;
            return Err(unanswered());
        }
        let (answer, answered) = oneshot::channel();
        let sim = self.sim.clone();
        tokio::spawn(async move {
            sleep(Duration::from_millis(there)).await;
            let reply = execute(&sim, request).await;
            sleep(Duration::from_millis(back)).await;
            let _ = answer.send(reply);
        });
        match timeout(DEADLINE, answered).await {
            Ok(Ok(reply)) => reply,
            _ => Err(unanswered()),
        }
    }

    /// Executes a write some time later, at the earliest when the store is reached again.
    fn later(&self, request: Request, ms: u64) {
        let (sim, coordinator) = (self.sim.clone(), self.coordinator);
        tokio::spawn(async move {
            sleep(Duration::from_millis(ms)).await;
            for _ in 0..300 {
                if lock(&sim.network).store_reach(coordinator) == Reach::Up {
                    break;
                }
                sleep(Duration::from_millis(100)).await;
            }
            let _ = execute(&sim, request).await;
        });
    }
}

#[async_trait]
impl Backend for Client {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, Error> {
        match self.call(Request::Get(key.to_owned())).await? {
            Reply::Get(found) => Ok(found),
            _ => Err(wrong()),
        }
    }

    async fn list(&self, prefix: &str) -> Result<Listing, Error> {
        match self.call(Request::List(prefix.to_owned())).await? {
            Reply::List(listing) => Ok(listing),
            _ => Err(wrong()),
        }
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, Error> {
        match self.call(Request::Txn(txn)).await? {
            Reply::Txn(outcome) => Ok(outcome),
            _ => Err(wrong()),
        }
    }

    async fn grant(&self, ttl: Duration) -> Result<i64, Error> {
        match self.call(Request::Grant(ttl)).await? {
            Reply::Grant(lease) => Ok(lease),
            _ => Err(wrong()),
        }
    }

    async fn renew(&self, lease: i64) -> Result<Duration, Error> {
        match self.call(Request::Renew(lease)).await? {
            Reply::Renew(ttl) => Ok(ttl),
            _ => Err(wrong()),
        }
    }

    async fn revoke(&self, lease: i64) -> Result<(), Error> {
        self.call(Request::Revoke(lease)).await.map(drop)
    }

    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<Watch, Error> {
        if lock(&self.sim.network).store_reach(self.coordinator) != Reach::Up {
            return Err(Error::Unavailable("connection refused".to_owned()));
        }
        let mut source = self.sim.store.watch(prefix, from_revision).await?;
        let (told, changes) = mpsc::channel(WATCH_QUEUE);
        let (sim, coordinator) = (self.sim.clone(), self.coordinator);
        tokio::spawn(async move {
            loop {
                let next = tokio::select! {
                    () = told.closed() => return,
                    next = source.next() => next,
                };
                let delay = {
                    let slow = lock(&sim.network).watch_lag_ms(coordinator);
                    slow + sim.chance().between(0, 5)
                };
                sleep(Duration::from_millis(delay)).await;
                let mut waited = 0;
                while lock(&sim.network).store_reach(coordinator) != Reach::Up {
                    sleep(Duration::from_millis(100)).await;
                    waited += 1;
                    if waited > 50 {
                        let _ = told.send(Err(Error::Unavailable("the watch is silent".to_owned()))).await;
                        return;
                    }
                }
                let broken = next.is_err();
                if told.send(next).await.is_err() || broken {
                    return;
                }
            }
        });
        Ok(Watch { changes })
    }

    async fn cluster_id(&self) -> Result<u64, Error> {
        self.sim.store.cluster_id().await
    }
}

fn wrong() -> Error {
    Error::Rejected("another kind of answer".to_owned())
}
