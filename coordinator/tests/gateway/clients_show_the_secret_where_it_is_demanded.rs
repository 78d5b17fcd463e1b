use crate::support::*;
use drover_coordinator::gateway::Settings;

#[tokio::test]
async fn clients_show_the_secret_where_it_is_demanded() {
    let settings = Settings { auth: true, ..Settings::default() };
    let bench = Bench::start_with(Options { settings, secret: true, ..Options::default() }).await;
    let (bench, upstream) = bench.with_upstream().await;
    for key in ["", "Bearer wrong-wrong-wrong", SECRET] {
        let mut request = chat(&bench, false, 1);
        if !key.is_empty() {
            request.headers_mut().insert("authorization", key.parse().unwrap());
        }
        let response = call(request).await;
        assert_eq!(response.status(), 401, "{key}");
        assert!(!header(&response, "x-request-id").is_empty());
        assert_eq!(json(response).await["error"]["code"], "invalid_api_key");
    }
    assert_eq!(call(get(&bench.url("/v1/models"))).await.status(), 401);
    assert_eq!(call(get(&bench.url("/healthz"))).await.status(), 200);
    let mut request = chat(&bench, false, 1);
    request.headers_mut().insert("authorization", format!("Bearer {SECRET}").parse().unwrap());
    let calling = tokio::spawn(call(request));
    let arrived = upstream.request().await;
    assert!(!arrived.head.contains(SECRET), "it ends at the proxy");
    arrived.answer("{}").await;
    assert_eq!(calling.await.unwrap().status(), 200);
}

#[tokio::test]
async fn on_loopback_they_need_not_while_the_gateway_shows_it_to_the_proxy() {
    let bench = Bench::start_with(Options { secret: true, ..Options::default() }).await;
    let (bench, upstream) = bench.with_upstream().await;
    let calling = tokio::spawn(call(chat(&bench, false, 1)));
    upstream.request().await.answer("{}").await;
    assert_eq!(calling.await.unwrap().status(), 200);
    let direct = format!("http://{}/i/tiny-222222/v1/models", bench.proxy.address());
    assert_eq!(call(get(&direct)).await.status(), 401, "the proxy itself demands it");
}
