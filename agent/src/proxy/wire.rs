//! What the agent and its proxy say to each other over `proxy.sock`: one JSON object a line, lines bounded. Everything is
//! level-triggered: each message carries the whole state, so that a lost or repeated one does no harm.

use super::route::Route;
use futures::{SinkExt as _, StreamExt as _};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{collections::BTreeMap, io, net::SocketAddr};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::codec::{FramedRead, FramedWrite, LinesCodec, LinesCodecError};

/// Longest line, in bytes: room for thousands of routes.
const LINE_BYTES_MAX: usize = 4 << 20;

/// From the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum FromAgent {
    /// The full set of routes.
    Routes {
        /// Rises with every set of this connection.
        sequence: u64,
        /// The set.
        routes: Vec<Route>,
    },
    /// Drain, then end.
    End {
        /// Longest time to drain, in milliseconds.
        within_ms: u64,
    },
}

/// From the proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum FromProxy {
    /// First message.
    Hello {
        /// Process id.
        pid: u32,
        /// Version of the build.
        version: String,
        /// Address of the HTTP listener.
        address: SocketAddr,
    },
    /// Repeated when it changes.
    State {
        /// Sequence of the last set of routes of this connection that is in force; 0 when there was none.
        applied: u64,
        /// Requests in flight by instance; those without any are left out.
        in_flight: BTreeMap<String, u64>,
    },
    /// It is about to end: start another, which takes over its listener. This one ends when it has drained.
    Ending,
}

/// Reads messages.
pub(super) struct Reader<R>(FramedRead<R, LinesCodec>);

/// Writes messages.
pub(super) struct Writer<W>(FramedWrite<W, LinesCodec>);

fn io_error(error: LinesCodecError) -> io::Error {
    match error {
        LinesCodecError::Io(error) => error,
        LinesCodecError::MaxLineLengthExceeded => {
            io::Error::new(io::ErrorKind::InvalidData, format!("a line is longer than {LINE_BYTES_MAX} bytes"))
        }
    }
}

impl<R: AsyncRead + Unpin> Reader<R> {
    pub(super) fn new(inner: R) -> Self {
        Self(FramedRead::new(inner, LinesCodec::new_with_max_length(LINE_BYTES_MAX)))
    }

    /// The next message; `None` when the other end has closed. Safe to cancel.
    pub(super) async fn next<M: DeserializeOwned>(&mut self) -> io::Result<Option<M>> {
        let Some(line) = self.0.next().await else { return Ok(None) };
        let message = serde_json::from_str(&line.map_err(io_error)?)?;
        Ok(Some(message))
    }
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub(super) fn new(inner: W) -> Self {
        Self(FramedWrite::new(inner, LinesCodec::new()))
    }

    pub(super) async fn send<M: Serialize>(&mut self, message: &M) -> io::Result<()> {
        self.0.send(serde_json::to_string(message)?).await.map_err(io_error)
    }
}
