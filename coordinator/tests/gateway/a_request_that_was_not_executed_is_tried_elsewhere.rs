use crate::support::*;
use drover_agent::proxy::{Route, RouteState};
use drover_proto::store::v1 as record;

#[tokio::test]
async fn a_request_that_was_not_executed_is_tried_elsewhere() {
    let (bench, llama) = Bench::start().await.with_llama(&[]).await;
    let good = route("tiny-222222", &llama.socket);
    let draining = Route { instance: "tiny-333333".to_owned(), state: RouteState::Draining, ..good.clone() };
    let dead = route("tiny-333333", &bench.folder.path().join("nobody.sock"));
    let unknown = Route { instance: "tiny-444444".to_owned(), ..good.clone() };
    for (what, other) in [("draining", draining), ("nobody accepts", dead), ("no route", unknown)] {
        bench.route(&[good.clone(), other]).await;
        bench.ready(&["tiny-333333"], "a");
        all_answered_by_the_good_one(&bench, what).await;
    }
    // And when a whole host is away.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    bench.change(|snapshot| {
        put(&mut snapshot.nodes, "b", record::Node { proxy_address: nobody.to_string(), ..Default::default() }, 1);
    });
    bench.ready(&["tiny-333333"], "b");
    all_answered_by_the_good_one(&bench, "host away").await;
}

/// Twelve requests: by chance some go to the other instance first, and none of them fails.
async fn all_answered_by_the_good_one(bench: &Bench, what: &str) {
    let mut twice = 0;
    for _ in 0..12 {
        let response = call(chat(bench, false, 1)).await;
        assert_eq!(response.status(), 200, "{what}");
        assert_eq!(header(&response, "x-drover-instance"), "tiny-222222", "{what}");
        twice += usize::from(header(&response, "x-drover-attempts") == "2");
        text(response).await;
    }
    // All twelve at first go to the good one once in 4,096 runs.
    assert!(twice > 0, "{what}: none needed a second attempt");
}

#[tokio::test]
async fn when_nobody_takes_it_the_client_is_told_to_come_back() {
    let (bench, upstream) = Bench::start().await.with_upstream().await;
    bench.route(&[Route { state: RouteState::Draining, ..route("tiny-222222", &upstream.socket) }]).await;
    let response = call(chat(&bench, false, 1)).await;
    assert_eq!((response.status().as_u16(), header(&response, "retry-after")), (503, "1"));
    assert_eq!(json(response).await["error"]["code"], "model_not_ready");
    assert_eq!(bench.gateway.counts().retries, 1);
}

#[tokio::test]
async fn a_route_that_comes_a_moment_late_is_found_by_the_second_attempt() {
    let (bench, upstream) = Bench::start().await.with_upstream().await;
    bench.route(&[]).await;
    let calling = tokio::spawn(call(chat(&bench, false, 1)));
    until("the first attempt has failed", async || bench.gateway.counts().retries == 1).await;
    bench.route(&[route("tiny-222222", &upstream.socket)]).await;
    upstream.request().await.answer("{}").await;
    let response = calling.await.unwrap();
    assert_eq!((response.status().as_u16(), header(&response, "x-drover-attempts")), (200, "2"));
}
