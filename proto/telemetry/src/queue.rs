//! Between traced code and the thread that writes the spool: a bounded queue in memory, in the order of the sequences.
//!
//! Numbering and queueing are one step under one lock, so what is in the queue rises without holes. When the queue is full
//! (the disk is slower than the spans come) the traced thread waits for the writer, once and no longer than [`STALL`]; from
//! then on spans are given up and counted until the writer has taken the queue.

use crate::mapped::Counters;
use opentelemetry_sdk::trace::SpanData;
use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Longest time that traced code waits for the disk.
pub(crate) const STALL: Duration = Duration::from_millis(10);

/// The queue.
#[derive(Debug)]
pub(crate) struct Queue {
    counters: Arc<Counters>,
    capacity: usize,
    state: Mutex<State>,
    filled: Condvar,
    taken: Condvar,
    written: Condvar,
}

#[derive(Debug, Default)]
struct State {
    spans: Vec<(u64, SpanData)>,
    /// Given up since the writer last took: one range, since nothing is queued after it begins.
    gap: Option<(u64, u64)>,
    /// Highest sequence whose fate the writer has settled.
    written_through: u64,
    closed: bool,
}

/// What the writer takes at once.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub spans: Vec<(u64, SpanData)>,
    pub gap: Option<(u64, u64)>,
}

impl Queue {
    /// A queue of at most `capacity` spans, numbered from `counters`.
    pub fn new(counters: Arc<Counters>, capacity: usize) -> Self {
        let state = State { spans: Vec::with_capacity(capacity), ..State::default() };
        Self {
            counters,
            capacity,
            state: Mutex::new(state),
            filled: Condvar::new(),
            taken: Condvar::new(),
            written: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Numbers a span and queues it, or counts it as given up. After the close it does nothing.
    pub fn push(&self, span: SpanData) {
        let mut state = self.lock();
        if state.spans.len() >= self.capacity && state.gap.is_none() && !state.closed {
            let full = |s: &mut State| s.spans.len() >= self.capacity && s.gap.is_none() && !s.closed;
            state = self.taken.wait_timeout_while(state, STALL, full).unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.closed {
            return;
        }
        let sequence = self.counters.issue();
        if state.gap.is_some() || state.spans.len() >= self.capacity {
            let first = state.gap.map_or(sequence, |(first, _)| first);
            state.gap = Some((first, sequence));
            return;
        }
        let first = state.spans.is_empty();
        state.spans.push((sequence, span));
        drop(state);
        if first {
            self.filled.notify_one();
        }
    }

    /// For the writer: waits for spans and takes them all; `None` when the queue is closed and empty. The buffer given
    /// (emptied) becomes the new queue. `Taken` is empty when nothing came for a second.
    pub fn take(&self, buffer: Vec<(u64, SpanData)>) -> Option<Taken> {
        let mut state = self.lock();
        let idle = |s: &mut State| s.spans.is_empty() && s.gap.is_none() && !s.closed;
        state = self
            .filled
            .wait_timeout_while(state, Duration::from_secs(1), idle)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        if state.spans.is_empty() && state.gap.is_none() && state.closed {
            return None;
        }
        let taken = Taken { spans: std::mem::replace(&mut state.spans, buffer), gap: state.gap.take() };
        drop(state);
        self.taken.notify_all();
        Some(taken)
    }

    /// For the writer: the fate of everything up to this sequence is settled.
    pub fn set_written(&self, through: u64) {
        self.lock().written_through = through;
        self.written.notify_all();
    }

    /// Waits until everything numbered by now is written or counted. False: not in time.
    pub fn flush(&self, timeout: Duration) -> bool {
        let state = self.lock();
        let through = self.counters.issued();
        let behind = |s: &mut State| s.written_through < through;
        !self.written.wait_timeout_while(state, timeout, behind).unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// No more spans. What is queued is still written.
    pub fn close(&self) {
        self.lock().closed = true;
        self.filled.notify_all();
        self.taken.notify_all();
    }
}
