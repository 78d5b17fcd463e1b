//! The spool: encoded spans on disk, this life's and those that earlier lives left, in a bounded number of bytes.
//!
//! Owns: `<root>/<epoch>/` for each life: the file `life` (counters, resource, lock) and segments of spans. Spans are read in
//! order, the earlier lives' first; one batch at a time is out. When the bound is reached the oldest segment is given up.
//! Must never: free what is neither acknowledged nor counted, or send spans of two epochs in one batch.

mod frame;
mod given_up;
mod inspect;
mod life;
mod segment;
#[cfg(test)]
mod tests;

pub use given_up::{GivenUp, Reason};
pub use inspect::{LifeOnDisk, SegmentOnDisk, inspect};
pub use life::Earlier;
pub(crate) use life::{Outcome, fits};
pub(crate) use segment::BatchLimits;

use crate::mapped::Counters;
use life::Life;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::InstrumentationScope,
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans},
};
use segment::Read;
use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Fewest bytes of a spool.
pub(crate) const BYTES_MIN: u64 = 64 << 10;
/// Most earlier lives that are looked after at a time: each has an open file.
const LIVES_MAX: usize = 32;
/// Most reports of earlier lives that are remembered.
const REPORTS_MAX: usize = 64;

/// The spool.
#[derive(Debug)]
pub(crate) struct Spool {
    root: PathBuf,
    bytes_max: u64,
    segment_max: u64,
    current: Life,
    earlier: VecDeque<Life>,
    reports: VecDeque<Earlier>,
    /// Earlier lives were left for later.
    more: bool,
    in_flight: Option<InFlight>,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct InFlight {
    epoch: String,
    read: Read,
}

/// Spans of one epoch, to be sent as they are until they are settled.
#[derive(Debug, Clone)]
pub(crate) struct Batch {
    pub request: ExportTraceServiceRequest,
    pub spans: u64,
}

impl Spool {
    /// Opens the spool for a new life and takes over what earlier lives left. The error tells why spans can't be kept on
    /// disk for now, if so.
    pub fn open(
        root: &Path,
        bytes_max: u64,
        epoch: impl Fn() -> String,
        resource: impl Fn(&str) -> Resource,
    ) -> io::Result<(Self, Option<io::Error>)> {
        let mut attempts = 0;
        let (current, error) = loop {
            attempts += 1;
            let epoch = epoch();
            let resource = resource(&epoch);
            match Life::begin(root, epoch, resource) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempts < 3 => {}
                other => break other?,
            }
        };
        let mut spool = Self {
            root: root.to_owned(),
            bytes_max,
            segment_max: (bytes_max / 16).clamp(BYTES_MIN / 16, 4 << 20),
            current,
            earlier: VecDeque::new(),
            reports: VecDeque::new(),
            more: false,
            in_flight: None,
            buffer: Vec::new(),
        };
        spool.adopt();
        Ok((spool, error))
    }

    /// Counters of this life.
    pub fn counters(&self) -> Arc<Counters> {
        self.current.counters.clone()
    }

    /// Epoch of this life.
    pub fn epoch(&self) -> &str {
        &self.current.epoch
    }

    /// What earlier lives left, as found.
    pub fn reports(&self) -> Vec<Earlier> {
        self.reports.iter().cloned().collect()
    }

    /// What this life gave up, and how many spans of it are in ranges no longer remembered.
    pub fn given_up(&self) -> (Vec<GivenUp>, u64) {
        (self.current.log.ranges(), self.current.log.forgotten())
    }

    /// Counts spans of this life that never came here as given up.
    pub fn give_up(&mut self, range: GivenUp) {
        self.current.give_up(range);
    }

    /// Appends encoded spans with rising sequences. What can't be kept is given up and counted.
    pub fn append(&mut self, mut spans: &[(u64, Vec<u8>)]) {
        let mut buffer = std::mem::take(&mut self.buffer);
        while !spans.is_empty() {
            let packed = self.current.pack(spans, self.segment_max, &mut buffer);
            let (now, rest) = spans.split_at(packed);
            if self.make_room(buffer.len() as u64) {
                self.current.append(now, &buffer);
            } else if let (Some(first), Some(last)) = (now.first(), now.last()) {
                let spans = now.len() as u64;
                let range = GivenUp { first: first.0, last: last.0, spans, reason: Reason::SpoolFull };
                self.current.give_up(range);
            }
            spans = rest;
        }
        self.buffer = buffer;
    }

