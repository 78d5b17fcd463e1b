//! PURE: the form of a segment of the spool.
//!
//! A segment is [`HEADER`] and frames: length of the payload (u32, little endian), CRC-32 over the length and the payload
//! (u32), payload. The payload is the span's sequence (u64) and its OTLP protobuf. The first frame that does not hold ends
//! the segment: lengths behind it can't be trusted, and looking for a later beginning could take a span's text for a frame.

/// First bytes of every segment.
pub(crate) const HEADER: &[u8; 8] = b"DRVSPN1\n";
/// Largest encoded span, in bytes; one that is larger is given up.
pub(crate) const SPAN_BYTES_MAX: usize = 256 << 10;
/// Bytes of a frame besides the span.
pub(crate) const OVERHEAD: usize = 16;

/// A span in a segment.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    /// Its number.
    pub sequence: u64,
    /// OTLP protobuf.
    pub span: &'a [u8],
    /// Where the frame ends within the bytes scanned.
    pub end: usize,
}

/// Appends a frame.
pub(crate) fn put(buffer: &mut Vec<u8>, sequence: u64, span: &[u8]) {
    // Callers keep to SPAN_BYTES_MAX; anything longer is cut off as damaged when it is read, never misread.
    let length = u32::try_from(span.len() + 8).unwrap_or(u32::MAX).to_le_bytes();
    let mut crc = crc32fast::Hasher::new();
    crc.update(&length);
    crc.update(&sequence.to_le_bytes());
    crc.update(span);
    buffer.extend_from_slice(&length);
    buffer.extend_from_slice(&crc.finalize().to_le_bytes());
    buffer.extend_from_slice(&sequence.to_le_bytes());
    buffer.extend_from_slice(span);
}

/// Reads frames one after the other; sequences must rise.
#[derive(Debug)]
pub(crate) struct Scan<'a> {
    bytes: &'a [u8],
    at: usize,
    after: u64,
}

impl<'a> Scan<'a> {
    /// Begins at a frame (behind the header) whose sequence must be above `after`.
    pub fn new(bytes: &'a [u8], after: u64) -> Self {
        Self { bytes, at: 0, after }
    }

    /// Whether something follows that is no whole and sound frame.
    pub fn stopped_early(&self) -> bool {
        self.at < self.bytes.len()
    }
}

impl<'a> Iterator for Scan<'a> {
    type Item = Frame<'a>;

    fn next(&mut self) -> Option<Frame<'a>> {
        let (length, rest) = self.bytes.get(self.at..)?.split_first_chunk::<4>()?;
        let (crc, rest) = rest.split_first_chunk::<4>()?;
        let payload = rest.get(..u32::from_le_bytes(*length) as usize)?;
        let mut sum = crc32fast::Hasher::new();
        sum.update(length);
        sum.update(payload);
        let (sequence, span) = payload.split_first_chunk::<8>()?;
        let sequence = u64::from_le_bytes(*sequence);
        if sum.finalize() != u32::from_le_bytes(*crc) || sequence <= self.after || span.len() > SPAN_BYTES_MAX {
            return None;
        }
        self.after = sequence;
        self.at += 8 + payload.len();
        Some(Frame { sequence, span, end: self.at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segment(spans: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (i, span) in spans.iter().enumerate() {
            put(&mut bytes, i as u64 * 2 + 1, span);
        }
        bytes
    }

    fn spans() -> impl Strategy<Value = Vec<Vec<u8>>> {
        proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 1..20)
    }

    proptest! {
        /// Whatever happens to the bytes, what is read is a beginning of what was written.
        #[test]
        fn cut_or_flipped_bytes_never_panic_and_never_invent_a_span(
            spans in spans(), cut in any::<prop::sample::Index>(), flips in proptest::collection::vec((any::<prop::sample::Index>(), 0..8u32), 0..4)
        ) {
            let whole = segment(&spans);
            let mut bytes = whole[..cut.index(whole.len() + 1)].to_vec();
            for (at, bit) in flips {
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    bytes[at] ^= 1 << bit;
                }
            }
            let mut scan = Scan::new(&bytes, 0);
            let read: Vec<_> = scan.by_ref().map(|f| (f.sequence, f.span.to_vec())).collect();
            prop_assert!(read.len() <= spans.len());
            for (i, (sequence, span)) in read.iter().enumerate() {
                prop_assert_eq!((*sequence, span), (i as u64 * 2 + 1, &spans[i]));
            }
            prop_assert_eq!(scan.stopped_early(), scan.at < bytes.len());
        }

        /// A span whose own text is a sound frame is not read as one after the frame before it was damaged.
        #[test]
        fn a_frame_inside_a_span_is_never_taken_for_a_span(inner in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut nested = Vec::new();
            put(&mut nested, 99, &inner);
            let mut bytes = segment(&[vec![1, 2, 3], nested]);
            bytes[9] ^= 1;
            prop_assert_eq!(Scan::new(&bytes, 0).count(), 0);
        }
    }

    #[test]
    fn a_sequence_that_does_not_rise_ends_the_segment() {
        let mut bytes = segment(&[vec![1], vec![2]]);
        put(&mut bytes, 3, b"again");
        let mut scan = Scan::new(&bytes, 0);
        assert_eq!(scan.by_ref().count(), 2);
        assert!(scan.stopped_early());
        assert_eq!(Scan::new(&bytes, 1).count(), 0);
    }
}
