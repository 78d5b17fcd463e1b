//! Serving HTTP/1.1: bounded connections, a deadline for headers, and an end that lets answers finish. The coordinator's
//! HTTP listener and the hosts' proxies share it.

use http::{Request, Response};
use http_body::Body;
use hyper::{body::Incoming, server::conn::http1, service::Service};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use std::{error::Error, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::timeout,
};

/// A client must have sent its headers within this time.
const HEADER_DEADLINE: Duration = Duration::from_secs(30);
/// Pause after an accept that failed, as it does when file descriptors run out.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

type Failure = Box<dyn Error + Send + Sync>;

/// The connections of one listener.
#[derive(Debug)]
pub struct Connections {
    graceful: GracefulShutdown,
    open: JoinSet<()>,
    places: Arc<Semaphore>,
}

impl Connections {
    /// At most `max` at a time; further ones wait in the kernel's queue.
    #[must_use]
    pub fn at_most(max: usize) -> Self {
        Self { graceful: GracefulShutdown::new(), open: JoinSet::new(), places: Arc::new(Semaphore::new(max)) }
    }

    /// Takes connections and answers their requests until `end` comes; the listener stays with its owner, who closes it
    /// before [`Connections::drain`].
    pub async fn accept<S, B>(&mut self, listener: &TcpListener, service: S, end: impl Future<Output = ()>)
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send + 'static,
        S::Error: Into<Failure>,
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Failure>,
    {
        let mut end = std::pin::pin!(end);
        loop {
            while self.open.try_join_next().is_some() {}
            let (stream, place) = tokio::select! {
                () = &mut end => return,
                accepted = accept(listener, &self.places) => accepted,
            };
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_DEADLINE)
                .serve_connection(TokioIo::new(stream), service.clone());
            let connection = self.graceful.watch(connection);
            self.open.spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "a connection ended early");
                }
                drop(place);
            });
        }
    }

    /// Connections that are open.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// Waits until the clients have closed all of them.
    pub async fn closed(&mut self) {
        while self.open.join_next().await.is_some() {}
    }

    /// Lets answers finish for at most `within` and cuts what is left.
    pub async fn drain(mut self, within: Duration) {
        if timeout(within, self.graceful.shutdown()).await.is_err() {
            tracing::warn!(connections = self.open.len(), "the drain's time is over: what is still open is cut");
        }
        self.open.shutdown().await;
    }
}

async fn accept(listener: &TcpListener, places: &Arc<Semaphore>) -> (TcpStream, Option<OwnedSemaphorePermit>) {
    // Never closed, so a place is always given in the end.
    let place = places.clone().acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let _ = stream.set_nodelay(true);
                return (stream, place);
            }
            Err(error) => {
                tracing::warn!(%error, "the HTTP listener can't accept a connection");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}