    fn make_room(&mut self, bytes: u64) -> bool {
        loop {
            let used = self.current.bytes() + self.earlier.iter().map(Life::bytes).sum::<u64>();
            if used + bytes <= self.bytes_max {
                return true;
            }
            let out = self.in_flight.as_ref().map(|out| out.epoch.as_str());
            let mut lives = self.earlier.iter_mut().chain([&mut self.current]);
            if !lives.any(|life| life.drop_oldest(out == Some(life.epoch.as_str()))) {
                return false;
            }
        }
    }

    /// The next batch: the one that is out if there is one, else the oldest spans. `None` when nothing is held.
    pub fn next_batch(&mut self, limits: BatchLimits) -> io::Result<Option<Batch>> {
        if self.in_flight.is_none() {
            self.in_flight = self.read_next(limits)?;
        }
        let Some(out) = &self.in_flight else { return Ok(None) };
        let Some(life) = self.earlier.front().filter(|l| l.epoch == out.epoch).or(Some(&self.current)) else {
            return Ok(None);
        };
        let scope = InstrumentationScope { name: crate::install::SCOPE.to_owned(), ..Default::default() };
        let scope_spans =
            vec![ScopeSpans { scope: Some(scope), spans: out.read.spans.clone(), schema_url: String::new() }];
        let resource_spans =
            vec![ResourceSpans { resource: Some(life.resource.clone()), scope_spans, schema_url: String::new() }];
        let spans = out.read.spans.len() as u64;
        Ok(Some(Batch { request: ExportTraceServiceRequest { resource_spans }, spans }))
    }

    fn read_next(&mut self, limits: BatchLimits) -> io::Result<Option<InFlight>> {
        loop {
            while let Some(life) = self.earlier.front_mut() {
                if let Some(read) = life.read(limits)? {
                    return Ok(Some(InFlight { epoch: life.epoch.clone(), read }));
                }
                if let Some(life) = self.earlier.pop_front() {
                    life.remove();
                }
            }
            if !self.more {
                break;
            }
            self.adopt();
        }
        let read = self.current.read(limits)?;
        Ok(read.map(|read| InFlight { epoch: self.current.epoch.clone(), read }))
    }

    /// Settles the batch that is out.
    pub fn settle(&mut self, outcome: Outcome) {
        let Some(out) = self.in_flight.take() else { return };
        let earlier = self.earlier.iter_mut().find(|life| life.epoch == out.epoch);
        earlier.unwrap_or(&mut self.current).settle(&out.read, outcome);
    }

    /// Spans held, of all lives.
    pub fn held(&self) -> u64 {
        self.current.held() + self.earlier.iter().map(Life::held).sum::<u64>()
    }

    /// This life ends in order: all that it numbered is here or counted.
    pub fn end(&mut self) -> io::Result<()> {
        self.current.counters.set_ended();
        self.current.sync()
    }

    /// Takes over the directories of lives that are over. What can't be read is left alone and told.
    fn adopt(&mut self) {
        self.more = false;
        let Ok(entries) = std::fs::read_dir(&self.root) else { return };
        let mut found: Vec<_> = entries
            .flatten()
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok(), entry.file_name().into_string().ok()?)))
            .filter(|(_, name)| uuid::Uuid::try_parse(name).is_ok() && *name != self.current.epoch)
            .collect();
        found.sort();
        for (_, epoch) in found {
            if self.earlier.len() == LIVES_MAX {
                self.more = true;
                return;
            }
            let directory = self.root.join(&epoch);
            match Life::adopt(&directory, epoch) {
                Ok((life, report)) => {
                    if self.reports.len() == REPORTS_MAX {
                        self.reports.pop_front();
                    }
                    self.reports.push_back(report);
                    if life.held() == 0 {
                        life.remove();
                    } else {
                        self.earlier.push_back(life);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    // Never begun, so nothing was numbered in it.
                    let _ = std::fs::remove_file(directory.join(crate::mapped::FILE));
                    let _ = std::fs::remove_dir(&directory);
                }
                Err(error) => {
                    tracing::warn!(directory = %directory.display(), %error, "spans of an earlier life can't be read");
                }
            }
        }
    }
}
