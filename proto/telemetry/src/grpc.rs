//! Exports to a coordinator's OTLP service.

use crate::sink::{ExportError, Sink};
use async_trait::async_trait;
use drover_proto::transport::{Connection, Target};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse, trace_service_client::TraceServiceClient,
};
use tokio::sync::Mutex;

/// Sends batches to the first coordinator that answers; after a failure to the next of the list.
#[derive(Debug)]
pub struct GrpcSink {
    target: Target,
    connection: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    client: Option<TraceServiceClient<Connection>>,
    /// Number of the address to begin with.
    first: usize,
}

impl GrpcSink {
    /// A sink for these coordinators; it connects when there is something to send.
    #[must_use]
    pub fn new(target: Target) -> Self {
        Self { target, connection: Mutex::new(State::default()) }
    }
}

#[async_trait]
impl Sink for GrpcSink {
    async fn export(&self, batch: ExportTraceServiceRequest) -> Result<(), ExportError> {
        let mut state = self.connection.lock().await;
        let mut client = match state.client.take() {
            Some(client) => client,
            None => match self.target.connect(state.first).await {
                Ok(connection) => TraceServiceClient::new(connection),
                Err(error) => return Err(ExportError::Retry { message: error.to_string(), after: None }),
            },
        };
        // The client is put back only after an answer: a call that the caller gave up waiting for takes its connection along.
        let first = state.first;
        state.first = first.wrapping_add(1) % self.target.len();
        match client.export(batch).await {
            Ok(response) => {
                *state = State { client: Some(client), first };
                read(response.into_inner())
            }
            Err(status) => {
                let error = ExportError::of_status(&status);
                if !matches!(error, ExportError::Retry { after: None, .. }) {
                    *state = State { client: Some(client), first };
                }
                Err(error)
            }
        }
    }
}

/// Reads an answer of OTLP.
fn read(response: ExportTraceServiceResponse) -> Result<(), ExportError> {
    match response.partial_success {
        Some(partial) if partial.rejected_spans > 0 => Err(ExportError::Partial {
            rejected: partial.rejected_spans.unsigned_abs(),
            message: partial.error_message,
        }),
        _ => Ok(()),
    }
}
