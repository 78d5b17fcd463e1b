//! W3C trace context: how a trace goes on across records, messages and calls, as the text of a `traceparent`.
//!
//! An empty text means "no trace". What peers send is never trusted to be well-formed: anything else than the form of
//! <https://www.w3.org/TR/trace-context/> counts as none. A `tracestate` is not passed on.

use http::{HeaderMap, HeaderValue};
use opentelemetry::{
    Context,
    trace::{SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState},
};
use tonic::metadata::{MetadataMap, MetadataValue};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Name of the header and of the metadata.
pub const TRACEPARENT: &str = "traceparent";

/// The trace context of the current span; empty when there is none.
#[must_use]
pub fn current_traceparent() -> String {
    let of_span = traceparent_of(&tracing::Span::current());
    // The current span may be one that is not traced, within one that is.
    if of_span.is_empty() { format(&Context::current()) } else { of_span }
}

/// The trace context of a span; empty when it is not traced.
#[must_use]
pub fn traceparent_of(span: &tracing::Span) -> String {
    format(&span.context())
}

/// Makes a span part of the trace of `traceparent`. Call it before the span is entered or logs anything: later it has no
/// effect. An empty or malformed text leaves the span as it is.
pub fn set_parent(span: &tracing::Span, traceparent: &str) {
    if let Some(parent) = parse(traceparent) {
        // Fails for a span that is not traced or has begun already: then there is nothing to set.
        let _ = span.set_parent(Context::new().with_remote_span_context(parent));
    }
}

/// Links a span to that of `traceparent`, for work that has more than one cause. Ignores empty and malformed texts.
pub fn add_link(span: &tracing::Span, traceparent: &str) {
    if let Some(other) = parse(traceparent) {
        span.add_link(other);
    }
}

/// The trace id (32 hexadecimal digits) of a `traceparent`, if it is well-formed.
#[must_use]
pub fn trace_id_of(traceparent: &str) -> Option<String> {
    parse(traceparent).map(|context| context.trace_id().to_string())
}

/// Adds the current trace context to the headers of a request, in place of one that is there.
pub fn inject(headers: &mut HeaderMap) {
    headers.remove(TRACEPARENT);
    if let Ok(value) = HeaderValue::try_from(current_traceparent())
        && !value.is_empty()
    {
        headers.insert(TRACEPARENT, value);
    }
}

/// The trace context in the headers of a request; empty when there is none, or none that is well-formed.
#[must_use]
pub fn extract(headers: &HeaderMap) -> String {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let (first, second) = (values.next(), values.next());
    checked(first.filter(|_| second.is_none()).and_then(|value| value.to_str().ok()))
}

/// Adds the current trace context to the metadata of a call, in place of one that is there.
pub fn inject_metadata(metadata: &mut MetadataMap) {
    metadata.remove(TRACEPARENT);
    let current = current_traceparent();
    if let Ok(value) = MetadataValue::try_from(&current)
        && !current.is_empty()
    {
        metadata.insert(TRACEPARENT, value);
    }
}

/// The trace context in the metadata of a call; empty when there is none, or none that is well-formed.
#[must_use]
pub fn extract_metadata(metadata: &MetadataMap) -> String {
    let mut values = metadata.get_all(TRACEPARENT).iter();
    let (first, second) = (values.next(), values.next());
    checked(first.filter(|_| second.is_none()).and_then(|value| value.to_str().ok()))
}

fn checked(text: Option<&str>) -> String {
    text.filter(|text| parse(text).is_some()).unwrap_or_default().to_owned()
}

fn format(context: &Context) -> String {
    let span = context.span();
    let context = span.span_context();
    if !context.is_valid() {
        return String::new();
    }
    let flags = context.trace_flags() & TraceFlags::SAMPLED;
    format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), flags.to_u8())
}

