use crate::support::*;

#[tokio::test]
async fn chats_and_completions_come_whole_and_as_streams() {
    let (bench, _llama) = Bench::start().await.with_llama(&[]).await;
    let response = call(chat(&bench, false, 5)).await;
    assert_eq!(response.status(), 200);
    assert!(header(&response, "x-request-id").starts_with("req-"));
    assert_eq!(header(&response, "x-drover-instance"), "tiny-222222");
    assert_eq!(header(&response, "x-drover-attempts"), "1");
    let whole = json(response).await;
    assert_eq!(whole["usage"]["completion_tokens"], 5);
    let said = whole["choices"][0]["message"]["content"].as_str().unwrap().to_owned();

    let mut request = chat(&bench, true, 5);
    request.headers_mut().insert("x-request-id", "mine".parse().unwrap());
    let response = call(request).await;
    assert_eq!((header(&response, "content-type"), header(&response, "x-request-id")), ("text/event-stream", "mine"));
    let stream = text(response).await;
    let events = events(&stream);
    assert_eq!(events.last(), Some(&"[DONE]"));
    let parts = events[..events.len() - 1].iter().map(|event| {
        let event: serde_json::Value = serde_json::from_str(event).unwrap();
        event["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()
    });
    assert_eq!(parts.collect::<String>(), said, "at temperature 0 the stream says what the whole answer said");

    let body = r#"{"model":"tiny","prompt":"a","max_tokens":3,"stream":true}"#;
    let stream = text(call(post(&bench.url("/v1/completions"), body)).await).await;
    assert!(stream.contains(r#""object":"text_completion""#) && stream.ends_with("data: [DONE]\n\n"), "{stream}");

    let counts = bench.gateway.counts();
    assert_eq!((counts.answers[2], counts.in_flight, counts.broken, counts.abandoned), (3, 0, 0, 0));
}

#[tokio::test]
async fn embeddings_come_from_a_server_for_embeddings() {
    let (bench, _llama) = Bench::start().await.with_llama(&["--embeddings", "--pooling", "mean"]).await;
    let body = r#"{"model":"tiny","input":["one","two"]}"#;
    let response = json(call(post(&bench.url("/v1/embeddings"), body)).await).await;
    assert_eq!(response["data"].as_array().unwrap().len(), 2);
    assert_eq!(response["data"][0]["embedding"].as_array().unwrap().len(), drover::tiny_model::WIDTH);
}

#[tokio::test]
async fn what_a_server_refuses_it_says_itself() {
    let (bench, _llama) = Bench::start().await.with_llama(&[]).await;
    let refused = call(post(&bench.url("/v1/chat/completions"), r#"{"model":"tiny"}"#)).await;
    assert!(refused.status().is_client_error() || refused.status().is_server_error(), "{}", refused.status());
    assert_eq!(header(&refused, "x-drover-instance"), "tiny-222222", "llama-server's own answer");
    assert!(text(refused).await.contains("messages"), "its own words");
}

#[tokio::test]
async fn no_server_is_asked_for_what_it_was_not_started_for() {
    let (bench, _llama) = Bench::start().await.with_llama(&[]).await;
    let refused = call(post(&bench.url("/v1/embeddings"), r#"{"model":"tiny","input":"one"}"#)).await;
    assert_eq!(refused.status(), 400);
    assert!(text(refused).await.contains("unsupported_for_model"));
}

#[tokio::test]
async fn models_are_those_with_a_deployment() {
    let bench = Bench::start().await;
    let list = || async { json(call(get(&bench.url("/v1/models"))).await).await };
    assert_eq!(list().await, serde_json::json!({"object": "list", "data": []}));
    bench.deploy(false);
    let models = list().await;
    assert_eq!((models["data"][0]["id"].as_str(), models["data"][0]["object"].as_str()), (Some("tiny"), Some("model")));
}

#[tokio::test]
async fn a_body_reaches_the_server_byte_for_byte_and_a_client_s_key_does_not() {
    let (bench, upstream) = Bench::start().await.with_upstream().await;
    let body = "{ \"unknown\" : [1,2], \"model\":\"tiny\",\n\"text\":\"\\u00e9\" }";
    let mut request = post(&bench.url("/v1/chat/completions?x=1"), body);
    request.headers_mut().insert("authorization", "Bearer sk-key".parse().unwrap());
    request.headers_mut().insert("cookie", "c=1".parse().unwrap());
    let calling = tokio::spawn(call(request));
    let arrived = upstream.request().await;
    assert!(arrived.head.starts_with("POST /v1/chat/completions?x=1 "), "{}", arrived.head);
    assert!(!arrived.head.contains("sk-key") && !arrived.head.contains("cookie"), "{}", arrived.head);
    assert_eq!(arrived.body, body.as_bytes());
    arrived.answer("{\"as\": \"it came\"}").await;
    assert_eq!(text(calling.await.unwrap()).await, "{\"as\": \"it came\"}");
}

#[tokio::test]
async fn requests_go_to_the_less_busy_instance() {
    let bench = Bench::start().await;
    bench.deploy(false);
    let socket = |name: &str| bench.folder.path().join(name);
    let (first, second) = (Upstream::listen(&socket("1.sock")), Upstream::listen(&socket("2.sock")));
    bench.route(&[route("tiny-222222", &first.socket), route("tiny-333333", &second.socket)]).await;
    bench.ready(&["tiny-222222", "tiny-333333"], "a");
    // Of four held at the same time each gets two, in whatever order.
    let calls: Vec<_> = (0..4).map(|_| tokio::spawn(call(chat(&bench, false, 1)))).collect();
    let held = [first.request().await, first.request().await, second.request().await, second.request().await];
    assert_eq!(bench.gateway.counts().in_flight, 4);
    for arrived in held {
        arrived.answer("{}").await;
    }
    for calling in calls {
        text(calling.await.unwrap()).await;
    }
    until("all places are given back", async || bench.gateway.counts().in_flight == 0).await;
}
