//! The proxy's end of the control socket: takes route sets and the order to end, tells counts as they change.

use super::{
    route::Table,
    wire::{FromAgent, FromProxy, Reader, Writer},
};
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// Connections at a time: the agent's, one that is being replaced, and a `drover-agent down`.
const CONNECTIONS_MAX: usize = 8;
/// A peer that reads nothing for this long is dropped.
const WRITE_DEADLINE: Duration = Duration::from_secs(5);
/// A proxy to which nobody is connected for this long has no agent.
const ALONE: Duration = Duration::from_millis(500);
/// Shortest time between two messages about counts.
const STATE_INTERVAL: Duration = Duration::from_millis(20);

/// What every control connection needs.
#[derive(Debug, Clone)]
pub(super) struct Control {
    pub(super) table: Arc<Table>,
    pub(super) address: SocketAddr,
    /// Cancelled by the order to drain and end.
    pub(super) shutdown: CancellationToken,
    /// How long to drain, if the order names it.
    pub(super) drain: Arc<std::sync::Mutex<Option<Duration>>>,
    /// Cancelled when the proxy is about to end and a successor is to be started.
    pub(super) retiring: CancellationToken,
    /// Cancelled when routes were given for the first time.
    pub(super) routed: CancellationToken,
    places: Arc<Semaphore>,
}

impl Control {
    pub(super) fn new(table: Arc<Table>, address: SocketAddr) -> Self {
        Self {
            table,
            address,
            shutdown: CancellationToken::new(),
            drain: Arc::default(),
            retiring: CancellationToken::new(),
            routed: CancellationToken::new(),
            places: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        }
    }

    /// Waits until nobody is connected, nobody who could start a successor, that is. An agent that has just started this
    /// one connects again at once.
    pub(super) async fn deserted(&self) {
        loop {
            // All places are free then; the semaphore is never closed.
            drop(self.places.acquire_many(CONNECTIONS_MAX as u32).await);
            tokio::time::sleep(ALONE).await;
            if self.places.available_permits() == CONNECTIONS_MAX {
                return;
            }
        }
    }

    /// Accepts connections until dropped.
    pub(super) async fn accept(self, listener: UnixListener) {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "the control socket can't accept");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Ok(place) = self.places.clone().try_acquire_owned() else {
                tracing::warn!("too many control connections: one is refused");
                continue;
            };
            let control = self.clone();
            tokio::spawn(async move {
                if let Err(error) = control.talk(stream).await {
                    tracing::warn!(%error, "a control connection broke");
                }
                drop(place);
            });
        }
    }

    async fn talk(self, stream: UnixStream) -> io::Result<()> {
        let (read, write) = stream.into_split();
        let (mut reader, mut writer) = (Reader::new(read), Writer::new(write));
        let hello = FromProxy::Hello {
            pid: std::process::id(),
            version: drover_proto::VERSION.to_owned(),
            address: self.address,
        };
        send(&mut writer, &hello).await?;
        let mut changed = self.table.subscribe();
        let (mut applied, mut told, mut ending) = (0, None, false);
        loop {
            changed.mark_unchanged();
            let state = FromProxy::State { applied, in_flight: self.table.in_flight() };
            if told.as_ref() != Some(&state) {
                send(&mut writer, &state).await?;
                told = Some(state);
            }
            tokio::select! {
                message = reader.next() => match message? {
                    None => return Ok(()),
                    Some(FromAgent::Routes { sequence, routes }) => {
                        tracing::debug!(sequence, routes = routes.len(), "routes are in force");
                        self.table.replace(routes);
                        self.routed.cancel();
                        applied = sequence;
                    }
                    Some(FromAgent::End { within_ms }) => {
                        *self.drain.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
                            Some(Duration::from_millis(within_ms));
                        self.shutdown.cancel();
                    }
                },
                () = next_change(&mut changed) => {}
                () = self.retiring.cancelled(), if !ending => {
                    ending = true;
                    send(&mut writer, &FromProxy::Ending).await?;
                }
            }
        }
    }
}

/// Waits for a change, and a little longer, so that a busy proxy tells many changes at once.
async fn next_change(changed: &mut tokio::sync::watch::Receiver<u64>) {
    if changed.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(STATE_INTERVAL).await;
}

async fn send<W: tokio::io::AsyncWrite + Unpin>(writer: &mut Writer<W>, message: &FromProxy) -> io::Result<()> {
    timeout(WRITE_DEADLINE, writer.send(message))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the agent does not read"))?
}
