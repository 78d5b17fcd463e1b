//! The OpenTelemetry span processor: hands every sampled span that ends to the source's queue.

use crate::queue::Queue;
use opentelemetry::Context;
use opentelemetry_sdk::{
    error::{OTelSdkError, OTelSdkResult},
    trace::{Span, SpanData, SpanProcessor},
};
use std::{sync::Arc, time::Duration};

/// Numbers spans and queues them for the spool. Costs traced code one short lock.
#[derive(Debug)]
pub struct Numbering {
    queue: Arc<Queue>,
}

impl Numbering {
    pub(crate) fn new(queue: Arc<Queue>) -> Self {
        Self { queue }
    }
}

impl SpanProcessor for Numbering {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if span.span_context.is_sampled() {
            self.queue.push(span);
        }
    }

    /// Waits until what has ended by now is in the spool, not until it is exported.
    fn force_flush(&self) -> OTelSdkResult {
        self.flush(Duration::from_secs(5))
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        let flushed = self.flush(timeout);
        self.queue.close();
        flushed
    }
}

impl Numbering {
    fn flush(&self, timeout: Duration) -> OTelSdkResult {
        if self.queue.flush(timeout) { Ok(()) } else { Err(OTelSdkError::Timeout(timeout)) }
    }
}
