use crate::support::*;
use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

fn append(folder: &Path, text: &str) {
    let mut file = fs::File::options().create(true).append(true).open(folder.join("server.log")).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

#[tokio::test]
async fn the_last_lines_of_a_log_are_shown_whatever_the_state_of_the_instance() {
    let host = Host::start().await;
    let folder: PathBuf = host.folder.path().join("logs");
    fs::create_dir(&folder).unwrap();
    append(&folder, "one\n\x1b[1mtwo\n");
    fs::rename(folder.join("server.log"), folder.join("server.log.1")).unwrap();
    append(&folder, "three\nfou");
    let mut closed = route("a-222222", Path::new("/nowhere.sock"), &folder);
    closed.state = drover_agent::proxy::RouteState::Closed;
    host.route(&[closed]).await;
    let response = call(get(&host.url("/logs/a-222222?tail=3"))).await;
    assert_eq!(response.headers()["content-type"], "text/plain; charset=utf-8");
    assert_eq!(text(response).await, "\\u{1b}[1mtwo\nthree\nfou\n");
    for (path, status, expected) in [
        ("/logs/b-222222", 503, "no_route"),
        ("/logs/a-222222?tail=none", 400, "invalid"),
        ("/logs/../etc", 400, "invalid"),
    ] {
        let response = call(get(&host.url(path))).await;
        assert_eq!((response.status().as_u16(), word(&response)), (status, Some(expected)), "{path}");
    }
    host.end().await;
}

#[tokio::test]
async fn a_followed_log_goes_on_across_rotation_and_ends_with_the_instance() {
    let host = Host::start().await;
    let folder: PathBuf = host.folder.path().join("logs");
    fs::create_dir(&folder).unwrap();
    append(&folder, "one\n");
    host.route(&[route("a-222222", Path::new("/nowhere.sock"), &folder)]).await;
    let mut response = call(get(&host.url("/logs/a-222222?tail=1&follow=true"))).await;
    assert_eq!(piece(&mut response).await, "one\n");
    append(&folder, "two\n");
    assert_eq!(piece(&mut response).await, "two\n");
    append(&folder, "three\n");
    fs::rename(folder.join("server.log"), folder.join("server.log.1")).unwrap();
    append(&folder, "four\n");
    let mut both = piece(&mut response).await;
    if !both.contains("four") {
        both += &piece(&mut response).await;
    }
    assert_eq!(both, "three\nfour\n");
    append(&folder, "last");
    host.route(&[]).await;
    assert_eq!(text(response).await, "last\n", "the instance is gone, so its log has an end");
    host.end().await;
}
