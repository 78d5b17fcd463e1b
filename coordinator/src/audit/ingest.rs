//! The OTLP service: takes batches from agents, from the coordinator itself and from anybody admitted.

use super::{
    epochs::{Epochs, Fate, Share},
    forward::{Forward, RETRY_SOON, push_back},
    settings::Settings,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::TraceService,
};
use std::sync::Arc;
use tokio::sync::Semaphore;
use tonic::{Code, Request, Response, Status};

/// Most batches that are worked on at once; further ones are pushed back. Bounds the memory of batches to this times the
/// largest message.
const IN_FLIGHT_MAX: usize = 32;

/// The service; a cheap handle.
#[derive(Debug, Clone)]
pub struct Ingest(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    epochs: Epochs,
    forward: Option<Forward>,
    in_flight: Semaphore,
}

impl Ingest {
    pub(super) fn new(settings: Settings) -> Self {
        let in_flight = Semaphore::new(IN_FLIGHT_MAX);
        Self(Arc::new(Inner { epochs: Epochs::default(), forward: Forward::new(settings), in_flight }))
    }

    pub(super) fn epochs(&self) -> &Epochs {
        &self.0.epochs
    }

    pub(super) fn forwards(&self) -> bool {
        self.0.forward.is_some()
    }

    /// Takes a batch: acknowledged when the backend has taken it, or, where there is none, when it was counted.
    pub(super) async fn take(&self, batch: ExportTraceServiceRequest) -> Result<ExportTracePartialSuccess, Status> {
        let share = Share::of(&batch);
        let answer = self.pass_on(batch).await;
        let fate = match &answer {
            Ok(partial) => Fate::Accepted { rejected: u64::try_from(partial.rejected_spans).unwrap_or(0) },
            Err(status) if status.code() == Code::InvalidArgument => Fate::Refused,
            Err(_) => Fate::PushedBack,
        };
        self.0.epochs.record(&share, fate);
        answer
    }

    async fn pass_on(&self, batch: ExportTraceServiceRequest) -> Result<ExportTracePartialSuccess, Status> {
        let Some(forward) = &self.0.forward else { return Ok(ExportTracePartialSuccess::default()) };
        let Ok(_place) = self.0.in_flight.try_acquire() else {
            return Err(push_back("too many batches of spans at once", RETRY_SOON));
        };
        forward.send(batch).await
    }
}

#[tonic::async_trait]
impl TraceService for Ingest {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let partial = self.take(request.into_inner()).await?;
        let empty = partial.rejected_spans == 0 && partial.error_message.is_empty();
        Ok(Response::new(ExportTraceServiceResponse { partial_success: (!empty).then_some(partial) }))
    }
}
