//! `chat` against a gateway of canned answers.

#![allow(clippy::unwrap_used, reason = "a test")]

mod fake;

use fake::{drover, parts};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A gateway that gives one answer and closes; gives its address and, at the end, the request that it got.
async fn gateway(head: &str, body: &str) -> (String, tokio::task::JoinHandle<String>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answer = format!("HTTP/1.1 {head}\r\nconnection: close\r\n\r\n{body}");
    let got = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        let mut bytes = [0; 4096];
        while !String::from_utf8_lossy(&request).contains("\"stream\":true") {
            let n = stream.read(&mut bytes).await.unwrap();
            assert!(n > 0, "the request ends early");
            request.extend_from_slice(&bytes[..n]);
        }
        stream.write_all(answer.as_bytes()).await.unwrap();
        String::from_utf8(request).unwrap()
    });
    (address, got)
}

async fn chat(gateway: &str, words: &[&str]) -> (i32, String, String) {
    let mut command = drover("127.0.0.1:1", &["--gateway", gateway, "chat"]);
    let output = command.args(words).output();
    parts(&tokio::time::timeout(Duration::from_secs(30), output).await.unwrap().unwrap())
}

const CHUNKS: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":null}}]}\n\n\
    data: {\"choices\":[{\"delta\":{\"content\":\"Good \"}}]}\n\n: ping\n\n\
    data: {\"choices\":[{\"delta\":{\"content\":\"day\"},\"finish_reason\":\"length\"}]}\n\n";

#[tokio::test]
async fn the_answer_is_printed_and_the_request_says_what_was_asked() {
    let (address, got) = gateway("200 OK", &format!("{CHUNKS}data: [DONE]\n\n")).await;
    let words = ["tiny", "Hello", "--max-tokens", "7", "--temperature", "0", "--seed", "3"];
    assert_eq!(chat(&address, &words).await, (0, "Good day\n".to_owned(), String::new()));
    let request = got.await.unwrap();
    assert!(request.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"), "{request}");
    assert!(request.to_lowercase().contains("\r\ntraceparent: 00-"), "{request}");
    let body: serde_json::Value = serde_json::from_str(request.split("\r\n\r\n").nth(1).unwrap()).unwrap();
    assert_eq!((&body["model"], &body["max_tokens"], &body["seed"]), (&"tiny".into(), &7.into(), &3.into()));
    assert_eq!((&body["messages"][0]["content"], &body["temperature"]), (&"Hello".into(), &0.0.into()));
}

#[tokio::test]
async fn with_json_every_chunk_is_a_line() {
    let (address, _) = gateway("200 OK", &format!("{CHUNKS}data: [DONE]\n\n")).await;
    let (code, out, err) = chat(&address, &["tiny", "Hello", "-o", "json"]).await;
    assert_eq!((code, out.lines().count()), (0, 3), "{err}");
    assert!(out.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()), "{out}");
}

#[tokio::test]
async fn a_stream_that_breaks_and_a_refusal_are_failures() {
    let (address, _) = gateway("200 OK", CHUNKS).await;
    let broken = "drover: the answer broke off: the stream ended before [DONE]\n";
    assert_eq!(chat(&address, &["tiny", "Hello"]).await, (1, "Good day\n".to_owned(), broken.to_owned()));

    let body =
        r#"{"error":{"message":"model \"x\" is not served","type":"invalid_request_error","code":"model_not_found"}}"#;
    let (address, _) = gateway("404 Not Found", body).await;
    let refused = "drover: model \"x\" is not served (model_not_found, HTTP 404)\n";
    assert_eq!(chat(&address, &["x", "Hello"]).await, (1, String::new(), refused.to_owned()));

    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (code, _, err) = chat(&closed, &["tiny", "Hello"]).await;
    assert_eq!(code, 3, "{err}");
    assert!(err.contains(&closed), "{err}");
}
