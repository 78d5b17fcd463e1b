use crate::support::*;
use drover_agent::{
    instance::routes::Routes,
    proxy::{ProxyHandle, client::end_at},
};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

#[tokio::test]
async fn the_proxy_outlives_the_agent_and_is_taken_over_by_the_next_one() {
    let mut host = Host::start().await;
    let upstream = Upstream::listen(host.folder.path());
    host.route(&[route("a-222222", &upstream.socket, host.folder.path())]).await;
    let (pid, address) = (host.proxy().pid(), host.address());
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session = stat.rsplit_once(") ").unwrap().1.split(' ').nth(3).unwrap().to_owned();
    assert_eq!(session, pid.to_string(), "it leads a session of its own");

    host.proxy = None;
    let url = format!("http://{address}/i/a-222222/v1/x");
    let calling = tokio::spawn(call(get(&url)));
    upstream.request().await.answer("served").await;
    assert_eq!(text(calling.await.unwrap()).await, "served", "without an agent");

    host.proxy = Some(ProxyHandle::ensure(host.settings.clone()).await.unwrap());
    assert_eq!((host.proxy().pid(), host.address()), (pid, address));
    assert_eq!(host.proxy().version(), drover_proto::VERSION);
    let calling = tokio::spawn(call(get(&url)));
    upstream.request().await.answer("still").await;
    assert_eq!(text(calling.await.unwrap()).await, "still", "before the new agent has set any route");
    host.end().await;
    assert!(!alive(pid));
}

#[tokio::test]
async fn the_next_agent_gives_its_routes_only_when_it_has_them_all() {
    let mut host = Host::start().await;
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, second) = (Upstream::listen(first.path()), Upstream::listen(second.path()));
    let routes = [("a-222222", &first), ("b-222222", &second)].map(|(id, u)| route(id, &u.socket, host.folder.path()));
    host.route(&routes).await;
    host.proxy = None;
    let next = ProxyHandle::ensure(host.settings.clone()).await.unwrap();
    let adopted = Routes::new(std::sync::Arc::new(next.clone()));
    host.proxy = Some(next);
    // The supervisor of the first instance is at work before that of the second is there.
    adopted.prepare(routes[0].clone());
    adopted.set(routes[0].clone()).await;
    assert!(host.proxy().wait_applied(PATIENCE).await);
    let calling = tokio::spawn(call(get(&host.url("/i/b-222222/v1/x"))));
    soon("the request", second.request()).await.answer("still").await;
    assert_eq!(text(calling.await.unwrap()).await, "still");
    adopted.announce();
    assert!(host.proxy().wait_applied(PATIENCE).await);
    let answer = call(get(&host.url("/i/b-222222/v1/x"))).await;
    assert_eq!(answer.status(), 503, "what the full set leaves out is gone");
    host.end().await;
}

#[tokio::test]
async fn a_proxy_that_dies_is_back_on_the_same_port_with_the_same_routes() {
    let host = Host::start().await;
    let upstream = Upstream::listen(host.folder.path());
    host.route(&[route("a-222222", &upstream.socket, host.folder.path())]).await;
    let address = host.address();
    die(&host).await;
    assert_eq!(host.address(), address);
    let calling = tokio::spawn(call(get(&host.url("/i/a-222222/v1/x"))));
    upstream.request().await.answer("again").await;
    assert_eq!(text(calling.await.unwrap()).await, "again");
    host.end().await;
}

/// Kills the proxy; returns when another one has the routes.
async fn die(host: &Host) {
    let pid = host.proxy().pid();
    kill(pid, Signal::SIGKILL);
    until("another one is there", || host.proxy().pid() != pid).await;
    assert!(host.proxy().wait_applied(PATIENCE).await);
}

/// Nothing waits on the way: the death is seen when it happens, so that it is made good in the time of a start. The pairs
/// share what else the machine does; one of them that was left in peace is enough.
#[tokio::test]
async fn the_death_of_a_proxy_is_made_good_in_little_more_than_the_time_of_a_start() {
    const PAIRS: usize = 5;
    let mut ratios = Vec::new();
    for _ in 0..PAIRS {
        let began = Instant::now();
        let host = Host::start().await;
        host.route(&[]).await;
        let start = began.elapsed();
        let killed = Instant::now();
        die(&host).await;
        ratios.push(killed.elapsed().as_secs_f64() / start.as_secs_f64());
        host.end().await;
    }
    let best = ratios.iter().copied().fold(f64::INFINITY, f64::min);
    assert!(best < 2.0, "a death took {ratios:.2?} times as long as a start");
}

#[tokio::test]
async fn a_proxy_told_to_end_finishes_its_streams_while_its_successor_serves() {
    let host = Host::start().await;
    let upstream = Upstream::listen(host.folder.path());
    host.route(&[route("a-222222", &upstream.socket, host.folder.path())]).await;
    let (pid, address) = (host.proxy().pid(), host.address());
    let calling = tokio::spawn(call(get(&host.url("/i/a-222222/v1/x"))));
    let mut arrived = upstream.request().await;
    arrived.begin().await;
    arrived.chunk("data: 1\n\n").await;
    let mut response = calling.await.unwrap();
    piece(&mut response).await;

    kill(pid, Signal::SIGTERM);
    until("a successor is there", || host.proxy().pid() != pid).await;
    assert!(host.proxy().wait_applied(PATIENCE).await);
    assert_eq!(host.address(), address);
    let calling = tokio::spawn(call(get(&host.url("/i/a-222222/v1/x"))));
    upstream.request().await.answer("new").await;
    assert_eq!(text(calling.await.unwrap()).await, "new");

    assert!(alive(pid), "the old one still has a stream");
    arrived.chunk("data: 2\n\n").await;
    arrived.finish().await;
    assert_eq!(text(response).await, "data: 2\n\n");
    until("the old one is gone", || !alive(pid)).await;
    host.end().await;
}

#[tokio::test]
async fn an_ended_proxy_leaves_nothing_but_its_log_and_its_port_for_the_next() {
    let host = Host::start().await;
    let (pid, address, settings) = (host.proxy().pid(), host.address(), host.settings.clone());
    let folder = tempfile::tempdir().unwrap();
    assert!(!end_at(folder.path(), Duration::from_secs(1)).await.unwrap(), "nobody is there");
    // By a program that does not supervise it, and with an agent that must not start another.
    let mut host = host;
    host.proxy = None;
    assert!(end_at(&settings.runtime_dir, Duration::from_millis(200)).await.unwrap());
    until("it is gone", || !alive(pid)).await;
    assert!(!settings.control_socket().exists());
    let next = ProxyHandle::ensure(settings.clone()).await.unwrap();
    assert_eq!(next.address(), address, "the same port though both were away");
    assert!(settings.log_file().exists());
    next.end(Duration::from_millis(200)).await.unwrap();
}

#[tokio::test]
async fn a_port_that_is_taken_is_said_with_the_proxys_own_words() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let listen = taken.local_addr().unwrap();
    let mut settings = drover_agent::proxy::ProxySettings::new(listen, folder.path(), folder.path());
    settings.executable = Some(env!("CARGO_BIN_EXE_drover-agent").into());
    let error = format!("{:#}", ProxyHandle::ensure(settings).await.unwrap_err());
    assert!(error.contains(&format!("proxy_listen = {listen}")), "{error}");
}

#[tokio::test]
async fn a_proxy_that_does_not_end_in_time_is_killed() {
    let host = Host::start().await;
    let pid = host.proxy().pid();
    kill(pid, Signal::SIGSTOP);
    host.end().await;
    assert!(!alive(pid));
}
