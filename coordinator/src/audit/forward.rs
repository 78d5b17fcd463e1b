//! The client of the trace backend.

use super::settings::{Headers, Settings};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, trace_service_client::TraceServiceClient,
};
use std::time::Duration;
use tonic::{Code, Request, Status, codec::CompressionEncoding, transport::Channel};
use tonic_types::{ErrorDetails, StatusExt as _};

/// When a source is to try again after an error that may soon be over.
pub(super) const RETRY_SOON: Duration = Duration::from_secs(1);
/// When a source is to try again after an error that somebody has to mend.
const RETRY_LATER: Duration = Duration::from_secs(10);

/// The backend.
#[derive(Debug, Clone)]
pub(super) struct Forward {
    client: TraceServiceClient<Channel>,
    headers: Headers,
    timeout: Duration,
}

impl Forward {
    /// The backend that the settings name, if they name one. Connects when it is first used, and again after a failure.
    pub fn new(settings: Settings) -> Option<Self> {
        let channel = drover_proto::transport::endpoint(settings.endpoint?).connect_lazy();
        let mut client = TraceServiceClient::new(channel);
        if settings.gzip {
            client = client.send_compressed(CompressionEncoding::Gzip);
        }
        Some(Self { client, headers: settings.headers, timeout: settings.timeout })
    }

    /// Hands over a batch. The error is what the source is to be told.
    pub async fn send(&self, batch: ExportTraceServiceRequest) -> Result<ExportTracePartialSuccess, Status> {
        let mut request = Request::new(batch);
        for (key, value) in &self.headers {
            request.metadata_mut().insert(key.clone(), value.clone());
        }
        match tokio::time::timeout(self.timeout, self.client.clone().export(request)).await {
            Ok(Ok(response)) => Ok(response.into_inner().partial_success.unwrap_or_default()),
            Ok(Err(status)) => Err(for_source(&status)),
            Err(_) => {
                let message = format!("the trace backend did not answer within {:?}", self.timeout);
                Err(push_back(message, RETRY_SOON))
            }
        }
    }
}

/// UNAVAILABLE, with the time after which the source may try again.
pub(super) fn push_back(message: impl Into<String>, after: Duration) -> Status {
    Status::with_error_details(Code::Unavailable, message, ErrorDetails::with_retry_info(Some(after)))
}

/// PURE: what a source is told when the backend answers with an error. A batch that is itself at fault is refused for good;
/// everything else waits at the source, however long it takes to mend.
fn for_source(status: &Status) -> Status {
    let message = format!("the trace backend said {}: {}", status.code(), status.message());
    let asked = status.get_details_retry_info().and_then(|info| info.retry_delay);
    match status.code() {
        Code::InvalidArgument => Status::invalid_argument(message),
        // Those that OTLP calls worth another attempt, and what tonic makes of a connection that broke.
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss
        | Code::ResourceExhausted
        | Code::Unknown => push_back(message, asked.unwrap_or(RETRY_SOON)),
        _ => push_back(message, asked.unwrap_or(RETRY_LATER)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_batch_at_fault_is_refused_for_good() {
        let after = |status: &Status| for_source(status).get_details_retry_info().unwrap().retry_delay;
        assert_eq!(for_source(&Status::invalid_argument("x")).code(), Code::InvalidArgument);
        for code in [Code::Unavailable, Code::Unauthenticated, Code::Unimplemented, Code::Internal, Code::Unknown] {
            assert_eq!(for_source(&Status::new(code, "x")).code(), Code::Unavailable, "{code:?}");
        }
        assert_eq!(after(&Status::unavailable("x")), Some(RETRY_SOON));
        assert_eq!(after(&Status::unauthenticated("x")), Some(RETRY_LATER));
        assert_eq!(after(&push_back("x", Duration::from_secs(7))), Some(Duration::from_secs(7)));
    }
}
