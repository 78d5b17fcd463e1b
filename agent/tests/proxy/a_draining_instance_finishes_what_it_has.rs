use crate::support::*;
use drover_agent::proxy::{Route, RouteState};
use std::time::Duration;

#[tokio::test]
async fn a_draining_instance_finishes_what_it_has_and_takes_nothing_new() {
    let host = Host::start().await;
    let upstream = Upstream::listen(host.folder.path());
    let open = route("a-222222", &upstream.socket, host.folder.path());
    host.route(std::slice::from_ref(&open)).await;
    let calling = tokio::spawn(call(post(&host.url("/i/a-222222/v1/x"), "{}")));
    let mut arrived = upstream.request().await;
    arrived.begin().await;
    arrived.chunk("data: 1\n\n").await;
    let mut response = calling.await.unwrap();
    assert_eq!(piece(&mut response).await, "data: 1\n\n");

    host.proxy().set_routes(vec![Route { state: RouteState::Draining, ..open }]);
    assert!(!host.proxy().wait_drained("a-222222", Duration::from_millis(300)).await, "a request is in flight");
    let refused = call(post(&host.url("/i/a-222222/v1/x"), "{}")).await;
    assert_eq!((refused.status().as_u16(), word(&refused)), (503, Some("draining")));

    arrived.chunk("data: 2\n\n").await;
    arrived.finish().await;
    assert_eq!(text(response).await, "data: 2\n\n");
    assert!(host.proxy().wait_drained("a-222222", PATIENCE).await);
    host.end().await;
}
