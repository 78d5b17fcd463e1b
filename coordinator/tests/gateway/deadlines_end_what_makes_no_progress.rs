use crate::support::*;
use drover_coordinator::gateway::Settings;

async fn bench(settings: Settings) -> (Bench, Upstream) {
    Bench::start_with(Options { settings, ..Options::default() }).await.with_upstream().await
}

#[tokio::test]
async fn pings_do_not_keep_a_stalled_stream_alive() {
    let (bench, upstream) = bench(Settings { between_bytes_timeout_ms: 300, ..Settings::default() }).await;
    let calling = tokio::spawn(call(chat(&bench, true, 1)));
    let mut arrived = upstream.request().await;
    arrived.begin().await;
    arrived.chunk("data: {\"n\":1}\n\n").await;
    let response = calling.await.unwrap();
    let pinging = tokio::spawn(async move {
        // Ends when the gateway has closed the connection.
        loop {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            if arrived.try_chunk(": ping\n\n").await.is_err() {
                return;
            }
        }
    });
    let stream = text(response).await;
    let last = events(&stream.replace(": ping\n\n", "")).last().map(|last| (*last).to_owned()).unwrap();
    assert!(stream.contains(": ping"), "pings are passed on");
    assert!(last.contains("upstream_timeout") && last.contains("between_bytes_timeout_ms"), "{last}");
    soon("the server's connection is closed", pinging).await.unwrap();
}

#[tokio::test]
async fn an_answer_that_does_not_begin_is_given_up_and_cancelled() {
    let (bench, upstream) = bench(Settings { first_byte_timeout_ms: 200, ..Settings::default() }).await;
    let calling = tokio::spawn(call(chat(&bench, true, 1)));
    let arrived = upstream.request().await;
    let response = calling.await.unwrap();
    assert_eq!(response.status(), 504);
    assert!(text(response).await.contains("first_byte_timeout_ms"));
    arrived.closed().await;
    assert_eq!(bench.gateway.counts().in_flight, 0);
}

#[tokio::test]
async fn the_whole_time_is_bounded_however_busy_the_stream() {
    let (bench, upstream) = bench(Settings { total_timeout_ms: 400, ..Settings::default() }).await;
    let calling = tokio::spawn(call(chat(&bench, true, 1)));
    let mut arrived = upstream.request().await;
    arrived.begin().await;
    let talking = tokio::spawn(async move {
        while arrived.try_chunk("data: {\"n\":1}\n\n").await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    });
    let stream = text(calling.await.unwrap()).await;
    let events = events(&stream);
    assert!(events.last().unwrap().contains("total_timeout_ms"), "{stream}");
    soon("the server's connection is closed", talking).await.unwrap();
}
