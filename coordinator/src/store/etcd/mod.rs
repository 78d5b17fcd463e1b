//! The store in etcd.
//!
//! Owns: two connections (renewals have one of their own, so that a burst of other calls never makes a lease wait), the
//! deadline of every call, and what an etcd error means to a caller. Must never: keep content; every answer is etcd's.
//!
//! etcd-client is a thin stub: it mends no watch and no keep-alive, and its timeouts, keep-alives and `require_leader` are
//! off by default. What is set here, and why, is said at [`Settings`].

mod convert;
mod dial;
mod error;
mod renew;
mod watch;

use super::{Backend, Error, KeyValue, Listing, Txn, TxnOutcome, Watch};
use async_trait::async_trait;
use convert::Prefix;
use error::Kind;
use etcd_client::{GetOptions, KvClient, LeaseClient, MaintenanceClient, WatchClient};
use std::{fmt, future::Future, sync::Arc, time::Duration};
use tokio::{
    runtime::Handle,
    time::{Instant, sleep, timeout_at},
};
use tokio_util::task::AbortOnDropHandle;

/// How to reach etcd. `Debug` leaves the password out.
#[derive(Clone)]
pub struct Settings {
    /// Client addresses of the members, "http://host:port".
    pub endpoints: Vec<String>,
    /// Put before every key; begins and ends with '/'. Several fleets can share an etcd under different prefixes.
    pub prefix: String,
    /// Name and password, where etcd demands them.
    pub user: Option<(String, String)>,
    /// Deadline of every call, opening a watch included.
    pub call_timeout: Duration,
    /// Deadline of opening a connection.
    pub connect_timeout: Duration,
    /// Silence on a connection with calls or watches open, after which it is pinged, and the wait for the answer; a
    /// connection that does not answer is closed and the next call opens another. Never while idle: etcd takes pings on
    /// an idle connection, or more than two within 5 s without sending anything itself, for an attack and closes the
    /// connection (`--grpc-keepalive-min-time`), and with it whatever is under way.
    pub keep_alive: Duration,
    /// Runtime on which leases are renewed; that of the caller where there is none.
    pub renewals: Option<Handle>,
    /// Silence on a watch after which etcd is asked for its progress. Shorter than `keep_alive`, so that the answers keep
    /// the pings away. No answer within `call_timeout` ends the watch.
    pub watch_silence: Duration,
}

impl Settings {
    /// Defaults for these endpoints: prefix "/drover/", calls 5 s, connecting 2 s, keep-alive 2 s, progress of watches 1 s.
    #[must_use]
    pub fn new(endpoints: Vec<String>) -> Self {
        Self {
            endpoints,
            prefix: "/drover/".to_owned(),
            user: None,
            call_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(2),
            keep_alive: Duration::from_secs(2),
            watch_silence: Duration::from_secs(1),
            renewals: None,
        }
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("endpoints", &self.endpoints)
            .field("prefix", &self.prefix)
            .field("user", &self.user.as_ref().map(|(name, _)| name))
            .field("call_timeout", &self.call_timeout)
            .finish_non_exhaustive()
    }
}

/// An etcd cluster as a store.
pub struct Etcd {
    settings: Settings,
    prefix: Prefix,
    kv: KvClient,
    leases: LeaseClient,
    watches: WatchClient,
    maintenance: MaintenanceClient,
    renewals: Arc<renew::Renewals>,
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Etcd").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// Largest answer that is decoded: a listing of 10,000 instances with all their records is about 30 MB.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// Name of the alarm that etcd raises when it is out of space.
const NO_SPACE_ALARM: &str = "NOSPACE";

/// Pause before a call is sent again. Short: another member may answer at once.
const PAUSE: Duration = Duration::from_millis(25);

impl Etcd {
    /// Connects, and asks the cluster for its identity, so that a wrong address is found now.
    ///
    /// # Errors
    /// [`Error::Rejected`] for settings that can't work, [`Error::Unavailable`] naming the endpoints when none answers.
    pub async fn connect(settings: Settings) -> Result<Self, Error> {
        dial::check(&settings)?;
        let client = dial::client(&settings).await?;
        let etcd = Self {
            prefix: Prefix::new(&settings.prefix),
            kv: client.kv_client().max_decoding_message_size(ANSWER_BYTES_MAX),
            leases: client.lease_client(),
            watches: client.watch_client().max_decoding_message_size(ANSWER_BYTES_MAX),
            maintenance: client.maintenance_client(),
            renewals: Arc::new(renew::Renewals::new(settings.clone())),
            settings,
        };
        etcd.cluster_id().await.map_err(|error| dial::unreachable(&etcd.settings, &error))?;
        Ok(etcd)
    }

