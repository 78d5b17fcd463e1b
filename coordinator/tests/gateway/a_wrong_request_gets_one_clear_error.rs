use crate::support::*;
use drover_coordinator::gateway::Settings;
use http::{Method, Request};
use http_body_util::Full;

#[tokio::test]
async fn a_wrong_request_gets_one_clear_error_in_openai_s_shape() {
    let settings = Settings { body_bytes_max: 1000, ..Settings::default() };
    let bench = Bench::start_with(Options { settings, ..Options::default() }).await;
    bench.deploy(false);
    let chat = "/v1/chat/completions";
    let large = format!(r#"{{"model":"tiny","prompt":"{}"}}"#, "x".repeat(1000));
    for (method, path, body, status, code, param, named) in [
        (
            Method::POST,
            chat,
            r#"{"model":"nope"}"#,
            404,
            "model_not_found",
            "model",
            "\"nope\" does not exist; there are: tiny",
        ),
        (Method::POST, chat, r#"{"model":"a\u001b[1m"}"#, 404, "model_not_found", "model", "\\u{1b}"),
        (Method::POST, chat, r#"{"model":"#, 400, "invalid_json", "", "EOF"),
        (Method::POST, "/v1/embeddings", "[]", 400, "invalid_json", "", "'{'"),
        (Method::POST, "/v1/completions", "{}", 400, "", "model", "model is missing"),
        (Method::POST, chat, r#"{"model":"tiny","stream":"yes"}"#, 400, "", "stream", "true or false"),
        (Method::POST, chat, &large, 413, "body_too_large", "", "1000 bytes"),
        (Method::POST, chat, r#"{"model":"tiny"}"#, 503, "model_not_ready", "", "tiny"),
        (Method::GET, chat, "", 405, "", "", "use POST"),
        (Method::POST, "/v1/models", "", 405, "", "", "use GET"),
        (Method::POST, "/v1/audio/speech", "{}", 404, "unknown_url", "", "/v1/audio/speech"),
    ] {
        let request = Request::builder().method(method.clone()).uri(bench.url(path));
        let response = call(request.body(Full::new(body.to_owned().into())).unwrap()).await;
        let what = format!("{method} {path} {body:.60}");
        assert_eq!(response.status().as_u16(), status, "{what}");
        assert!(!header(&response, "x-request-id").is_empty(), "{what}");
        assert_eq!(header(&response, "retry-after").is_empty(), status != 503, "{what}");
        let error = json(response).await["error"].clone();
        assert!(error["message"].as_str().unwrap().contains(named), "{what}: {error}");
        assert!(!error["type"].as_str().unwrap().is_empty(), "{what}: {error}");
        assert_eq!(error["code"].as_str().unwrap_or_default(), code, "{what}: {error}");
        assert_eq!(error["param"].as_str().unwrap_or_default(), param, "{what}: {error}");
    }
    let counts = bench.gateway.counts();
    assert_eq!((counts.answers[4], counts.answers[5]), (10, 1));
}

#[tokio::test]
async fn a_body_without_a_length_is_bounded_too() {
    let settings = Settings { body_bytes_max: 1000, body_timeout_ms: 200, ..Settings::default() };
    let bench = Bench::start_with(Options { settings, ..Options::default() }).await;
    let (mut sender, body) = http_body_util::Channel::<bytes::Bytes>::new(1);
    let request = Request::post(bench.url("/v1/completions")).body(body).unwrap();
    let client = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new()).build_http();
    let calling = tokio::spawn(client.request(request));
    for _ in 0..3 {
        let _ = sender.send_data(vec![b' '; 400].into()).await;
    }
    assert_eq!(calling.await.unwrap().unwrap().status(), 413);
    // One that never ends is given up.
    let (_sender, body) = http_body_util::Channel::<bytes::Bytes>::new(1);
    let request = Request::post(bench.url("/v1/completions")).body(body).unwrap();
    let response = soon("the gateway gives up", client.request(request)).await.unwrap();
    assert_eq!(response.status(), 408);
}
