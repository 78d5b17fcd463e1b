//! PURE. llama-server's own timings, found near the end of an answer.

use serde::Deserialize;

/// Bytes kept of an answer's end: the last event with its timings takes about 600, `[DONE]` and usage follow.
const TAIL_BYTES: usize = 8 << 10;

/// The end of an answer.
#[derive(Debug, Default)]
pub(super) struct Tail(Vec<u8>);

impl Tail {
    /// Takes the next bytes of the answer.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(TAIL_BYTES)..];
        // Grows to twice its size before it is cut, so that each byte is moved about once.
        if self.0.len() + bytes.len() > 2 * TAIL_BYTES {
            let keep = TAIL_BYTES - bytes.len();
            self.0.drain(..self.0.len().saturating_sub(keep));
        }
        self.0.extend_from_slice(bytes);
    }

    /// The timings, where the answer had any.
    pub(super) fn timings(&self) -> Option<Timings> {
        scan(&self.0)
    }
}

/// What llama-server measured (fields as it names them; `_ms` are milliseconds, `_n` tokens).
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Timings {
    pub(super) cache_n: Option<f64>,
    pub(super) prompt_n: Option<f64>,
    pub(super) prompt_ms: Option<f64>,
    pub(super) prompt_per_second: Option<f64>,
    pub(super) predicted_n: Option<f64>,
    pub(super) predicted_ms: Option<f64>,
    pub(super) predicted_per_second: Option<f64>,
}

/// The last `"timings":{…}`. The words of a generated text can't be mistaken for it: their quotes are escaped.
fn scan(bytes: &[u8]) -> Option<Timings> {
    const KEY: &[u8] = b"\"timings\"";
    let at = bytes.windows(KEY.len()).rposition(|window| window == KEY)?;
    let rest = bytes[at + KEY.len()..].trim_ascii_start().strip_prefix(b":")?;
    // Reads one value and stops there; what follows is the rest of the event.
    serde_json::Deserializer::from_slice(rest).into_iter::<Timings>().next()?.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMINGS: &str =
        r#""timings":{"cache_n":2,"prompt_n":23,"prompt_ms":3.844,"predicted_n":3,"predicted_ms":0.687,"new":{}}"#;

    fn seen(pieces: &[&str]) -> Option<Timings> {
        let mut tail = Tail::default();
        pieces.iter().for_each(|piece| tail.push(piece.as_bytes()));
        tail.timings()
    }

    #[test]
    fn timings_are_found_in_streams_and_bodies_however_they_are_cut() {
        let stream = format!("data: {{\"choices\":[],{TIMINGS}}}\n\ndata: [DONE]\n\n");
        let expected = Timings {
            cache_n: Some(2.0),
            prompt_n: Some(23.0),
            prompt_ms: Some(3.844),
            predicted_n: Some(3.0),
            predicted_ms: Some(0.687),
            ..Timings::default()
        };
        for cut in 0..stream.len() {
            assert_eq!(seen(&[&stream[..cut], &stream[cut..]]), Some(expected), "cut at {cut}");
        }
        let long = "x".repeat(100_000);
        assert_eq!(seen(&[&long, &long, &format!("{{{TIMINGS}}}")]), Some(expected));
        assert_eq!(seen(&[&format!("{{{TIMINGS}}}"), &long, &long]), None, "too far from the end");
    }

    #[test]
    fn a_text_that_speaks_of_timings_is_not_taken_for_them() {
        assert_eq!(seen(&[r#"{"content":"\"timings\":{\"prompt_n\":1}"}"#]), None);
        assert_eq!(seen(&[r#"{"timings":{"prompt_n":"#]), None, "cut off");
        assert_eq!(seen(&[r#"{"timings":"none"}"#]), None);
        assert_eq!(seen(&[""]), None);
    }
}
