use crate::support::*;
use std::sync::Arc;

#[tokio::test]
async fn health_is_of_the_process_and_readiness_of_what_it_needs() {
    for ready in [true, false] {
        let bench = Bench::start_with(Options { ready, ..Options::default() }).await;
        assert_eq!(call(get(&bench.url("/healthz"))).await.status(), 200);
        let response = call(get(&bench.url("/readyz"))).await;
        assert_eq!(response.status(), if ready { 200 } else { 503 });
        let said = json(response).await;
        assert_eq!(said["ready"], ready);
        let reason = "the store is out of reach since 12 s: it does not answer";
        assert_eq!(said["reason"].as_str(), (!ready).then_some(reason));
        let page = text(call(get(&bench.url("/metrics"))).await).await;
        for line in [
            format!("drover_store_reachable {}", u8::from(ready)),
            format!("drover_store_lost_seconds {}", if ready { 0 } else { 12 }),
        ] {
            assert!(page.lines().any(|l| l == line), "{line}\n{page}");
        }
    }
}

#[tokio::test]
async fn a_gateway_is_ready_as_long_as_it_knows_routes_whatever_becomes_of_the_store() {
    let bench = Bench::start_with(Options { ready: false, ..Options::default() }).await;
    let ready = async || {
        let response = call(get(&bench.url("/readyz/gateway"))).await;
        (response.status().as_u16(), json(response).await["lost_ms"].as_u64())
    };
    assert_eq!(ready().await.0, 503, "it has never read the store");
    bench.snapshots.send_modify(|snapshot| Arc::make_mut(snapshot).revision = 7);
    assert_eq!(ready().await, (200, Some(12_000)));
}

#[tokio::test]
async fn metrics_count_what_happened_and_what_there_is() {
    let (bench, upstream) = Bench::start().await.with_upstream().await;
    let calling = tokio::spawn(call(chat(&bench, false, 1)));
    upstream.request().await.answer("{}").await;
    text(calling.await.unwrap()).await;
    call(post(&bench.url("/v1/completions"), "nonsense")).await;
    let calling = tokio::spawn(call(chat(&bench, false, 1)));
    let _held = upstream.request().await;
    let response = call(get(&bench.url("/metrics"))).await;
    assert!(header(&response, "content-type").starts_with("application/openmetrics-text"));
    let page = text(response).await;
    for line in [
        "drover_gateway_requests_total{code=\"2xx\"} 1",
        "drover_gateway_requests_total{code=\"4xx\"} 1",
        "drover_gateway_requests_total{code=\"5xx\"} 0",
        "drover_gateway_in_flight 1",
        "drover_deployments 1",
        "drover_instances{state=\"ready\"} 1",
        "drover_instances{state=\"failed\"} 0",
        "drover_sessions 0",
        "drover_nodes_seen 1",
        "drover_nodes_lost 1",
        "drover_frozen 1",
        "drover_spans_received_total 7",
        "drover_invariant_violations_total{rule=\"SecondClaim\"} 2",
        "drover_invariant_violations_total{rule=\"StaleEffect\"} 0",
    ] {
        assert!(page.lines().any(|l| l == line), "{line}\n{page}");
    }
    calling.abort();
    assert_eq!(call(get(&bench.url("/unknown"))).await.status(), 404);
}