fn parse(text: &str) -> Option<SpanContext> {
    let hex = |range: std::ops::Range<usize>| {
        let digits = text.get(range)?;
        digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')).then_some(digits)
    };
    let version = u8::from_str_radix(hex(0..2)?, 16).ok()?;
    let bytes = text.as_bytes();
    // Later versions may append fields behind another '-'.
    let length = match version {
        0 => bytes.len() == 55,
        255 => false,
        _ => bytes.len() == 55 || bytes.get(55) == Some(&b'-'),
    };
    if !length || [2, 35, 52].iter().any(|&at| bytes[at] != b'-') {
        return None;
    }
    let trace_id = TraceId::from_hex(hex(3..35)?).ok()?;
    let span_id = SpanId::from_hex(hex(36..52)?).ok()?;
    let flags = TraceFlags::new(u8::from_str_radix(hex(53..55)?, 16).ok()?) & TraceFlags::SAMPLED;
    let context = SpanContext::new(trace_id, span_id, flags, true, TraceState::default());
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use proptest::prelude::*;
    use tracing_subscriber::layer::SubscriberExt as _;

    const SAMPLE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn traced<T>(work: impl FnOnce() -> T) -> T {
        let tracer = SdkTracerProvider::builder().build().tracer("test");
        let filter = tracing_subscriber::filter::filter_fn(|m| m.target() != "untraced");
        let layer = tracing_opentelemetry::layer().with_tracer(tracer);
        let layer = tracing_subscriber::Layer::with_filter(layer, filter);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), work)
    }

    #[test]
    fn a_span_goes_on_with_the_trace_it_is_given() {
        traced(|| {
            let span = tracing::info_span!("work");
            set_parent(&span, SAMPLE);
            let _entered = span.enter();
            let current = current_traceparent();
            assert_eq!(trace_id_of(&current), trace_id_of(SAMPLE));
            assert_ne!(current, SAMPLE);
            let inner = tracing::info_span!(target: "untraced", "inner");
            assert_eq!(inner.in_scope(current_traceparent), current);

            let mut headers = HeaderMap::new();
            headers.insert(TRACEPARENT, HeaderValue::from_static("old"));
            inject(&mut headers);
            assert_eq!(extract(&headers), current);
            headers.append(TRACEPARENT, HeaderValue::from_static(SAMPLE));
            assert_eq!(extract(&headers), "");
            let mut metadata = MetadataMap::new();
            inject_metadata(&mut metadata);
            assert_eq!(extract_metadata(&metadata), current);
        });
    }

    #[test]
    fn what_is_not_sampled_stays_so() {
        traced(|| {
            let span = tracing::info_span!("work");
            set_parent(&span, &SAMPLE.replace("-01", "-00"));
            assert!(span.in_scope(current_traceparent).ends_with("-00"));
        });
    }

    #[test]
    fn without_a_trace_there_is_none_and_nothing_is_sent() {
        assert_eq!(current_traceparent(), "");
        let mut headers = HeaderMap::new();
        inject(&mut headers);
        assert!(headers.is_empty());
        set_parent(&tracing::info_span!("work"), SAMPLE);
        traced(|| {
            let span = tracing::info_span!("work");
            set_parent(&span, "nonsense");
            set_parent(&span, "");
            assert_eq!(span.in_scope(current_traceparent).len(), 55);
        });
    }

    #[test]
    fn malformed_contexts_are_none() {
        let zero_trace = "00-00000000000000000000000000000000-b7ad6b7169203331-01";
        let zero_span = "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01";
        let upper = SAMPLE.to_uppercase();
        let longer = format!("{SAMPLE}-00");
        let version_255 = SAMPLE.replacen("00", "ff", 1);
        for bad in
            ["", "00", zero_trace, zero_span, &upper, &longer, &version_255, &SAMPLE[..54], &SAMPLE.replace('-', "_")]
        {
            assert_eq!(trace_id_of(bad), None, "{bad}");
        }
        let later = longer.replacen("00", "01", 1);
        for good in [SAMPLE, &later] {
            assert_eq!(trace_id_of(good).as_deref(), Some("0af7651916cd43dd8448eb211c80319c"), "{good}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,70}", cut in 0usize..56) {
            let _ = trace_id_of(&text);
            if text.is_char_boundary(cut.min(text.len())) {
                let _ = trace_id_of(&format!("{}{}", &SAMPLE[..cut.min(55)], &text[cut.min(text.len())..]));
            }
        }
    }
}
