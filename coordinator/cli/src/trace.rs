//! The beginning of a trace: a W3C traceparent (<https://www.w3.org/TR/trace-context/>) made for one call.

use tonic::metadata::{Ascii, MetadataValue};

/// Identity of the trace that a call of this command begins. Sampled always: what an operator does is rare and matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trace {
    trace: u128,
    span: u64,
}

impl Trace {
    /// A new one.
    #[must_use]
    pub fn begin() -> Self {
        // Zero is not valid in either place.
        Self { trace: rand::random::<u128>().max(1), span: rand::random::<u64>().max(1) }
    }

    /// The trace's id: 32 hexadecimal digits, what one searches for in Jaeger.
    #[must_use]
    pub fn id(&self) -> String {
        format!("{:032x}", self.trace)
    }

    /// Value of the `traceparent` header.
    #[must_use]
    pub fn parent(&self) -> String {
        format!("00-{:032x}-{:016x}-01", self.trace, self.span)
    }

    /// A request that carries it.
    pub fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        if let Ok(value) = self.parent().parse::<MetadataValue<Ascii>>() {
            request.metadata_mut().insert("traceparent", value);
        }
        request
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_has_the_form_of_the_standard() {
        let trace = Trace { trace: 0xab, span: 1 };
        assert_eq!(trace.parent(), "00-000000000000000000000000000000ab-0000000000000001-01");
        assert_eq!(trace.request(()).metadata().get("traceparent").unwrap(), trace.parent().as_str());
        assert_ne!(Trace::begin().id(), Trace::begin().id());
    }
}
