//! Renewals of leases: a connection of their own, and on it one keep-alive stream per lease.
//!
//! The connection is opened by the first renewal and lives on the runtime which that renewal runs on, that of
//! [`Settings::renewals`]: on one of its own it is not held up by the others' load.

use super::{
    Settings, dial,
    error::{self, Kind},
};
use crate::store::Error;
use etcd_client::{LeaseClient, LeaseKeepAliveStream, LeaseKeeper};
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::OnceCell,
    time::{Instant, timeout_at},
};

/// A stream that served no renewal for this long belongs to a lease that nobody renews here any more.
const STREAM_IDLE_MAX: Duration = Duration::from_secs(60);

struct Stream {
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
    used: Instant,
}

pub(super) struct Renewals {
    settings: Settings,
    client: OnceCell<LeaseClient>,
    /// Streams at rest, by lease. One in use is taken out and comes back only after its answer arrived: a late answer
    /// must not be taken for that of the next renewal.
    streams: Mutex<HashMap<i64, Stream>>,
}

impl Renewals {
    pub(super) fn new(settings: Settings) -> Self {
        Self { settings, client: OnceCell::new(), streams: Mutex::new(HashMap::new()) }
    }

    /// Renews once. Nothing is lost by doing it twice, so a stream that broke is replaced within the same deadline.
    pub(super) async fn renew(&self, lease: i64) -> Result<Duration, Error> {
        let after = self.settings.call_timeout;
        let deadline = Instant::now() + after;
        match timeout_at(deadline, self.attempt(lease)).await {
            Ok(result) => result,
            Err(_) => Err(error::silence(Kind::Read, "renewal of a lease", after)),
        }
    }

    /// Drops the stream of a lease that is given up.
    pub(super) fn forget(&self, lease: i64) {
        self.streams().remove(&lease);
    }

    async fn attempt(&self, lease: i64) -> Result<Duration, Error> {
        let rested = self.streams().remove(&lease);
        if let Some(stream) = rested {
            match self.ask(lease, stream).await {
                Err(Error::Unavailable(_)) => {}
                settled => return settled,
            }
        }
        let client = self
            .client
            .get_or_try_init(|| async { Ok::<_, Error>(dial::client(&self.settings).await?.lease_client()) });
        let mut attempts_left = 2 * self.settings.endpoints.len();
        let client = client.await?;
        let (keeper, answers) = loop {
            match client.clone().keep_alive(lease).await {
                Ok(opened) => break opened,
                // The client reads the first answer itself; a TTL of 0 comes out as this.
                Err(etcd_client::Error::LeaseKeepAliveError(what)) if what.contains("not found") => {
                    return Err(Error::LeaseGone);
                }
                Err(error) if attempts_left > 0 && error::harmless_to_repeat(&error, Kind::Read) => {
                    attempts_left -= 1;
                    tokio::time::sleep(super::PAUSE).await;
                }
                Err(error) => return Err(error::map(&error, Kind::Read, "renewal of a lease")),
            }
        };
        // That first answer's time to live is not handed out, so a new stream asks once more.
        self.ask(lease, Stream { keeper, answers, used: Instant::now() }).await
    }

    /// One request, one answer.
    async fn ask(&self, lease: i64, mut stream: Stream) -> Result<Duration, Error> {
        let lost = |error: etcd_client::Error| error::map(&error, Kind::Read, "renewal of a lease");
        stream.keeper.keep_alive().await.map_err(lost)?;
        let Some(answer) = stream.answers.message().await.map_err(lost)? else {
            return Err(Error::Unavailable("etcd ended the stream of renewals".to_owned()));
        };
        let Ok(seconds @ 1..) = u64::try_from(answer.ttl()) else { return Err(Error::LeaseGone) };
        let now = Instant::now();
        stream.used = now;
        let mut streams = self.streams();
        streams.retain(|_, other| now.duration_since(other.used) < STREAM_IDLE_MAX);
        streams.insert(lease, stream);
        Ok(Duration::from_secs(seconds))
    }

    fn streams(&self) -> MutexGuard<'_, HashMap<i64, Stream>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