    /// Makes a call under the deadline. It is sent again where that is known to be harmless: when it never left, because
    /// no connection could be made (another member may answer), and reads also when their connection broke.
    async fn call<T, F, Answer>(&self, kind: Kind, what: &str, mut attempt: F) -> Result<T, Error>
    where
        F: FnMut() -> Answer + Send,
        Answer: Future<Output = Result<T, etcd_client::Error>> + Send,
        T: Send,
    {
        let deadline = Instant::now() + self.settings.call_timeout;
        let mut attempts_left = 2 * self.settings.endpoints.len();
        loop {
            match timeout_at(deadline, attempt()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) if attempts_left > 0 && error::harmless_to_repeat(&error, kind) => {
                    attempts_left -= 1;
                    tracing::debug!(%error, what, "a call of etcd is sent again");
                    sleep(PAUSE).await;
                }
                Ok(Err(error)) => return Err(error::map(&error, kind, what)),
                Err(_) => return Err(error::silence(kind, what, self.settings.call_timeout)),
            }
        }
    }
}

#[async_trait]
impl Backend for Etcd {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, Error> {
        let answer = self.call(Kind::Read, "get", || {
            let (mut kv, key) = (self.kv.clone(), self.prefix.add(key));
            async move { kv.get(key, None).await }
        });
        Ok(answer.await?.take_kvs().into_iter().map(|kv| self.prefix.strip(kv)).next())
    }

    async fn list(&self, prefix: &str) -> Result<Listing, Error> {
        let answer = self.call(Kind::Read, "list", || {
            let (mut kv, key) = (self.kv.clone(), self.prefix.add(prefix));
            async move { kv.get(key, Some(GetOptions::new().with_prefix())).await }
        });
        let mut answer = answer.await?;
        let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok(Listing { items: answer.take_kvs().into_iter().map(|kv| self.prefix.strip(kv)).collect(), revision })
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, Error> {
        let kind = if txn.writes() { Kind::Write } else { Kind::Read };
        let request = self.prefix.txn(&txn);
        let answer = self.call(kind, "transaction", || {
            let (mut kv, request) = (self.kv.clone(), request.clone());
            async move { kv.txn(request).await }
        });
        Ok(self.prefix.outcome(&answer.await?))
    }

    async fn grant(&self, ttl: Duration) -> Result<i64, Error> {
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX).max(1);
        let answer = self.call(Kind::Write, "grant of a lease", || {
            let mut leases = self.leases.clone();
            async move { leases.grant(seconds, None).await }
        });
        Ok(answer.await?.id())
    }

    async fn renew(&self, lease: i64) -> Result<Duration, Error> {
        let Some(runtime) = &self.settings.renewals else { return self.renewals.renew(lease).await };
        let renewals = self.renewals.clone();
        let renewal = AbortOnDropHandle::new(runtime.spawn(async move { renewals.renew(lease).await }));
        renewal.await.unwrap_or_else(|error| Err(Error::Unavailable(format!("renewal of a lease: {error}"))))
    }

    async fn revoke(&self, lease: i64) -> Result<(), Error> {
        self.renewals.forget(lease);
        let answer = self.call(Kind::Write, "revocation of a lease", || {
            let mut leases = self.leases.clone();
            async move { leases.revoke(lease).await }
        });
        match answer.await {
            Ok(_) | Err(Error::LeaseGone) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn watch(&self, prefix: &str, from_revision: i64) -> Result<Watch, Error> {
        watch::open(self.watches.clone(), self.prefix.clone(), prefix, from_revision, &self.settings).await
    }

    /// The member that answers names the alarms of the cluster as errors of its status: no proposal is made, as a question for
    /// the alarms themselves would make one.
    async fn out_of_space(&self) -> Result<bool, Error> {
        let answer = self.call(Kind::Read, "question for its status", || {
            let mut maintenance = self.maintenance.clone();
            async move { maintenance.status().await }
        });
        Ok(answer.await?.errors().iter().any(|error| error.contains(NO_SPACE_ALARM)))
    }

    async fn cluster_id(&self) -> Result<u64, Error> {
        let answer = self.call(Kind::Read, "question for the cluster's identity", || {
            let (mut kv, key) = (self.kv.clone(), self.prefix.add(super::keys::SCHEMA));
            async move { kv.get(key, Some(GetOptions::new().with_keys_only())).await }
        });
        Ok(answer.await?.header().map_or(0, etcd_client::ResponseHeader::cluster_id))
    }
}
