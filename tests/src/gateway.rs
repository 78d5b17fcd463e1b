//! A plain HTTP client of the gateway, for tests that look at bytes, headers and the moment of their arrival.

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;

/// The client.
#[derive(Debug, Clone)]
pub struct Gateway {
    address: String,
    client: Client<HttpConnector, Full<Bytes>>,
}

impl Gateway {
    /// A client of the gateway at "host:port".
    #[must_use]
    pub fn new(address: &str) -> Self {
        Self { address: address.to_owned(), client: Client::builder(TokioExecutor::new()).build_http() }
    }

    /// Sends a body as it is.
    ///
    /// # Errors
    /// When no answer comes.
    pub async fn post_raw(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> anyhow::Result<http::Response<Incoming>> {
        let mut request =
            http::Request::post(format!("http://{}{path}", self.address)).header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.client.request(request.body(Full::new(body))?).await.with_context(|| format!("POST {path}"))
    }

    /// Sends JSON; returns the status and the body, read whole, as JSON.
    ///
    /// # Errors
    /// When no answer comes or it is no JSON.
    pub async fn post(&self, path: &str, body: &Value) -> anyhow::Result<(u16, Value)> {
        let answer = self.post_raw(path, &[], Bytes::from(body.to_string())).await?;
        let status = answer.status().as_u16();
        let bytes = answer.into_body().collect().await?.to_bytes();
        let value =
            serde_json::from_slice(&bytes).with_context(|| format!("{status}: {}", String::from_utf8_lossy(&bytes)))?;
        Ok((status, value))
    }

    /// GET of a page of text.
    ///
    /// # Errors
    /// When no whole answer comes.
    pub async fn text(&self, path: &str) -> anyhow::Result<(u16, String)> {
        let answer = self.client.get(format!("http://{}{path}", self.address).parse()?).await?;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    /// Gets JSON.
    ///
    /// # Errors
    /// When no answer comes or it is no JSON.
    pub async fn get(&self, path: &str) -> anyhow::Result<(u16, Value)> {
        let answer = self.client.get(format!("http://{}{path}", self.address).parse()?).await?;
        let status = answer.status().as_u16();
        let bytes = answer.into_body().collect().await?.to_bytes();
        Ok((status, serde_json::from_slice(&bytes)?))
    }

    /// Streams a chat completion; calls `on_piece` with the text so far as each piece comes. Returns the whole text.
    ///
    /// # Errors
    /// When the stream does not end with `[DONE]`, or carries an error.
    pub async fn stream_chat(&self, body: &Value, mut on_piece: impl FnMut(&str)) -> anyhow::Result<String> {
        let answer = self.post_raw("/v1/chat/completions", &[], Bytes::from(body.to_string())).await?;
        ensure!(answer.status().is_success(), "{}", answer.status());
        let (mut text, mut rest, mut done) = (String::new(), Vec::new(), false);
        let mut body = answer.into_body();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            rest.extend_from_slice(&data);
            while let Some(end) = rest.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                let Some(event) = std::str::from_utf8(&line)?.trim().strip_prefix("data: ").map(str::to_owned) else {
                    continue;
                };
                if event == "[DONE]" {
                    done = true;
                    continue;
                }
                let event: Value = serde_json::from_str(&event)?;
                ensure!(event.get("error").is_none(), "the stream carries an error: {event}");
                if let Some(piece) = event["choices"][0]["delta"]["content"].as_str() {
                    text.push_str(piece);
                    on_piece(&text);
                }
            }
        }
        ensure!(done, "the stream ended without [DONE] after {} characters", text.len());
        Ok(text)
    }
}
