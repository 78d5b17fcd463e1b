//! One trace from `apply` to the last replica ready, across coordinator and agent; one from a request to its last token.

use bytes::Bytes;
use drover_proto::v1::ApplyDeploymentRequest;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    collector::{Collector, Received},
    gateway::Gateway,
};
use http_body_util::BodyExt as _;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use tonic::Request;

const APPLY: &str = "0af7651916cd43dd8448eb211c80319c";
const CHAT: &str = "1bf7651916cd43dd8448eb211c80319d";

fn of<'a>(spans: &'a [Received], trace: &str, name: &str) -> Vec<&'a Received> {
    spans.iter().filter(|s| s.trace_id() == trace && s.span.name == name).collect()
}

/// The starts that came to be ready; a node that lost the race for an offer says so in `outcome`.
fn starts(spans: &[Received]) -> Vec<&Received> {
    of(spans, APPLY, "instance.start").into_iter().filter(|s| s.attribute("outcome").is_none()).collect()
}

/// Every span of the trace hangs on another of it, or on the caller's.
fn is_one_tree(spans: &[Received], trace: &str, caller: &[u8]) -> bool {
    let members: Vec<_> = spans.iter().filter(|s| s.trace_id() == trace).collect();
    let ids: BTreeSet<&[u8]> = members.iter().map(|s| s.span.span_id.as_slice()).collect();
    !members.is_empty()
        && members.iter().all(|s| s.span.parent_span_id == caller || ids.contains(s.span.parent_span_id.as_slice()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trace_tells_an_apply_and_one_a_request() -> anyhow::Result<()> {
    let collector = Collector::start().await?;
    let plan = Plan {
        coordinators: 2,
        agents: 2,
        coordinator_environment: vec![("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), collector.endpoint())],
        ..Plan::default()
    };
    let cluster = Cluster::start(plan).await?;
    let caller = hex("b7ad6b7169203331");
    let mut request = Request::new(ApplyDeploymentRequest { spec: Some(cluster.spec("tiny", 2)), generation: 0 });
    request.metadata_mut().insert("traceparent", format!("00-{APPLY}-b7ad6b7169203331-01").parse()?);
    cluster.client(0).await?.apply_deployment(request).await?;
    let instances = cluster.ready("tiny", 2).await?;

    let spans = collector
        .wait_for(|spans| starts(spans).len() == 2 && is_one_tree(spans, APPLY, &caller), SOON)
        .await
        .inspect_err(|_| eprintln!("{:#?}", names(&collector.spans())))?;
    let services: BTreeSet<&str> = spans.iter().filter(|s| s.trace_id() == APPLY).map(Received::service).collect();
    assert!(services.is_superset(&BTreeSet::from(["drover-agent", "drover-coordinator"])), "{services:?}");
    for start in of(&spans, APPLY, "instance.start") {
        assert_eq!(start.attribute("error"), None, "a lost race is no error");
        assert!(start.attribute("outcome").is_none_or(|outcome| outcome.starts_with("lost: ")), "{start:?}");
    }
    assert_eq!(of(&spans, APPLY, "fleet.apply_deployment").len(), 1);
    assert_eq!(of(&spans, APPLY, "plan.commit").len(), 2);
    let started: BTreeSet<_> = starts(&spans).iter().filter_map(|s| s.attribute("instance")).collect();
    assert_eq!(started, instances.iter().map(|i| i.id.clone()).collect());

    let gateway = Gateway::new(&cluster.coordinators[1].http);
    let body = json!({
        "model": "tiny", "stream": true, "max_tokens": 20, "messages": [{ "role": "user", "content": "Hello" }],
    });
    let traceparent = format!("00-{CHAT}-b7ad6b7169203331-01");
    let headers = [("traceparent", traceparent.as_str())];
    let answer = gateway.post_raw("/v1/chat/completions", &headers, Bytes::from(body.to_string())).await?;
    answer.into_body().collect().await?;
    let spans = collector
        .wait_for(|spans| !of(spans, CHAT, "gateway.request").is_empty(), SOON)
        .await
        .inspect_err(|_| eprintln!("{:#?}", names(&collector.spans())))?;
    let span = of(&spans, CHAT, "gateway.request")[0];
    assert_eq!(span.span.parent_span_id, caller);
    assert_eq!(span.attribute("llama.timings.predicted_n").as_deref(), Some("20"), "{:?}", span.span.attributes);
    assert!(span.attribute("llama.timings.prompt_ms").is_some(), "{:?}", span.span.attributes);
    assert_eq!(span.attribute("model").as_deref(), Some("tiny"));

    cluster.delete("tiny").await?;
    cluster.end().await?;
    every_number_arrived(&collector.spans());
    Ok(())
}

/// Nothing was dropped unnoticed: of each epoch, every number up to the highest arrived, each once.
fn every_number_arrived(spans: &[Received]) {
    let mut epochs: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for span in spans {
        epochs.entry(span.epoch()).or_default().push(span.sequence());
    }
    for (epoch, mut numbers) in epochs {
        numbers.sort_unstable();
        let expected: Vec<u64> = (1..=numbers.len() as u64).collect();
        assert_eq!(numbers, expected, "epoch {epoch}");
    }
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

fn names(spans: &[Received]) -> Vec<String> {
    spans.iter().map(|s| format!("{} {} {}", s.trace_id(), s.service(), s.span.name)).collect()
}
