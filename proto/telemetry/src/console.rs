//! `OTEL_TRACES_EXPORTER=console`: spans as JSON lines on standard output, for when there is no other way to see them.

use crate::sink::{ExportError, Sink};
use async_trait::async_trait;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::Span,
};
use serde_json::{Map, json};
use std::io::Write as _;

/// Prints batches.
#[derive(Debug)]
pub(crate) struct Console;

#[async_trait]
impl Sink for Console {
    async fn export(&self, batch: ExportTraceServiceRequest) -> Result<(), ExportError> {
        let text = lines(&batch);
        let printed = tokio::task::spawn_blocking(move || {
            let mut out = std::io::stdout().lock();
            out.write_all(text.as_bytes()).and_then(|()| out.flush())
        });
        match printed.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(ExportError::Retry { message: format!("standard output: {error}"), after: None }),
            Err(error) => Err(ExportError::Retry { message: error.to_string(), after: None }),
        }
    }
}

fn lines(batch: &ExportTraceServiceRequest) -> String {
    let mut text = String::new();
    for resource in &batch.resource_spans {
        let of = resource.resource.as_ref().map(|r| attributes(&r.attributes)).unwrap_or_default();
        for span in resource.scope_spans.iter().flat_map(|scope| &scope.spans) {
            text.push_str(&line(span, &of).to_string());
            text.push('\n');
        }
    }
    text
}

fn line(span: &Span, resource: &Map<String, serde_json::Value>) -> serde_json::Value {
    let events: Vec<_> = span
        .events
        .iter()
        .map(|e| json!({"name": e.name, "time_unix_nano": e.time_unix_nano, "attributes": attributes(&e.attributes)}))
        .collect();
    json!({
        "name": span.name,
        "trace_id": hex(&span.trace_id),
        "span_id": hex(&span.span_id),
        "parent_span_id": hex(&span.parent_span_id),
        "kind": span.kind,
        "start_time_unix_nano": span.start_time_unix_nano,
        "end_time_unix_nano": span.end_time_unix_nano,
        "status": span.status.as_ref().map(|s| json!({"code": s.code, "message": s.message})),
        "attributes": attributes(&span.attributes),
        "events": events,
        "resource": resource,
    })
}

fn attributes(list: &[KeyValue]) -> Map<String, serde_json::Value> {
    list.iter().map(|a| (a.key.clone(), a.value.as_ref().map_or(serde_json::Value::Null, value))).collect()
}

fn value(of: &AnyValue) -> serde_json::Value {
    match &of.value {
        Some(Value::StringValue(v)) => json!(v),
        Some(Value::BoolValue(v)) => json!(v),
        Some(Value::IntValue(v)) => json!(v),
        Some(Value::DoubleValue(v)) => json!(v),
        Some(Value::ArrayValue(v)) => v.values.iter().map(value).collect(),
        Some(Value::KvlistValue(v)) => serde_json::Value::Object(attributes(&v.values)),
        Some(Value::BytesValue(v)) => json!(hex(v)),
        _ => serde_json::Value::Null,
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans};

    #[test]
    fn each_span_is_one_line_of_json() {
        let name = "two\nlines \"quoted\"".to_owned();
        let sequence = AnyValue { value: Some(Value::IntValue(7)) };
        let attributes =
            vec![KeyValue { key: crate::SEQUENCE_ATTRIBUTE.into(), value: Some(sequence), ..Default::default() }];
        let span = Span { name: name.clone(), trace_id: vec![0xab; 16], attributes, ..Default::default() };
        let scope_spans = vec![ScopeSpans { spans: vec![span.clone(), span], ..Default::default() }];
        let resource = Some(crate::resource::unknown("e"));
        let resource_spans = vec![ResourceSpans { resource, scope_spans, ..Default::default() }];
        let text = lines(&ExportTraceServiceRequest { resource_spans });
        assert_eq!(text.lines().count(), 2);
        let line: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!((line["name"].as_str(), line["trace_id"].as_str()), (Some(&*name), Some(&*"ab".repeat(16))));
        assert_eq!(
            (line["attributes"]["drover.sequence"].as_i64(), &line["resource"]["drover.epoch"]),
            (Some(7), &json!("e"))
        );
    }
}
