use crate::support::*;
use std::net::SocketAddr;
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

/// The kernel's timer of an IPv4 connection, as in the sixth field of /proc/net/tcp: "02:…" is the one of keep-alive.
fn timer(from: SocketAddr, to: SocketAddr) -> Option<String> {
    let hex = |address: SocketAddr| {
        let SocketAddr::V4(address) = address else { panic!("no IPv4 address") };
        format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port())
    };
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        (fields[1] == hex(from) && fields[2] == hex(to)).then(|| fields[5].to_owned())
    })
}

#[tokio::test]
async fn a_connection_over_which_nothing_comes_is_asked_whether_it_is_there() {
    let host = Host::start().await;
    let upstream = Upstream::listen(host.folder.path());
    host.route(&[route("a-222222", &upstream.socket, host.folder.path())]).await;
    let mut stream = TcpStream::connect(host.address()).await.unwrap();
    // The head of a request whose body never comes: a llama-server's thread would wait for it.
    stream.write_all(b"POST /i/a-222222/v1/x HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n").await.unwrap();
    until("the request is in flight", || host.proxy().in_flight("a-222222") == 1).await;
    let (from, to) = (host.address(), stream.local_addr().unwrap());
    until("nothing is on its way", || timer(from, to).is_some_and(|timer| !timer.starts_with("01:"))).await;
    let timer = timer(from, to).unwrap();
    assert!(timer.starts_with("02:"), "{timer}");
    // And one who says goodbye frees everything at once.
    drop(stream);
    until("nothing is in flight", || host.proxy().in_flight("a-222222") == 0).await;
    host.end().await;
}
