use crate::support::*;
use std::os::unix::fs::PermissionsExt as _;

const SECRET: &str = "0123456789abcdef";

#[tokio::test]
async fn nobody_enters_without_the_secret_where_one_is_configured() {
    let host = Host::start_with(|settings| {
        let path = settings.runtime_dir.parent().unwrap().join("secret");
        std::fs::write(&path, SECRET).unwrap();
        settings.join_secret_file = Some(path);
    })
    .await;
    let upstream = Upstream::listen(host.folder.path());
    host.route(&[route("a-222222", &upstream.socket, host.folder.path())]).await;
    for path in ["/i/a-222222/v1/x", "/logs/a-222222", "/elsewhere"] {
        let response = call(get(&host.url(path))).await;
        assert_eq!((response.status().as_u16(), word(&response)), (401, Some("unauthenticated")), "{path}");
    }
    assert_eq!(call(get(&host.url("/healthz"))).await.status(), 200);
    let mut request = get(&host.url("/i/a-222222/v1/x"));
    request.headers_mut().insert("authorization", format!("Bearer {SECRET}").parse().unwrap());
    let calling = tokio::spawn(call(request));
    let arrived = upstream.request().await;
    assert!(!arrived.head.contains(SECRET), "{}", arrived.head);
    arrived.answer("yes").await;
    assert_eq!(text(calling.await.unwrap()).await, "yes");

    let arguments = std::fs::read(format!("/proc/{}/cmdline", host.proxy().pid())).unwrap();
    assert!(!String::from_utf8_lossy(&arguments).contains(SECRET), "no secret among the arguments");
    let mode = std::fs::metadata(host.settings.control_socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    host.end().await;
}

#[tokio::test]
async fn no_listener_opens_beyond_loopback_without_a_secret() {
    let folder = tempfile::tempdir().unwrap();
    let listen = "0.0.0.0:0".parse().unwrap();
    let mut settings = drover_agent::proxy::ProxySettings::new(listen, folder.path(), folder.path());
    settings.executable = Some(env!("CARGO_BIN_EXE_drover-agent").into());
    let error = format!("{:#}", drover_agent::proxy::ProxyHandle::ensure(settings).await.unwrap_err());
    assert!(error.contains("proxy_listen = 0.0.0.0:0") && error.contains("join_secret_file"), "{error}");
}
