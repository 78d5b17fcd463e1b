//! Server-sent events, as far as chat completions use them: bytes in, the data of whole events out. Pure.
//! Format: <https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream>.

/// Longest event that is read, in bytes.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// The stream sent an event that is longer than any of ours.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event of the stream is longer than {EVENT_BYTES_MAX} bytes")]
pub struct TooLong;

/// Reads a stream piece by piece, wherever it is cut.
#[derive(Debug, Default)]
pub struct Reader {
    line: Vec<u8>,
    data: String,
}

impl Reader {
    /// Takes the next bytes, gives the data of the events that they complete. Comments (pings) are left out.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<String>, TooLong> {
        let mut events = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                if self.line.len() + self.data.len() > EVENT_BYTES_MAX {
                    return Err(TooLong);
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let text = String::from_utf8_lossy(&line);
            let text = text.strip_suffix('\r').unwrap_or(&text);
            if text.is_empty() {
                if !self.data.is_empty() {
                    events.push(std::mem::take(&mut self.data));
                }
            } else if let Some(data) = text.strip_prefix("data:") {
                if !self.data.is_empty() {
                    self.data.push('\n');
                }
                self.data.push_str(data.strip_prefix(' ').unwrap_or(data));
            }
        }
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] =
        ": ping\n\ndata: {\"a\":\"ä\"}\n\nevent: x\r\ndata: one\r\ndata:two\r\n\r\ndata: [DONE]\n\n".as_bytes();

    #[test]
    fn events_come_whole_wherever_the_stream_is_cut() {
        let want = ["{\"a\":\"ä\"}", "one\ntwo", "[DONE]"];
        assert_eq!(Reader::default().push(STREAM).unwrap(), want);
        for cut in 0..STREAM.len() {
            let mut reader = Reader::default();
            let mut events = reader.push(&STREAM[..cut]).unwrap();
            events.extend(reader.push(&STREAM[cut..]).unwrap());
            assert_eq!(events, want, "cut at {cut}");
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut reader = Reader::default();
        assert_eq!(reader.push(&vec![b'x'; EVENT_BYTES_MAX + 1]), Err(TooLong));
    }
}
