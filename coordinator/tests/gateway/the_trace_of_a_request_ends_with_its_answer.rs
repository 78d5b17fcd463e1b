use crate::support::*;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::{
    error::OTelSdkResult,
    trace::{SdkTracerProvider, SpanData, SpanExporter},
};
use std::sync::{Arc, Mutex};
use tracing_subscriber::layer::SubscriberExt as _;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// Keeps the spans that have ended.
#[derive(Debug, Clone, Default)]
struct Ended(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Ended {
    async fn export(&self, spans: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().unwrap().extend(spans);
        Ok(())
    }
}

impl Ended {
    /// Attributes of the gateway's spans that have ended, as texts.
    fn requests(&self) -> Vec<std::collections::BTreeMap<String, String>> {
        let spans = self.0.lock().unwrap();
        let requests = spans.iter().filter(|span| span.name == "gateway.request");
        requests
            .map(|span| {
                let own = [
                    ("trace".to_owned(), span.span_context.trace_id().to_string()),
                    ("parent".to_owned(), span.parent_span_id.to_string()),
                    ("failed".to_owned(), format!("{:?}", span.status)),
                ];
                let attributes = span.attributes.iter().map(|a| (a.key.to_string(), a.value.to_string()));
                own.into_iter().chain(attributes).collect()
            })
            .collect()
    }

    async fn request(&self) -> std::collections::BTreeMap<String, String> {
        until("the span has ended", async || !self.requests().is_empty()).await;
        let request = self.requests().remove(0);
        self.0.lock().unwrap().clear();
        request
    }
}

/// Traces whatever this thread does; tests of this kind run on one thread.
fn traced() -> (Ended, tracing::subscriber::DefaultGuard) {
    let ended = Ended::default();
    let tracer = SdkTracerProvider::builder().with_simple_exporter(ended.clone()).build().tracer("test");
    let filter = tracing_subscriber::filter::filter_fn(|metadata| metadata.target().starts_with("drover"));
    let layer = tracing_subscriber::Layer::with_filter(tracing_opentelemetry::layer().with_tracer(tracer), filter);
    (ended, tracing::subscriber::set_default(tracing_subscriber::registry().with(layer)))
}

#[tokio::test]
async fn a_trace_goes_on_from_the_client_and_holds_the_servers_own_timings() {
    let (ended, _guard) = traced();
    let (bench, _llama) = Bench::start().await.with_llama(&[]).await;
    for stream in [true, false] {
        let mut request = chat(&bench, stream, 5);
        let parent = format!("00-{TRACE}-b7ad6b7169203331-01");
        request.headers_mut().insert("traceparent", parent.parse().unwrap());
        let body = text(call(request).await).await;
        let span = ended.request().await;
        let expected = [
            ("trace", TRACE.to_owned()),
            ("parent", "b7ad6b7169203331".to_owned()),
            ("model", "tiny".to_owned()),
            ("instance", "tiny-222222".to_owned()),
            ("node", "a".to_owned()),
            ("attempts", "1".to_owned()),
            ("status", "200".to_owned()),
            ("stream", stream.to_string()),
            ("bytes", body.len().to_string()),
            ("outcome", "complete".to_owned()),
            ("llama.timings.predicted_n", "5".to_owned()),
            ("failed", "Unset".to_owned()),
        ];
        for (name, value) in expected {
            assert_eq!(span.get(name), Some(&value), "{name}: {span:?}");
        }
        for name in ["llama.timings.prompt_n", "llama.timings.prompt_ms", "llama.timings.predicted_ms"] {
            assert!(span[name].parse::<f64>().unwrap() > 0.0, "{name}: {span:?}");
        }
    }
}

#[tokio::test]
async fn a_span_ends_with_its_answer_and_not_before_and_is_known_downstream() {
    let (ended, _guard) = traced();
    let (bench, upstream) = Bench::start().await.with_upstream().await;
    let calling = tokio::spawn(call(chat(&bench, true, 1)));
    let mut arrived = upstream.request().await;
    let handed_on = arrived.head.lines().find_map(|line| line.strip_prefix("traceparent: ")).unwrap().to_owned();
    arrived.begin().await;
    arrived.chunk("data: {\"n\":1}\n\n").await;
    let mut response = calling.await.unwrap();
    piece(&mut response).await;
    assert!(ended.requests().is_empty(), "it lasts as long as its answer");
    drop(response);
    let span = ended.request().await;
    assert_eq!(span["outcome"], "abandoned");
    assert!(handed_on.contains(&span["trace"]), "{handed_on}: {span:?}");

    // Broken, and refused.
    let calling = tokio::spawn(call(chat(&bench, true, 1)));
    let mut arrived = upstream.request().await;
    arrived.begin().await;
    arrived.chunk("data: {\"n\":1}\n\n").await;
    let mut response = calling.await.unwrap();
    piece(&mut response).await;
    drop(arrived);
    text(response).await;
    let span = ended.request().await;
    assert_eq!(span["outcome"], "broken");
    assert!(span["failed"].contains("broke off"), "{span:?}");
    text(call(post(&bench.url("/v1/completions"), "{\"model\":\"nope\"}")).await).await;
    let span = ended.request().await;
    assert_eq!((span["status"].as_str(), span["model"].as_str()), ("404", "nope"));
    assert!(span["failed"].contains("does not exist"), "{span:?}");
}
