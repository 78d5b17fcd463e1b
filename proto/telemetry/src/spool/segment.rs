//! One file of the spool: written at its end by the life that owns it, read from its front by the exporter.

use super::frame::{self, HEADER, OVERHEAD, SPAN_BYTES_MAX, Scan};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

const EXTENSION: &str = "spans";

/// A segment, and which part of it is not settled yet.
#[derive(Debug)]
pub(crate) struct Segment {
    path: PathBuf,
    /// Sequence of the first span written; names the file.
    pub first: u64,
    /// Sequence of the last span written.
    pub last: u64,
    /// Spans that are neither acknowledged nor given up.
    pub held: u64,
    /// Sound bytes.
    pub bytes: u64,
    read_from: u64,
    settled_through: u64,
}

/// Spans read from a segment.
#[derive(Debug)]
pub(crate) struct Read {
    pub spans: Vec<Span>,
    pub last: u64,
    end: u64,
}

/// How much a batch may hold; it always holds at least one span.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchLimits {
    pub spans: usize,
    pub bytes: usize,
}

impl Segment {
    /// Creates the file, open for appending.
    pub fn create(directory: &Path, first: u64) -> io::Result<(Self, File)> {
        let path = directory.join(format!("{first:020}.{EXTENSION}"));
        let mut file = OpenOptions::new().append(true).create_new(true).open(&path)?;
        if let Err(error) = file.write_all(HEADER) {
            // Nothing is in it, so nothing is lost with it.
            let _ = std::fs::remove_file(&path);
            return Err(error);
        }
        let bytes = HEADER.len() as u64;
        Ok((Self { path, first, last: first - 1, held: 0, bytes, read_from: bytes, settled_through: 0 }, file))
    }

    /// Finds out what an earlier life left in a file. The flag tells of bytes that are no sound frame.
    pub fn adopt(path: &Path, settled_through: u64) -> io::Result<(Self, bool)> {
        let bytes = std::fs::read(path)?;
        let start = HEADER.len() as u64;
        let mut segment =
            Self { path: path.to_owned(), first: 0, last: 0, held: 0, bytes: start, read_from: start, settled_through };
        let Some(frames) = bytes.strip_prefix(HEADER) else { return Ok((segment, true)) };
        let mut scan = Scan::new(frames, 0);
        for frame in scan.by_ref() {
            let end = start + frame.end as u64;
            if frame.sequence <= settled_through {
                segment.read_from = end;
            } else {
                segment.held += 1;
            }
            if segment.first == 0 {
                segment.first = frame.sequence;
            }
            segment.last = frame.sequence;
            segment.bytes = end;
        }
        Ok((segment, scan.stopped_early()))
    }

    /// The segments in a directory, in the order in which they were written.
    pub fn list(directory: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == EXTENSION) {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    }

    /// Appends whole frames. After an error the file is as before, or `false` is returned with it: then it must not be
    /// appended to again.
    pub fn append(&mut self, file: &mut File, frames: &[u8], last: u64, spans: u64) -> Result<(), (io::Error, bool)> {
        if let Err(error) = file.write_all(frames) {
            return Err((error, file.set_len(self.bytes).is_ok()));
        }
        self.bytes += frames.len() as u64;
        self.last = last;
        self.held += spans;
        Ok(())
    }

    /// Reads the next spans that are not settled. `InvalidData` when the bytes are no longer those that were written.
    pub fn read(&self, limits: BatchLimits) -> io::Result<Read> {
        let left = usize::try_from(self.bytes - self.read_from).unwrap_or(usize::MAX);
        // One frame more than the limit, so that the first always fits.
        let mut bytes = vec![0; left.min(limits.bytes + SPAN_BYTES_MAX + OVERHEAD)];
        File::open(&self.path)?.read_exact_at(&mut bytes, self.read_from)?;
        let mut read = Read { spans: Vec::new(), last: 0, end: self.read_from };
        for frame in Scan::new(&bytes, self.settled_through).take(limits.spans) {
            if frame.end > limits.bytes && !read.spans.is_empty() {
                break;
            }
            let Ok(span) = Span::decode(frame.span) else { break };
            read.spans.push(span);
            read.last = frame.sequence;
            read.end = self.read_from + frame.end as u64;
        }
        if read.spans.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame is damaged"));
        }
        Ok(read)
    }

    /// What was read is acknowledged or given up: the next read begins behind it.
    pub fn settle(&mut self, read: &Read) {
        self.read_from = read.end;
        self.settled_through = read.last;
        self.held = self.held.saturating_sub(read.spans.len() as u64);
    }

    /// Lowest sequence that is not settled.
    pub fn first_held(&self) -> u64 {
        self.first.max(self.settled_through + 1)
    }

    /// Removes the file.
    pub fn remove(&self) -> io::Result<()> {
        std::fs::remove_file(&self.path)
    }
}

/// Puts spans into frames, as many as fit into `room` bytes but at least one. Returns how many.
pub(crate) fn pack(spans: &[(u64, Vec<u8>)], room: u64, buffer: &mut Vec<u8>) -> usize {
    buffer.clear();
    let mut packed = 0;
    for (sequence, span) in spans {
        if packed > 0 && (buffer.len() + OVERHEAD + span.len()) as u64 > room {
            break;
        }
        frame::put(buffer, *sequence, span);
        packed += 1;
    }
    packed
}
