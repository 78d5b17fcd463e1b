//! PURE. Follows a stream of server-sent events, so that a broken one ends with an error that clients can read.
//!
//! Whole events pass through byte for byte; the beginning of one is held back until the rest is there. So when the upstream
//! breaks, what the client got so far ends between two events, and the error that is added is an event of its own. An event
//! too large to hold passes through in pieces; then its line and event are ended first.

use bytes::{Bytes, BytesMut};

/// Most bytes held back.
const HELD_BYTES_MAX: usize = 1 << 20;

/// What a piece of the stream brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// To be handed on; may be empty.
    pub(super) pass: Bytes,
    /// True when it holds more than comments.
    pub(super) progress: bool,
}

/// State of a stream of events.
#[derive(Debug, Default)]
pub(super) struct Events {
    held: BytesMut,
    /// The beginning of the current event was handed on.
    open: bool,
    /// The last event said that nothing follows.
    closed: bool,
}

impl Events {
    /// Takes the next bytes.
    pub(super) fn push(&mut self, chunk: Bytes) -> Step {
        let pass = if self.held.is_empty() && last_end(&chunk) == Some(chunk.len()) {
            chunk // whole events, as llama-server sends them: nothing is copied
        } else {
            self.held.extend_from_slice(&chunk);
            match last_end(&self.held) {
                Some(end) => self.held.split_to(end).freeze(),
                None if self.held.len() > HELD_BYTES_MAX => {
                    self.open = true;
                    return Step { pass: self.held.split().freeze(), progress: true };
                }
                None => Bytes::new(),
            }
        };
        if pass.is_empty() {
            return Step { pass, progress: false };
        }
        self.open = false;
        let speaks = |line: &&[u8]| !line.is_empty() && !line.starts_with(b":");
        let end = pass.split(|&b| b == b'\n').rev().map(<[u8]>::trim_ascii).find(speaks).map(says_end);
        self.closed = end.unwrap_or(self.closed);
        Step { pass, progress: end.is_some() }
    }

    /// Whether the stream may end here: its last event said so, and nothing is left over.
    pub(super) fn is_complete(&self) -> bool {
        self.closed && self.held.trim_ascii().is_empty() && !self.open
    }

    /// What to send instead of the rest of a broken stream: an event with the error, a JSON object.
    pub(super) fn break_off(&mut self, error: &str) -> Bytes {
        self.held.clear();
        let end = if std::mem::take(&mut self.open) { "\n\n" } else { "" };
        format!("{end}data: {error}\n\n").into()
    }
}

/// The end of the last whole event: behind the last empty line.
fn last_end(bytes: &[u8]) -> Option<usize> {
    let mut before = bytes.len();
    loop {
        let at = bytes[..before].iter().rposition(|&b| b == b'\n')?;
        if bytes[..at].ends_with(b"\n") || bytes[..at].ends_with(b"\n\r") {
            return Some(at + 1);
        }
        before = at;
    }
}

/// `[DONE]`, or llama-server's own error: nothing follows either of them.
fn says_end(line: &[u8]) -> bool {
    let data = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii_start);
    data.is_some_and(|data| data == b"[DONE]" || data.starts_with(b"{\"error\"")) || line.starts_with(b"error:")
}

#[cfg(test)]
#[path = "tests/sse.rs"]
mod tests;
