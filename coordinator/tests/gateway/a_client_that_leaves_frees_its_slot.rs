use crate::support::*;
use std::time::{Duration, Instant};

#[tokio::test]
async fn a_client_that_leaves_its_stream_frees_the_slot_at_once() {
    let (bench, llama) = Bench::start().await.with_llama(&[]).await;
    // As long as the context allows: minutes, undisturbed.
    let mut response = call(chat(&bench, true, 32_000)).await;
    piece(&mut response).await;
    assert_eq!(llama.busy_slots().await, 1);
    let left = Instant::now();
    drop(response);
    until("the slot is idle", async || llama.busy_slots().await == 0).await;
    assert!(left.elapsed() < Duration::from_secs(2), "{:?}", left.elapsed());
    until("the place is free", async || bench.gateway.counts().in_flight == 0).await;
    until("nothing is in flight at the proxy", async || bench.proxy.in_flight("tiny-222222") == 0).await;
    assert_eq!(bench.gateway.counts().abandoned, 1);
}

/// What the gateway can do while no answer has begun. Whether it frees the slot is up to llama-server: some builds look
/// for a closed connection only when they have something to send (llama.cpp issue 24496).
#[tokio::test]
async fn a_client_that_leaves_before_the_answer_closes_the_connection_to_the_server() {
    let (bench, upstream) = Bench::start().await.with_upstream().await;
    for stream in [true, false] {
        let calling = tokio::spawn(call(chat(&bench, stream, 1)));
        let arrived = upstream.request().await;
        assert_eq!(bench.gateway.counts().in_flight, 1);
        calling.abort();
        arrived.closed().await;
        until("the place is free", async || bench.gateway.counts().in_flight == 0).await;
        until("nothing is in flight at the proxy", async || bench.proxy.in_flight("tiny-222222") == 0).await;
    }
}
