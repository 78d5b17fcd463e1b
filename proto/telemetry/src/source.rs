//! A source of numbered spans: queue in memory, thread that writes the spool, task that exports from it.
//!
//! Owns: the thread and the task; others hold the cheap [`Handle`]. [`crate::init`] makes the one of a program; tests make
//! their own.

use crate::{
    SEQUENCE_ATTRIBUTE,
    environment::Limits,
    export,
    mapped::Counters,
    processor::Numbering,
    queue::{Queue, Taken},
    resource,
    sampler::Counting,
    sink::Sink,
    spool::{self, Earlier, GivenUp, Reason, Spool},
};
use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::Span,
};
use opentelemetry_sdk::trace::{Sampler, SpanData};
use prost::Message as _;
use std::{
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::Duration,
};
use tokio::sync::{Notify, watch};

/// State of a source, as its coordinator is told: `highest_sequence = acknowledged + rejected + given_up + (held or in memory)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// This life of the source.
    pub epoch: String,
    /// Spans numbered so far.
    pub highest_sequence: u64,
    /// Every span up to this sequence is acknowledged, rejected by the backend, or given up.
    pub acknowledged_through: u64,
    /// Spans acknowledged.
    pub acknowledged: u64,
    /// Spans that the backend did not take, out of batches that it took; which ones is not known.
    pub rejected: u64,
    /// Spans given up.
    pub given_up: u64,
    /// Spans left out by sampling; they have no number.
    pub sampled_out: u64,
}

/// What others ask of a source.
#[derive(Debug, Clone)]
pub struct Handle {
    epoch: Arc<str>,
    counters: Arc<Counters>,
    spool: Option<Arc<Mutex<Spool>>>,
}

impl Handle {
    pub(crate) fn without_spool(counters: Arc<Counters>) -> Self {
        Self { epoch: "".into(), counters, spool: None }
    }

    /// How things stand. Reads counters only: it waits for nothing.
    #[must_use]
    pub fn checkpoint(&self) -> Checkpoint {
        // Progress first: what it counts was numbered before.
        let progress = self.counters.progress();
        Checkpoint {
            epoch: self.epoch.to_string(),
            highest_sequence: self.counters.issued(),
            acknowledged_through: progress.settled_through,
            acknowledged: progress.acknowledged,
            rejected: progress.rejected,
            given_up: progress.given_up,
            sampled_out: self.counters.sampled_out(),
        }
    }

    /// What this life gave up, in ranges, and how many spans of it are in ranges that are no longer remembered. May wait for
    /// the disk: not for async code.
    #[must_use]
    pub fn given_up(&self) -> (Vec<GivenUp>, u64) {
        self.spool.as_ref().map_or_else(Default::default, |spool| lock(spool).given_up())
    }

    /// What earlier lives left in the spool, as found when this one began. May wait for the disk: not for async code.
    #[must_use]
    pub fn earlier(&self) -> Vec<Earlier> {
        self.spool.as_ref().map_or_else(Vec::new, |spool| lock(spool).reports())
    }

    /// Spans in the spool that are not settled, of all lives. May wait for the disk: not for async code.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.spool.as_ref().map_or(0, |spool| lock(spool).held())
    }
}

/// The source.
#[derive(Debug)]
pub struct Source {
    handle: Handle,
    queue: Arc<Queue>,
    spool: Arc<Mutex<Spool>>,
    limits: Limits,
    wake: Arc<Notify>,
    stop: watch::Sender<bool>,
    writer: Mutex<Option<JoinHandle<()>>>,
    exporter: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

impl Source {
    /// Begins a life of a source, with its spool in `directory` (made if it is not there) and at most `bytes_max` bytes of
    /// spans in it. A disk that refuses is told as a warning, and spans are given up until it works: only a lack of memory or
    /// threads fails.
    pub fn open(program: &str, instance: &str, directory: &Path, bytes_max: u64, limits: Limits) -> io::Result<Self> {
        let version = env!("CARGO_PKG_VERSION");
        #[allow(clippy::disallowed_methods, reason = "a life makes its own identity here")]
        let epoch = || uuid::Uuid::new_v4().to_string();
        let bytes_max = bytes_max.max(spool::BYTES_MIN);
        let (spool, error) =
            Spool::open(directory, bytes_max, epoch, |epoch| resource::of(program, instance, version, epoch))?;
        if let Some(error) = error {
            tracing::warn!(directory = %directory.display(), %error, "the span spool can't be made: spans may be lost");
        }
        let (counters, epoch) = (spool.counters(), spool.epoch().into());
        for earlier in spool.reports().iter().filter(|e| e.lost > 0 || e.torn > 0) {
            tracing::warn!(
                epoch = earlier.epoch,
                lost = earlier.lost,
                torn = earlier.torn,
                "an earlier life lost spans"
            );
        }
        let queue = Arc::new(Queue::new(counters.clone(), limits.queue_spans, limits.stall));
        let spool = Arc::new(Mutex::new(spool));
        let wake = Arc::new(Notify::new());
        let writer = std::thread::Builder::new().name("span-spool".to_owned()).spawn({
            let (queue, spool, wake) = (queue.clone(), spool.clone(), wake.clone());
            move || write(&queue, &spool, &wake)
        })?;
        Ok(Self {
            handle: Handle { epoch, counters, spool: Some(spool.clone()) },
            queue,
            spool,
            limits,
            wake,
            stop: watch::Sender::new(false),
            writer: Mutex::new(Some(writer)),
            exporter: Mutex::new(None),
        })
    }

