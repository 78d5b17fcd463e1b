//! One life of a span source on disk: a directory with its counters and its segments.

use super::{
    frame::SPAN_BYTES_MAX,
    given_up::{GivenUp, Log, Reason},
    segment::{BatchLimits, Read, Segment, pack},
};
use crate::mapped::{self, Counters, Progress};
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message as _;
use std::{
    collections::VecDeque,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The life.
#[derive(Debug)]
pub(crate) struct Life {
    pub epoch: String,
    pub resource: Resource,
    pub counters: Arc<Counters>,
    directory: PathBuf,
    segments: VecDeque<Segment>,
    /// Open end of the last segment.
    active: Option<File>,
    pub log: Log,
    /// The first error of a row of failed writes has been told.
    disk_failed: bool,
}

/// What an earlier life left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Earlier {
    /// Its epoch.
    pub epoch: String,
    /// Spans that it numbered.
    pub issued: u64,
    /// Spans acknowledged by the time it was found.
    pub acknowledged: u64,
    /// Spans rejected out of accepted batches by then.
    pub rejected: u64,
    /// Spans found in its spool; they are exported now.
    pub held: u64,
    /// Spans that it gave up itself.
    pub given_up: u64,
    /// Spans that it numbered and that are nowhere: in memory or on a damaged part of the disk when it ended.
    pub lost: u64,
    /// Segments with bytes behind the last sound span.
    pub torn: u64,
    /// Whether it ended in order.
    pub ended: bool,
}

impl Life {
    /// A life that begins now. Its directory is `root/<epoch>`; without a disk its counters are in memory.
    pub fn begin(root: &Path, epoch: String, resource: Resource) -> io::Result<(Self, Option<io::Error>)> {
        let directory = root.join(&epoch);
        let made =
            std::fs::create_dir_all(&directory).and_then(|()| Counters::create(&directory, &resource.encode_to_vec()));
        let (counters, error) = match made {
            Ok(counters) => (counters, None),
            // Not found: taken for an abandoned directory by another process before the file was in it.
            Err(error) if matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            Err(error) => (Counters::in_memory()?, Some(error)),
        };
        let counters = Arc::new(counters);
        Ok((Self::new(directory, epoch, resource, counters), error))
    }

    /// Takes over what an earlier life left. `WouldBlock` when it still goes on. The life's losses are counted as given up
    /// here, so that a second crash does not count them again.
    pub fn adopt(directory: &Path, epoch: String) -> io::Result<(Self, Earlier)> {
        let (counters, resource) = match Counters::open(directory) {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::NotFound => (Counters::in_memory()?, None),
            Err(error) => return Err(error),
        };
        let resource = resource.and_then(|bytes| Resource::decode(&*bytes).ok());
        let resource = resource.unwrap_or_else(|| crate::resource::unknown(&epoch));
        let mut life = Self::new(directory.to_owned(), epoch, resource, Arc::new(counters));
        let progress = life.counters.progress();
        let mut torn = 0;
        for path in Segment::list(directory)? {
            let (segment, damaged) = Segment::adopt(&path, progress.settled_through)?;
            torn += u64::from(damaged);
            if segment.held == 0 {
                segment.remove()?;
            } else {
                life.counters.raise_issued(segment.last);
                life.segments.push_back(segment);
            }
        }
        let (issued, held) = (life.counters.issued(), life.held());
        let known = progress.acknowledged + progress.rejected + progress.given_up + held;
        let earlier = Earlier {
            epoch: life.epoch.clone(),
            issued,
            acknowledged: progress.acknowledged,
            rejected: progress.rejected,
            held,
            given_up: progress.given_up,
            lost: issued.saturating_sub(known),
            torn,
            ended: life.counters.ended(),
        };
        if earlier.lost > 0 {
            let first = progress.settled_through + 1;
            life.give_up(GivenUp { first, last: issued, spans: earlier.lost, reason: Reason::Crashed });
        }
        Ok((life, earlier))
    }

    fn new(directory: PathBuf, epoch: String, resource: Resource, counters: Arc<Counters>) -> Self {
        let (segments, log) = (VecDeque::new(), Log::default());
        Self { epoch, resource, counters, directory, segments, active: None, log, disk_failed: false }
    }

    /// Spans in the spool that are not settled.
    pub fn held(&self) -> u64 {
        self.segments.iter().map(|s| s.held).sum()
    }

