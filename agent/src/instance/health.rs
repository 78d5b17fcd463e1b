//! Probes of one server: `/health` over its unix socket, one at a time, and what it serves.
//!
//! `/health` never touches the inference queue: it says that the process lives and whether the model is loaded, no more.

use super::state::Health;
use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::rt::TokioIo;
use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{net::UnixStream, time::timeout};

/// Largest answer that is read, in bytes (`/props` carries the chat template).
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// A probe that takes longer has failed.
pub const PROBE_DEADLINE: Duration = Duration::from_secs(2);

/// Probes a server once.
pub async fn probe(socket: &Path) -> Health {
    match timeout(PROBE_DEADLINE, get(socket, "/health")).await {
        Err(_) => Health::Failing(format!("no answer from /health within {} s", PROBE_DEADLINE.as_secs())),
        Ok(Ok((StatusCode::OK, _))) => Health::Ok,
        // 503 is what llama-server answers while it loads.
        Ok(Ok((StatusCode::SERVICE_UNAVAILABLE, _))) => Health::Loading,
        Ok(Ok((status, _))) => Health::Failing(format!("/health answered {status}")),
        Ok(Err(error)) if not_listening(&error) => Health::Loading,
        Ok(Err(error)) => Health::Failing(format!("/health: {error:#}")),
    }
}

fn not_listening(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|e| matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused))
}

/// Asks a server which model file it serves.
pub async fn model_path(socket: &Path) -> anyhow::Result<PathBuf> {
    let (status, body) =
        timeout(PROBE_DEADLINE, get(socket, "/props")).await.context("/props: no answer in time")??;
    if status != StatusCode::OK {
        bail!("/props answered {status}");
    }
    let props: serde_json::Value = serde_json::from_slice(&body).context("/props")?;
    let path = props.get("model_path").and_then(|path| path.as_str()).context("/props has no model_path")?;
    Ok(PathBuf::from(path))
}

/// Probes a server once, and asks what it serves if it answers: for another model than `model` it is not well.
pub async fn probe_for(socket: &Path, model: &Path) -> Health {
    match probe(socket).await {
        Health::Ok => match model_path(socket).await {
            Ok(path) if path == model => Health::Ok,
            Ok(path) => Health::Other(format!(
                "the server serves {}, not {}: it gets no requests; stop the instance, or the process that answers on its \
                 socket",
                path.display(),
                model.display()
            )),
            Err(error) => Health::Failing(format!("it does not say what it serves: {error:#}")),
        },
        other => other,
    }
}

/// Whether an adopted server answers, for the model that its claim says; `Err` says what is wrong with it.
pub async fn answers(socket: &Path, model: &Path) -> Result<bool, String> {
    match probe_for(socket, model).await {
        Health::Ok => Ok(true),
        Health::Loading => Ok(false),
        Health::Failing(what) | Health::Other(what) => Err(what),
    }
}

/// One request on a connection of its own, which ends with it.
async fn get(socket: &Path, path: &str) -> anyhow::Result<(StatusCode, Bytes)> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::get(path)
        .header(http::header::HOST, "localhost")
        .header(http::header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())?;
    let answered = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|e| anyhow::anyhow!("answer of {path}: {e}"))?.to_bytes();
        anyhow::Ok((status, body))
    };
    let answered = answered.await;
    connection.abort();
    answered
}