    /// The processor that feeds it; add it to one `SdkTracerProvider`.
    #[must_use]
    pub fn processor(&self) -> Numbering {
        Numbering::new(self.queue.clone())
    }

    /// A sampler that counts what it leaves out in this source.
    #[must_use]
    pub fn counting(&self, sampler: Sampler) -> Counting {
        Counting::new(sampler, self.handle.counters.clone())
    }

    /// A handle.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Begins to export what is in the spool. A second call replaces the sink. Must be called within a tokio runtime.
    pub fn start_export(&self, sink: Arc<dyn Sink>) {
        let task = export::Task {
            spool: self.spool.clone(),
            wake: self.wake.clone(),
            sink,
            limits: self.limits.clone(),
            stop: self.stop.subscribe(),
        };
        let mut exporter = self.exporter.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = exporter.replace(tokio::spawn(task.run())) {
            before.abort();
        }
    }

    /// Waits until every span that has ended by now is in the spool or counted as given up. Blocks. False: not in time.
    pub fn flush(&self, timeout: Duration) -> bool {
        self.queue.flush(timeout)
    }

    /// Ends the life: what has ended goes to the spool in any case, and as much as possible to the sink until `deadline`.
    /// What is left then is exported by the next life.
    pub async fn shutdown(&self, deadline: Duration) -> Checkpoint {
        let until = tokio::time::Instant::now() + deadline;
        self.queue.close();
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer {
            let written = tokio::task::spawn_blocking(move || writer.join());
            if tokio::time::timeout_at(until, written).await.is_err() {
                tracing::warn!("the span spool was not written in time: the disk does not answer");
            }
        }
        self.stop.send_replace(true);
        let exporter = self.exporter.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut exporter) = exporter
            && tokio::time::timeout_at(until, &mut exporter).await.is_err()
        {
            exporter.abort();
            // Only to have it gone; that it was cancelled is known.
            let _ = exporter.await;
        }
        self.handle.checkpoint()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.queue.close();
        if let Some(exporter) = self.exporter.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            exporter.abort();
        }
    }
}

pub(crate) fn lock(spool: &Mutex<Spool>) -> MutexGuard<'_, Spool> {
    spool.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The writer's thread: takes from the queue, encodes, appends, until the queue is closed and empty.
fn write(queue: &Queue, spool: &Mutex<Spool>, wake: &Notify) {
    while let Some(Taken { spans, gap }) = queue.take(CHUNK) {
        let encoded: Vec<_> = spans.into_iter().map(|(sequence, span)| (sequence, encode(sequence, span))).collect();
        let mut spool = lock(spool);
        append(&mut spool, &encoded);
        if let Some((first, last)) = gap {
            spool.give_up(GivenUp { first, last, spans: last + 1 - first, reason: Reason::QueueFull });
        }
        drop(spool);
        if !encoded.is_empty() {
            wake.notify_one();
        }
    }
    if let Err(error) = lock(spool).end() {
        tracing::warn!(%error, "the span spool could not be synced");
    }
    wake.notify_one();
}

/// Spans that are taken and written at once: few, so that traced code that waits for a place soon gets one, and so that
/// little is in memory when the process is killed.
const CHUNK: usize = 64;

fn append(spool: &mut Spool, mut spans: &[(u64, Vec<u8>)]) {
    while let Some(large) = spans.iter().position(|(_, span)| !spool::fits(span)) {
        spool.append(&spans[..large]);
        let sequence = spans[large].0;
        spool.give_up(GivenUp { first: sequence, last: sequence, spans: 1, reason: Reason::TooLarge });
        spans = &spans[large + 1..];
    }
    spool.append(spans);
}

fn encode(sequence: u64, span: SpanData) -> Vec<u8> {
    let mut span = Span::from(span);
    let number = AnyValue { value: Some(Value::IntValue(sequence.cast_signed())) };
    span.attributes.push(KeyValue { key: SEQUENCE_ATTRIBUTE.to_owned(), value: Some(number), ..Default::default() });
    span.encode_to_vec()
}
