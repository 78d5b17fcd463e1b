//! A real etcd that hangs, dies, comes back, fills up or demands a log-in, and what callers are told.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of a test are no #[test]")]

use drover_coordinator::store::{
    Backend, Change, Compare, Error, Op, Txn,
    etcd::{Etcd, Settings},
};
use std::time::Duration;
use tokio::time::{Instant, timeout};

const CALL: Duration = Duration::from_millis(1_500);
/// What a call may take beyond its own deadline on a loaded machine.
const SLACK: Duration = Duration::from_secs(1);

async fn server() -> drover_tests::etcd::Etcd {
    drover_tests::etcd::Etcd::start().await.unwrap()
}

fn settings(server: &drover_tests::etcd::Etcd) -> Settings {
    Settings {
        call_timeout: CALL,
        keep_alive: Duration::from_millis(500),
        watch_silence: Duration::from_millis(250),
        ..Settings::new(server.endpoints())
    }
}

fn put(key: &str, lease: i64) -> Txn {
    Txn { then: vec![Op::Put { key: key.to_owned(), value: b"v".to_vec(), lease }], ..Txn::default() }
}

async fn within<T>(limit: Duration, what: &str, call: impl Future<Output = T>) -> T {
    timeout(limit, call).await.unwrap_or_else(|_| panic!("{what} took longer than {limit:?}"))
}

