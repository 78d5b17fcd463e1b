use crate::support::*;
use drover_agent::proxy::{Route, RouteState};
use nix::sys::signal::Signal;
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const UPGRADES: usize = 6;

/// One request over a connection that stays open; the answer's head.
async fn ask(stream: &mut TcpStream, path: &str) -> String {
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
    let mut bytes = vec![0; 4096];
    let read = soon("an answer", stream.read(&mut bytes)).await.unwrap();
    String::from_utf8(bytes[..read].to_vec()).unwrap()
}

/// Has a proxy replaced and waits until its successor has the routes; returns the pid of the old one.
async fn upgrade(host: &Host) -> u32 {
    let pid = host.proxy().pid();
    kill(pid, Signal::SIGTERM);
    until("a successor is there", || host.proxy().pid() != pid).await;
    assert!(host.proxy().wait_applied(PATIENCE).await);
    pid
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_over_new_connections_or_kept_ones() {
    let host = Host::start().await;
    let upstream = Arc::new(Upstream::listen(host.folder.path()));
    host.route(&[route("a-222222", &upstream.socket, host.folder.path())]).await;
    let answering = upstream.clone();
    let serving = tokio::spawn(async move {
        loop {
            answering.request().await.answer("served").await;
        }
    });
    let (url, stop) = (host.url("/i/a-222222/v1/x"), tokio_util::sync::CancellationToken::new());
    let calls: Vec<_> = (0..8)
        .map(|n| {
            let (url, stop, kept) = (url.clone(), stop.clone(), client());
            tokio::spawn(async move {
                let mut answered = 0;
                while !stop.is_cancelled() {
                    let client = if n % 2 == 0 { kept.clone() } else { client() };
                    let response = client.request(get(&url)).await.unwrap();
                    assert_eq!((response.status().as_u16(), text(response).await.as_str()), (200, "served"));
                    answered += 1;
                }
                answered
            })
        })
        .collect();
    for _ in 0..UPGRADES {
        upgrade(&host).await;
    }
    stop.cancel();
    for call in calls {
        assert!(call.await.unwrap() > 0);
    }
    serving.abort();
    host.end().await;
}

#[tokio::test]
async fn what_the_old_one_carries_still_counts_and_it_hears_of_new_routes() {
    let host = Host::start().await;
    let upstream = Upstream::listen(host.folder.path());
    let open = route("a-222222", &upstream.socket, host.folder.path());
    host.route(std::slice::from_ref(&open)).await;
    let mut kept = TcpStream::connect(host.address()).await.unwrap();
    assert!(ask(&mut kept, "/healthz").await.starts_with("HTTP/1.1 200"));
    let calling = tokio::spawn(call(get(&host.url("/i/a-222222/v1/x"))));
    let mut arrived = upstream.request().await;
    arrived.begin().await;
    arrived.chunk("data: 1\n\n").await;
    let mut response = calling.await.unwrap();
    piece(&mut response).await;

    let old = upgrade(&host).await;
    assert_eq!(host.proxy().in_flight("a-222222"), 1);
    host.proxy().set_routes(vec![Route { state: RouteState::Draining, ..open }]);
    assert!(!host.proxy().wait_drained("a-222222", Duration::from_millis(300)).await, "the old one has a stream");
    let refused = ask(&mut kept, "/i/a-222222/v1/x").await.to_lowercase();
    assert!(refused.contains("x-drover-proxy-error: draining") && refused.contains("connection: close"), "{refused}");
    arrived.finish().await;
    assert_eq!(text(response).await, "");
    assert!(host.proxy().wait_drained("a-222222", PATIENCE).await);
    until("the old one is gone", || !alive(old)).await;
    host.end().await;
}

#[tokio::test]
async fn an_order_to_end_reaches_the_old_one_too() {
    let host = Host::start().await;
    let upstream = Upstream::listen(host.folder.path());
    host.route(&[route("a-222222", &upstream.socket, host.folder.path())]).await;
    let calling = tokio::spawn(call(get(&host.url("/i/a-222222/v1/x"))));
    let mut held = upstream.request().await;
    held.begin().await;
    let response = calling.await.unwrap();
    let old = upgrade(&host).await;
    // By a program that knows of the successor only.
    let settings = host.settings.clone();
    let mut host = host;
    host.proxy = None;
    assert!(drover_agent::proxy::client::end_at(&settings.runtime_dir, Duration::from_secs(5)).await.unwrap());
    until("the old one is gone", || !alive(old)).await;
    drop(response);
}

#[tokio::test]
async fn without_an_agent_there_is_nobody_to_hand_over_to() {
    let mut host = Host::start().await;
    let (pid, agent) = (host.proxy().pid(), host.proxy.take().unwrap());
    // It can't see the signal before it goes on, and its agent is gone by then.
    kill(pid, Signal::SIGSTOP);
    kill(pid, Signal::SIGTERM);
    drop(agent);
    kill(pid, Signal::SIGCONT);
    until("it is gone", || !alive(pid)).await;
    let log = std::fs::read_to_string(host.settings.log_file()).unwrap();
    assert!(!log.contains("no successor has asked"), "it has waited for one: {log}");
    assert!(!host.settings.control_socket().exists());
}
