use crate::support::*;
use http_body_util::BodyExt as _;

#[tokio::test]
async fn a_server_killed_in_the_middle_of_a_stream_ends_it_with_an_error_event() {
    let (bench, mut llama) = Bench::start().await.with_llama(&[]).await;
    let mut response = call(chat(&bench, true, 32_000)).await;
    let mut stream = piece(&mut response).await;
    llama.kill();
    stream += &text(response).await;
    let events = events(&stream);
    for event in &events {
        serde_json::from_str::<serde_json::Value>(event).unwrap_or_else(|error| panic!("{error}: {event}"));
    }
    let last: serde_json::Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "upstream_broken", "{last}");
    assert!(last["error"]["message"].is_string() && last["error"]["type"] == "server_error", "{last}");
    assert_eq!(events.iter().filter(|event| event.contains("\"error\"")).count(), 1);
    let counts = bench.gateway.counts();
    assert_eq!((counts.broken, counts.in_flight), (1, 0));
}

#[tokio::test]
async fn a_server_killed_before_it_answered_is_an_error_and_nothing_is_executed_twice() {
    let (bench, mut llama) = Bench::start().await.with_llama(&[]).await;
    let calling = tokio::spawn(call(chat(&bench, false, 32_000)));
    until("the slot is busy", async || llama.busy_slots().await == 1).await;
    llama.kill();
    let response = calling.await.unwrap();
    assert_eq!(response.status(), 502);
    assert_eq!(json(response).await["error"]["code"], "upstream_broken");
    assert_eq!(bench.gateway.counts().retries, 0);
}

#[tokio::test]
async fn a_stream_cut_anywhere_in_an_event_stays_readable() {
    let (bench, upstream) = Bench::start().await.with_upstream().await;
    for cut in ["", "d", "data: {\"choices\":[{\"del", "data: {\"n\":2}", "data: {\"n\":2}\n"] {
        let calling = tokio::spawn(call(chat(&bench, true, 1)));
        let mut arrived = upstream.request().await;
        arrived.begin().await;
        arrived.chunk(&format!("data: {{\"n\":1}}\n\n{cut}")).await;
        drop(arrived);
        let stream = text(calling.await.unwrap()).await;
        let events = events(&stream);
        assert_eq!((events.len(), events[0]), (2, "{\"n\":1}"), "{cut:?}: {stream}");
        let last: serde_json::Value = serde_json::from_str(events[1]).unwrap();
        assert_eq!(last["error"]["code"], "upstream_broken");
    }
}

#[tokio::test]
async fn a_stream_that_ends_without_its_last_event_is_no_whole_one() {
    let (bench, upstream) = Bench::start().await.with_upstream().await;
    let endings = ["data: {\"n\":2}\n\n", "data: [DONE]\n\n", "data: {\"error\":{\"code\":500}}\n\n"];
    for (ending, added) in endings.into_iter().zip([true, false, false]) {
        let calling = tokio::spawn(call(chat(&bench, true, 1)));
        let mut arrived = upstream.request().await;
        arrived.begin().await;
        arrived.chunk(ending).await;
        arrived.finish().await;
        let stream = text(calling.await.unwrap()).await;
        assert!(stream.starts_with(ending), "{stream}");
        assert_eq!(stream.contains("upstream_broken"), added, "{stream}");
    }
}

#[tokio::test]
async fn a_whole_answer_that_breaks_off_cuts_the_connection() {
    let (bench, upstream) = Bench::start().await.with_upstream().await;
    let calling = tokio::spawn(call(chat(&bench, false, 1)));
    let mut arrived = upstream.request().await;
    arrived.send("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"half\":").await;
    drop(arrived);
    let response = calling.await.unwrap();
    let broken = soon("the answer ends", response.into_body().collect()).await;
    assert!(broken.is_err(), "half a body is not taken for a whole one");
    assert_eq!(bench.gateway.counts().broken, 1);
}