/// Repeats a call until it works again; fails after 20 s.
async fn until_ok<T, F: AsyncFnMut() -> Result<T, Error>>(what: &str, mut call: F) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match call().await {
            Ok(value) => return value,
            Err(error) if Instant::now() > deadline => panic!("{what} still fails: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

#[tokio::test]
async fn a_halted_etcd_ends_every_call_and_watch_in_time() {
    let server = server().await;
    let store = Etcd::connect(settings(&server)).await.unwrap();
    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    store.renew(lease).await.unwrap();
    let start = store.txn(put("before", lease)).await.unwrap().revision;
    let mut watch = store.watch("", start + 1).await.unwrap();
    // One whose connection sends no pings, so that only its own question finds out.
    let without_pings = Settings { keep_alive: Duration::from_secs(600), ..settings(&server) };
    let without_pings = Etcd::connect(without_pings).await.unwrap();
    let mut watch_without_pings = without_pings.watch("", start + 1).await.unwrap();

    server.stop().unwrap();
    let limit = CALL + SLACK;
    let (read, write, renewal, grant, watched, watched_without_pings) = tokio::join!(
        within(limit, "a read", store.get("before")),
        within(limit, "a write", store.txn(put("during", 0))),
        within(limit, "a renewal", store.renew(lease)),
        within(limit, "a grant", store.grant(Duration::from_secs(5))),
        within(limit + SLACK, "the watch", watch.next()),
        within(limit + SLACK, "the watch without pings", watch_without_pings.next()),
    );
    assert!(matches!(read, Err(Error::Unavailable(_))), "{read:?}");
    assert!(matches!(write, Err(Error::OutcomeUnknown(_))), "{write:?}");
    assert!(matches!(renewal, Err(Error::Unavailable(_))), "{renewal:?}");
    assert!(matches!(grant, Err(Error::OutcomeUnknown(_))), "{grant:?}");
    assert!(matches!(watched, Err(Error::Unavailable(_))), "{watched:?}");
    assert!(matches!(watched_without_pings, Err(Error::Unavailable(_))), "{watched_without_pings:?}");
    let read_only = Txn { then: vec![Op::Get("before".to_owned())], ..Txn::default() };
    let read = within(limit, "a transaction that only reads", store.txn(read_only)).await;
    assert!(matches!(read, Err(Error::Unavailable(_))), "{read:?}");

    server.cont().unwrap();
    let listing = until_ok("listing", async || store.list("").await).await;
    assert!(listing.items.iter().any(|kv| kv.key == "before"), "{listing:?}");
    until_ok("renewing", async || store.renew(lease).await).await;
    let mut watch = until_ok("watching", async || store.watch("after", listing.revision + 1).await).await;
    until_ok("writing", async || store.txn(put("after", 0)).await).await;
    let changes = within(limit, "the watch", watch.next()).await.unwrap();
    assert!(matches!(&changes.changes[..], [Change::Put(kv)] if kv.key == "after"), "{changes:?}");
}

#[tokio::test]
async fn a_dead_etcd_refuses_for_sure_and_one_restarted_has_kept_leases() {
    let mut server = server().await;
    let store = Etcd::connect(settings(&server)).await.unwrap();
    let cluster = store.cluster_id().await.unwrap();
    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    let written = store.txn(put("sessions/a", lease)).await.unwrap().revision;
    store.renew(lease).await.unwrap();
    let mut watch = store.watch("", written + 1).await.unwrap();

    server.kill().unwrap();
    let ended = within(CALL, "the watch", watch.next()).await;
    assert!(matches!(ended, Err(Error::Unavailable(_))), "{ended:?}");
    // Connections are refused, so nothing can have been done: no unknown outcome.
    let begun = Instant::now();
    let write = store.txn(put("during", 0)).await;
    assert!(matches!(write, Err(Error::Unavailable(_))), "{write:?}");
    let renewal = store.renew(lease).await;
    assert!(matches!(renewal, Err(Error::Unavailable(_))), "{renewal:?}");
    assert!(begun.elapsed() < CALL, "a refusal took {:?}", begun.elapsed());

    server.restart().await.unwrap();
    let listing = until_ok("listing", async || store.list("").await).await;
    assert_eq!(listing.items.iter().map(|kv| kv.key.as_str()).collect::<Vec<_>>(), ["sessions/a"]);
    assert_eq!(until_ok("renewing", async || store.renew(lease).await).await, Duration::from_secs(60));
    assert_eq!(store.cluster_id().await.unwrap(), cluster);
    let mut watch = store.watch("", listing.revision + 1).await.unwrap();
    store.revoke(lease).await.unwrap();
    let changes = within(CALL, "the watch", watch.next()).await.unwrap();
    assert!(matches!(&changes.changes[..], [Change::Delete { key, .. }] if key == "sessions/a"), "{changes:?}");
}

#[tokio::test]
async fn a_start_without_etcd_names_the_endpoints() {
    let port = drover_tests::etcd::free_port().unwrap();
    let endpoint = format!("http://127.0.0.1:{port}");
    let error = Etcd::connect(Settings::new(vec![endpoint.clone()])).await.unwrap_err();
    assert!(
        matches!(&error, Error::Unavailable(why) if why.contains(&endpoint) && why.contains("etcd_endpoints")),
        "{error}"
    );

    let error = Etcd::connect(Settings::new(vec!["http://not a host".to_owned()])).await.unwrap_err();
    assert!(matches!(&error, Error::Rejected(why) if why.contains("not a host")), "{error}");
}

#[tokio::test]
async fn a_dead_member_costs_no_call() {
    let (server, port) = (server().await, drover_tests::etcd::free_port().unwrap());
    let mut endpoints = server.endpoints();
    endpoints.push(format!("http://127.0.0.1:{port}"));
    let store = Etcd::connect(Settings { endpoints, ..settings(&server) }).await.unwrap();
    for i in 0..100 {
        store.txn(put(&format!("k/{i}"), 0)).await.unwrap();
        assert!(store.get(&format!("k/{i}")).await.unwrap().is_some());
    }
}

/// etcd closes connections that are pinged too often: what is under way on them would be lost.
#[tokio::test]
async fn keep_alive_pings_do_not_make_etcd_close_a_quiet_connection() {
    let server = server().await;
    let store = Etcd::connect(settings(&server)).await.unwrap();
    let mut watch = store.watch("", 0).await.unwrap();
    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    store.renew(lease).await.unwrap();
    // Ten keep-alive intervals; etcd's limit is three.
    let quiet = timeout(Duration::from_secs(5), watch.next()).await;
    assert!(quiet.is_err(), "the quiet watch ended: {quiet:?}");
    // The connection of renewals has an open stream but no answers to progress: when etcd closed it, another is opened.
    store.renew(lease).await.unwrap();
    store.txn(put("a", lease)).await.unwrap();
    let changes = within(CALL, "the watch", watch.next()).await.unwrap();
    assert_eq!(changes.changes.len(), 1);
}

#[tokio::test]
async fn a_watch_without_a_reader_is_closed() {
    let server = server().await;
    let store = Etcd::connect(settings(&server)).await.unwrap();
    let watches: Vec<_> = futures::future::join_all((0..5).map(|_| store.watch("", 0))).await;
    assert!(watches.iter().all(Result::is_ok));
    let open = async || server.metric("etcd_debugging_mvcc_watcher_total").await.unwrap();
    assert_eq!(open().await, 5.0);
    drop(watches);
    let closed = async {
        while open().await > 0.0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(Duration::from_secs(5), "closing", closed).await;
}

#[tokio::test]
async fn a_full_etcd_is_told_apart_and_still_read() {
    let server = drover_tests::etcd::Etcd::start_with(&["--quota-backend-bytes", "4194304"]).await.unwrap();
    let store = Etcd::connect(Settings { call_timeout: Duration::from_secs(5), ..settings(&server) }).await.unwrap();
    assert_eq!(store.out_of_space().await, Ok(false));
    let mut full = None;
    // etcd learns its size when it commits, every 100 ms: it takes in more than the quota before it notices.
    for i in 0..400 {
        let op = Op::Put { key: format!("k/{i}"), value: vec![7; 512 * 1024], lease: 0 };
        if let Err(error) = store.txn(Txn { then: vec![op], ..Txn::default() }).await {
            full = Some(error);
            break;
        }
    }
    assert!(matches!(full, Some(Error::NoSpace(_))), "{full:?}");
    assert!(!store.list("k/").await.unwrap().items.is_empty());
    assert!(matches!(store.grant(Duration::from_secs(5)).await, Err(Error::NoSpace(_))));
    assert_eq!(store.out_of_space().await, Ok(true));
}

#[tokio::test]
async fn a_log_in_is_used_where_etcd_demands_one() {
    let server = server().await;
    let mut admin = etcd_client::Client::connect(server.endpoints(), None).await.unwrap();
    admin.user_add("root", "secret-of-root", None).await.unwrap();
    admin.role_add("root").await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.auth_enable().await.unwrap();

    let user = |password: &str| Some(("root".to_owned(), password.to_owned()));
    let store = Etcd::connect(Settings { user: user("secret-of-root"), ..settings(&server) }).await.unwrap();
    store.txn(put("a", 0)).await.unwrap();
    let lease = store.grant(Duration::from_secs(60)).await.unwrap();
    store.renew(lease).await.unwrap();

    for user in [None, user("a wrong one")] {
        let error = Etcd::connect(Settings { user, ..settings(&server) }).await.unwrap_err();
        assert!(matches!(error, Error::Rejected(_)), "{error}");
        assert!(!error.to_string().contains("a wrong one"), "{error}");
    }
}

#[tokio::test]
async fn prefixes_keep_fleets_apart() {
    let server = server().await;
    let of = async |prefix: &str| {
        let settings = Settings { prefix: prefix.to_owned(), ..settings(&server) };
        Etcd::connect(settings).await.unwrap()
    };
    let (one, two) = (of("/one/").await, of("/two/").await);
    one.txn(put("k", 0)).await.unwrap();
    assert_eq!(two.list("").await.unwrap().items, []);
    let free = Txn { compare: vec![Compare::CreateRevision("k".to_owned(), 0)], ..put("k", 0) };
    assert!(two.txn(free).await.unwrap().succeeded);
    two.txn(Txn { then: vec![Op::DeletePrefix(String::new())], ..Txn::default() }).await.unwrap();
    assert!(one.get("k").await.unwrap().is_some());
}
