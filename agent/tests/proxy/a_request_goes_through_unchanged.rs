use crate::support::*;
use drover_agent::proxy::{Route, RouteState};

#[tokio::test]
async fn a_request_goes_through_unchanged_but_for_what_belongs_to_the_connection() {
    let host = Host::start().await;
    let upstream = Upstream::listen(host.folder.path());
    host.route(&[route("a-222222", &upstream.socket, host.folder.path())]).await;

    let mut request = post(&host.url("/i/a-222222/v1/x%2Fy?q=1"), r#"{"a": 1}"#);
    for (name, value) in [
        ("authorization", "Bearer key"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
        ("x-kept", "2"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ] {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    let calling = tokio::spawn(call(request));
    let mut arrived = upstream.request().await;
    assert!(arrived.head.starts_with("POST /v1/x%2Fy?q=1 HTTP/1.1\r\n"), "{}", arrived.head);
    assert!(arrived.head.contains("x-kept: 2") && arrived.head.contains("b7ad6b7169203331"), "{}", arrived.head);
    for gone in ["authorization", "Bearer key", "x-hop", "keep-alive"] {
        assert!(!arrived.head.contains(gone), "{gone}: {}", arrived.head);
    }
    assert_eq!(arrived.body, br#"{"a": 1}"#);
    assert_eq!(host.proxy().in_flight("b-222222"), 0);
    until("it is counted", || host.proxy().in_flight("a-222222") == 1).await;

    arrived.begin().await;
    let mut response = calling.await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(!response.headers().contains_key("keep-alive"));
    for text in ["data: 1\n\n", "data: 2\n\n"] {
        arrived.chunk(text).await;
        assert_eq!(piece(&mut response).await, text, "each piece at once");
    }
    assert_eq!(host.proxy().in_flight("a-222222"), 1, "counted until the body has ended");
    arrived.finish().await;
    assert_eq!(text(response).await, "");
    until("it is not counted any more", || host.proxy().in_flight("a-222222") == 0).await;
    host.end().await;
}

#[tokio::test]
async fn a_client_that_leaves_closes_the_connection_to_the_server() {
    let host = Host::start().await;
    let upstream = Upstream::listen(host.folder.path());
    host.route(&[route("a-222222", &upstream.socket, host.folder.path())]).await;
    // Before the answer has begun.
    let calling = tokio::spawn(call(post(&host.url("/i/a-222222/v1/x"), "{}")));
    let arrived = upstream.request().await;
    calling.abort();
    arrived.closed().await;
    // In the middle of it.
    let calling = tokio::spawn(call(post(&host.url("/i/a-222222/v1/x"), "{}")));
    let mut arrived = upstream.request().await;
    arrived.begin().await;
    arrived.chunk("data: 1\n\n").await;
    let mut response = calling.await.unwrap();
    piece(&mut response).await;
    drop(response);
    arrived.closed().await;
    until("nothing is in flight", || host.proxy().in_flight("a-222222") == 0).await;
    host.end().await;
}

#[tokio::test]
async fn errors_of_the_proxy_are_told_apart_from_those_of_the_server() {
    let host = Host::start().await;
    let upstream = Upstream::listen(host.folder.path());
    let nobody = route("b-222222", &host.folder.path().join("nobody.sock"), host.folder.path());
    let closed = Route { instance: "c-222222".to_owned(), state: RouteState::Closed, ..nobody.clone() };
    host.route(&[route("a-222222", &upstream.socket, host.folder.path()), nobody, closed]).await;
    for (path, status, expected) in [
        ("/i/unknown-222222/v1/x", 503, "no_route"),
        ("/i/c-222222/v1/x", 503, "no_route"),
        ("/i/b-222222/v1/x", 502, "connect"),
        ("/i/Bad_Name/v1/x", 400, "invalid"),
        ("/elsewhere", 404, "not_found"),
    ] {
        let response = call(get(&host.url(path))).await;
        assert_eq!((response.status().as_u16(), word(&response)), (status, Some(expected)), "{path}");
        let body: serde_json::Value = serde_json::from_str(&text(response).await).unwrap();
        assert_eq!(body["error"]["code"], expected, "{body}");
        assert!(body["error"]["message"].is_string() && body["error"]["type"].is_string(), "{body}");
    }
    let calling = tokio::spawn(call(get(&host.url("/i/a-222222/v1/x"))));
    drop(upstream.request().await);
    let response = calling.await.unwrap();
    assert_eq!((response.status().as_u16(), word(&response)), (502, Some("upstream")));
    let calling = tokio::spawn(call(get(&host.url("/i/a-222222/v1/x"))));
    let mut arrived = upstream.request().await;
    arrived.send("HTTP/1.1 503 x\r\nx-drover-proxy-error: no_route\r\ncontent-length: 0\r\n\r\n").await;
    let response = calling.await.unwrap();
    assert_eq!((response.status().as_u16(), word(&response)), (503, None), "a server can't speak for the proxy");
    let put = http::Request::put(host.url("/i/a-222222/v1/x")).body(http_body_util::Full::default()).unwrap();
    assert_eq!(word(&call(put).await), Some("invalid"));
    assert_eq!(call(get(&host.url("/healthz"))).await.status(), 200);
    host.end().await;
}

#[tokio::test]
async fn a_body_that_breaks_off_breaks_off_at_the_client_too() {
    let host = Host::start().await;
    let upstream = Upstream::listen(host.folder.path());
    host.route(&[route("a-222222", &upstream.socket, host.folder.path())]).await;
    let calling = tokio::spawn(call(get(&host.url("/i/a-222222/v1/x"))));
    let mut arrived = upstream.request().await;
    arrived.begin().await;
    arrived.chunk("data: 1\n\n").await;
    let mut response = calling.await.unwrap();
    piece(&mut response).await;
    drop(arrived);
    let broken = soon("the body ends", http_body_util::BodyExt::collect(response.into_body())).await;
    assert!(broken.is_err(), "a body without its end is not taken for a whole one");
    host.end().await;
}
