//! Where batches go: the receiving side of the exporter.

use async_trait::async_trait;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Takes batches of spans. A batch holds the spans of one epoch and is the same, byte for byte, each time it is sent.
#[async_trait]
pub trait Sink: Send + Sync + 'static {
    /// Takes a batch. `Ok` means that it need not be kept any longer.
    async fn export(&self, batch: ExportTraceServiceRequest) -> Result<(), ExportError>;
}

/// Why a batch was not taken, or not wholly.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// Not now; it is sent again.
    #[error("spans are not taken for now: {message}")]
    Retry {
        /// What the receiver said.
        message: String,
        /// Not before this time has passed, if it said so.
        after: Option<Duration>,
    },
    /// The batch can never be taken; its spans are given up.
    #[error("spans were refused for good: {message}")]
    Refused {
        /// What the receiver said.
        message: String,
    },
    /// The batch was taken, but for some spans. It is not known which; they are counted, and nothing is sent again.
    #[error("{rejected} spans of a batch were rejected: {message}")]
    Partial {
        /// How many.
        rejected: u64,
        /// What the receiver said.
        message: String,
    },
}

impl ExportError {
    /// Reads a status of OTLP over gRPC. Only INVALID_ARGUMENT says that the batch itself is at fault; everything else
    /// (a wrong address or secret, too) is worth another attempt, since the spool keeps the spans meanwhile.
    #[must_use]
    pub fn of_status(status: &Status) -> Self {
        let message = format!("{}: {}", status.code(), status.message());
        if status.code() == Code::InvalidArgument {
            return Self::Refused { message };
        }
        let after = status.get_details_retry_info().and_then(|info| info.retry_delay);
        Self::Retry { message, after }
    }
}