    /// Bytes of its segments.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|s| s.bytes).sum()
    }

    /// Counts a range as given up.
    pub fn give_up(&mut self, range: GivenUp) {
        let progress = self.counters.progress();
        self.counters.set_progress(Progress { given_up: progress.given_up + range.spans, ..progress });
        self.log.add(range);
    }

    /// Packs the next spans for the last segment, or for a new one when the last is full.
    pub fn pack(&mut self, spans: &[(u64, Vec<u8>)], segment_max: u64, buffer: &mut Vec<u8>) -> usize {
        let used = if self.active.is_some() { self.segments.back().map_or(0, |s| s.bytes) } else { 0 };
        let packed = pack(spans, segment_max.saturating_sub(used), buffer);
        if used + buffer.len() as u64 > segment_max {
            self.active = None;
            return pack(spans, segment_max, buffer);
        }
        packed
    }

    /// Appends packed spans; on an error they are given up.
    pub fn append(&mut self, spans: &[(u64, Vec<u8>)], frames: &[u8]) {
        let (Some(first), Some(last)) = (spans.first(), spans.last()) else { return };
        let (first, last, count) = (first.0, last.0, spans.len() as u64);
        match self.write(frames, first, last, count) {
            Ok(()) if self.disk_failed => {
                self.disk_failed = false;
                tracing::info!(directory = %self.directory.display(), "spans are written to disk again");
            }
            Ok(()) => {}
            Err(error) => {
                if !std::mem::replace(&mut self.disk_failed, true) {
                    tracing::warn!(
                        directory = %self.directory.display(), %error,
                        "spans can't be written to disk: they are given up and counted until it works again"
                    );
                }
                self.give_up(GivenUp { first, last, spans: count, reason: Reason::Disk });
            }
        }
    }

    fn write(&mut self, frames: &[u8], first: u64, last: u64, spans: u64) -> io::Result<()> {
        let mut file = match self.active.take() {
            Some(file) => file,
            None => {
                std::fs::create_dir_all(&self.directory)?;
                let (segment, file) = Segment::create(&self.directory, first)?;
                self.segments.push_back(segment);
                file
            }
        };
        let Some(segment) = self.segments.back_mut() else { return Err(io::Error::other("no segment")) };
        match segment.append(&mut file, frames, last, spans) {
            Ok(()) => self.active = Some(file),
            Err((error, usable)) => {
                self.active = usable.then_some(file);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Reads the next batch; `None` when nothing is held. What can't be read any more is given up.
    pub fn read(&mut self, limits: BatchLimits) -> io::Result<Option<Read>> {
        while let Some(segment) = self.segments.front() {
            if segment.held > 0 {
                match segment.read(limits) {
                    Ok(read) => return Ok(Some(read)),
                    Err(error) if is_damage(&error) => {
                        tracing::warn!(directory = %self.directory.display(), %error, "a part of the span spool is lost");
                        self.drop_segment(0, Reason::Damaged);
                        continue;
                    }
                    Err(error) => return Err(error),
                }
            }
            if self.is_active(0) {
                return Ok(None);
            }
            self.remove_front();
        }
        Ok(None)
    }

    /// Settles what was read last: acknowledged but for `rejected` of it, or given up.
    pub fn settle(&mut self, read: &Read, outcome: Outcome) {
        let spans = read.spans.len() as u64;
        let mut progress = Progress { settled_through: read.last, ..self.counters.progress() };
        let first = self.segments.front().map_or(read.last, Segment::first_held);
        match outcome {
            Outcome::Acknowledged { rejected } => {
                let rejected = rejected.min(spans);
                progress.acknowledged += spans - rejected;
                progress.rejected += rejected;
            }
            Outcome::Refused => {
                progress.given_up += spans;
                self.log.add(GivenUp { first, last: read.last, spans, reason: Reason::Refused });
            }
        }
        // Counted first, freed then: a crash in between sends nothing twice and loses nothing.
        self.counters.set_progress(progress);
        if let Some(segment) = self.segments.front_mut() {
            segment.settle(read);
        }
        if self.segments.front().is_some_and(|s| s.held == 0) && !self.is_active(0) {
            self.remove_front();
        }
    }

    /// Gives up the oldest segment that is neither being written nor, if `pinned`, being exported. False: there is none.
    pub fn drop_oldest(&mut self, pinned: bool) -> bool {
        let index = usize::from(pinned);
        if index >= self.segments.len() || self.is_active(index) {
            return false;
        }
        self.drop_segment(index, Reason::SpoolFull);
        true
    }

    fn drop_segment(&mut self, index: usize, reason: Reason) {
        if self.is_active(index) {
            self.active = None;
        }
        let Some(segment) = self.segments.remove(index) else { return };
        // Freed first, counted then: after a crash in between, the next life counts them as lost.
        let _ = segment.remove();
        if segment.held > 0 {
            self.give_up(GivenUp { first: segment.first_held(), last: segment.last, spans: segment.held, reason });
        }
    }

    fn is_active(&self, index: usize) -> bool {
        self.active.is_some() && index + 1 == self.segments.len()
    }

    fn remove_front(&mut self) {
        if let Some(segment) = self.segments.pop_front() {
            // If this fails the next life finds it settled and removes it.
            let _ = segment.remove();
        }
    }

    /// Makes what was written last a loss of power, too.
    pub fn sync(&self) -> io::Result<()> {
        self.active.as_ref().map_or(Ok(()), File::sync_data)
    }

    /// Removes what is left of a life that is wholly settled. The lock is held until after.
    pub fn remove(self) {
        for segment in &self.segments {
            let _ = segment.remove();
        }
        // Without a file of its own it may be a life that begins this moment in another process.
        if self.counters.on_disk() {
            let _ = std::fs::remove_file(self.directory.join(mapped::FILE));
        }
        let _ = std::fs::remove_dir(&self.directory);
    }
}

/// What became of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Outcome {
    /// Taken, but for a number of spans.
    Acknowledged { rejected: u64 },
    /// Refused for good.
    Refused,
}

fn is_damage(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::NotFound)
}

/// Whether the spool takes a span of this size at all.
pub(crate) fn fits(span: &[u8]) -> bool {
    span.len() <= SPAN_BYTES_MAX
}
