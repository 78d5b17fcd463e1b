use crate::support::*;
use drover_coordinator::gateway::proxy_client::Error;
use futures::StreamExt as _;
use std::io::Write as _;

#[tokio::test]
async fn logs_come_over_the_proxy_line_by_line() {
    let bench = Bench::start_with(Options { secret: true, ..Options::default() }).await;
    let (bench, _llama) = bench.with_llama(&[]).await;
    let address = bench.proxy.address().to_string();
    let proxies = bench.gateway.proxies();
    let lines: Vec<_> = proxies.logs(&address, "tiny-222222", 5, false).await.unwrap().collect().await;
    assert_eq!(lines.len(), 5, "a real server's log: {lines:?}");

    let path = bench.folder.path().join("server.log");
    let mut log = std::fs::File::options().append(true).open(path).unwrap();
    let mut followed = Box::pin(proxies.logs(&address, "tiny-222222", 1, true).await.unwrap());
    soon("the last line", followed.next()).await.unwrap().unwrap();
    writeln!(log, "said by the test\nand more").unwrap();
    // The server itself may still have something to say before.
    while soon("the new line", followed.next()).await.unwrap().unwrap() != "said by the test" {}
    assert_eq!(soon("the next line", followed.next()).await.unwrap().unwrap(), "and more");

    let error = proxies.logs(&address, "tiny-999999", 1, false).await.map(drop).unwrap_err();
    assert!(matches!(&error, Error::Proxy { word, .. } if word == "no_route"), "{error}");
    let error = proxies.logs("127.0.0.1:1", "tiny-222222", 1, false).await.map(drop).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    let error = proxies.logs("192.0.2.1:1", "tiny-222222", 1, false).await.map(drop).unwrap_err();
    assert!(matches!(error, Error::Plaintext { .. }), "the secret is not sent to strangers: {error}");
}
