//! The span audit: takes spans from every program, hands them to the trace backend, and counts what became of them.
//!
//! Owns: the OTLP service ([`ingest`]), the client of the backend ([`forward`]) and the counts for each epoch
//! ([`epochs`]). Holds no spans: a batch is acknowledged when the backend has taken it, and pushed back otherwise, so that it
//! waits on disk at its source. Must never: make spans of its own work, which would be exported through it again.

mod epochs;
mod forward;
mod ingest;
mod settings;
#[cfg(test)]
mod tests;

pub use epochs::{Counts, Epoch};
pub use ingest::Ingest;
pub use settings::Settings;

use async_trait::async_trait;
use drover_proto::v1::SpanCheckpoint;
use drover_telemetry::{ExportError, Sink};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, trace_service_server::TraceServiceServer,
};
use std::sync::Arc;
use tonic::codec::CompressionEncoding;

/// The audit; a cheap handle.
#[derive(Debug, Clone)]
pub struct Audit {
    ingest: Ingest,
}

impl Audit {
    /// An audit that forwards as the settings say. Must be called within a tokio runtime; connects when there is something
    /// to forward.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { ingest: Ingest::new(settings) }
    }

    /// The OTLP service to add to the gRPC server.
    #[must_use]
    pub fn service(&self) -> TraceServiceServer<Ingest> {
        TraceServiceServer::new(self.ingest.clone())
            .accept_compressed(CompressionEncoding::Gzip)
            .max_decoding_message_size(drover_proto::limits::MESSAGE_BYTES_MAX)
    }

    /// Where the coordinator's own spans go: the same way as everybody's, without a connection.
    #[must_use]
    pub fn local_sink(&self) -> Arc<dyn Sink> {
        Arc::new(Local(self.ingest.clone()))
    }

    /// Records what a node says of its span source.
    pub fn checkpoint(&self, node: &str, checkpoint: SpanCheckpoint) {
        self.ingest.epochs().checkpoint(node, checkpoint);
    }

    /// Totals.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.ingest.epochs().counts()
    }

    /// What is known of each epoch, the most recently heard of first.
    #[must_use]
    pub fn epochs(&self) -> Vec<Epoch> {
        self.ingest.epochs().list()
    }

    /// Whether a trace backend is configured. Without one, acknowledged means no more than received.
    #[must_use]
    pub fn forwards(&self) -> bool {
        self.ingest.forwards()
    }
}

struct Local(Ingest);

#[async_trait]
impl Sink for Local {
    async fn export(&self, batch: ExportTraceServiceRequest) -> Result<(), ExportError> {
        match self.0.take(batch).await {
            Ok(partial) if partial.rejected_spans > 0 => Err(ExportError::Partial {
                rejected: partial.rejected_spans.unsigned_abs(),
                message: partial.error_message,
            }),
            Ok(_) => Ok(()),
            Err(status) => Err(ExportError::of_status(&status)),
        }
    }
}
