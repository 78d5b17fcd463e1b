//! `NodeService`: for agents only; the node's name is that of the connection.

use crate::control::{
    claims::{self, Claims},
    sessions::Sessions,
    store_status,
};
use drover_proto::{
    ids,
    status::{invalid_field, reason, with_reason},
    transport::Peer,
    v1::{self, node_service_server::NodeService},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

/// The service.
#[derive(Debug, Clone)]
pub struct Node {
    sessions: Sessions,
    claims: Claims,
}

impl Node {
    /// The service over these parts.
    #[must_use]
    pub fn new(sessions: Sessions, claims: Claims) -> Self {
        Self { sessions, claims }
    }
}

#[tonic::async_trait]
impl NodeService for Node {
    type SessionStream = ReceiverStream<Result<v1::SessionResponse, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let node = Peer::node_of(&request)?;
        Ok(Response::new(self.sessions.serve(node, request.into_inner()).await?))
    }

    type HeartbeatsStream = ReceiverStream<Result<v1::HeartbeatsResponse, Status>>;

    async fn heartbeats(
        &self,
        request: Request<Streaming<v1::HeartbeatsRequest>>,
    ) -> Result<Response<Self::HeartbeatsStream>, Status> {
        let node = Peer::node_of(&request)?;
        Ok(Response::new(self.sessions.heartbeats(&node, request.into_inner()).await?))
    }

    async fn claim(&self, request: Request<v1::ClaimRequest>) -> Result<Response<v1::ClaimResponse>, Status> {
        let node = Peer::node_of(&request)?;
        let traceparent = drover_telemetry::context::extract_metadata(request.metadata());
        let request = request.into_inner();
        ids::check_instance_id(&request.instance).map_err(|e| invalid_field("instance", e.to_string()))?;
        self.claims.claim(&node, &request, &traceparent).await.map(Response::new).map_err(status_of)
    }

    async fn claim_many(
        &self,
        request: Request<v1::ClaimManyRequest>,
    ) -> Result<Response<v1::ClaimManyResponse>, Status> {
        let node = Peer::node_of(&request)?;
        let request = request.into_inner();
        for (n, item) in request.claims.iter().enumerate() {
            ids::check_instance_id(&item.instance)
                .map_err(|e| invalid_field(&format!("claims[{n}].instance"), e.to_string()))?;
        }
        self.claims.claim_many(&node, &request).await.map(Response::new).map_err(status_of)
    }
}

fn status_of(error: claims::Error) -> Status {
    match error {
        claims::Error::Refused { reason: why, message } if why == reason::INVALID_FIELD => {
            with_reason(Code::InvalidArgument, reason::INVALID_FIELD, message)
        }
        claims::Error::Refused { reason, message } => with_reason(Code::FailedPrecondition, &reason, message),
        claims::Error::Behind(behind) => with_reason(Code::Unavailable, reason::STORE_UNAVAILABLE, behind.to_string()),
        claims::Error::Store(error) => store_status(error),
    }
}
