//! The coordinators as the link reaches them: over connections ([`Target`]), or over whatever a simulation puts in their
//! place. Must never: retry, or choose between coordinators beyond asking for one to begin with.

use async_trait::async_trait;
use drover_proto::{
    limits,
    transport::{Connection, Target},
    v1::{
        ClaimManyRequest, ClaimManyResponse, ClaimRequest, ClaimResponse, HeartbeatsRequest, HeartbeatsResponse,
        SessionRequest, SessionResponse, node_service_client::NodeServiceClient,
    },
};
use futures::{Stream, TryStreamExt as _};
use std::{fmt, pin::Pin, time::Duration};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

/// What a coordinator says on a stream: a session's, or one of heartbeats.
pub struct Incoming<T = SessionResponse>(Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>);

impl<T> Incoming<T> {
    /// What comes out of this stream.
    #[must_use]
    pub fn new(stream: impl Stream<Item = Result<T, Status>> + Send + 'static) -> Self {
        Self(Box::pin(stream))
    }

    /// The next message; `None` at the stream's orderly end.
    pub async fn message(&mut self) -> Result<Option<T>, Status> {
        self.0.try_next().await
    }
}

impl<T> fmt::Debug for Incoming<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").finish_non_exhaustive()
    }
}

/// The coordinators that this node is configured with.
#[async_trait]
pub trait Coordinators: fmt::Debug + Send + Sync {
    /// How many there are; at least one.
    fn count(&self) -> usize;
    /// Connects to the first of them that answers, beginning with number `first`; says which.
    async fn connect(&self, first: usize) -> anyhow::Result<(usize, Box<dyn Coordinator>)>;
}

/// A connection to one of them.
#[async_trait]
pub trait Coordinator: fmt::Debug + Send {
    /// Opens the stream of a session. The first of `requests` is the hello.
    async fn session(&mut self, requests: mpsc::Receiver<SessionRequest>) -> Result<Incoming, Status>;
    /// Opens a stream of heartbeats for a session whose stream it serves. Unimplemented by older ones.
    async fn heartbeats(
        &mut self,
        _requests: mpsc::Receiver<HeartbeatsRequest>,
    ) -> Result<Incoming<HeartbeatsResponse>, Status> {
        Err(Status::unimplemented("heartbeats go over the session's stream"))
    }
    /// Makes one claim; the coordinator is told how long its answer is worth waiting for.
    async fn claim(&mut self, request: ClaimRequest, within: Duration) -> Result<ClaimResponse, Status>;
    /// Makes several claims.
    async fn claim_many(&mut self, request: ClaimManyRequest, within: Duration) -> Result<ClaimManyResponse, Status>;
}

#[async_trait]
impl Coordinators for Target {
    fn count(&self) -> usize {
        self.len()
    }

    async fn connect(&self, first: usize) -> anyhow::Result<(usize, Box<dyn Coordinator>)> {
        let (at, connection) = self.connect_from(first).await?;
        let client = NodeServiceClient::new(connection)
            .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
            .max_encoding_message_size(limits::MESSAGE_BYTES_MAX);
        Ok((at, Box::new(client)))
    }
}

#[async_trait]
impl Coordinator for NodeServiceClient<Connection> {
    async fn session(&mut self, requests: mpsc::Receiver<SessionRequest>) -> Result<Incoming, Status> {
        Ok(Incoming::new(self.session(ReceiverStream::new(requests)).await?.into_inner()))
    }

    async fn heartbeats(
        &mut self,
        requests: mpsc::Receiver<HeartbeatsRequest>,
    ) -> Result<Incoming<HeartbeatsResponse>, Status> {
        Ok(Incoming::new(self.heartbeats(ReceiverStream::new(requests)).await?.into_inner()))
    }

    async fn claim(&mut self, request: ClaimRequest, within: Duration) -> Result<ClaimResponse, Status> {
        Ok(self.claim(timed(request, within)).await?.into_inner())
    }

    async fn claim_many(&mut self, request: ClaimManyRequest, within: Duration) -> Result<ClaimManyResponse, Status> {
        Ok(self.claim_many(timed(request, within)).await?.into_inner())
    }
}

fn timed<T>(request: T, within: Duration) -> Request<T> {
    let mut request = Request::new(request);
    request.set_timeout(within);
    request
}
