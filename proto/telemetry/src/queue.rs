//! Between traced code and the thread that writes the spool: a bounded queue in memory, in the order of the sequences.
//!
//! Numbering and queueing are one step under one lock, so what is in the queue rises without holes. When the queue is full
//! (the disk is slower than the spans come) the traced thread waits for the writer, at its pace. When the writer takes nothing
//! for a time (the disk does not answer), spans are given up and counted, without another wait, until it does.

use crate::mapped::Counters;
use opentelemetry_sdk::trace::SpanData;
use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Traced code waits for a place at most so many times as long as the writer may stand still.
const WAITS_MAX: u32 = 4;

/// The queue.
#[derive(Debug)]
pub(crate) struct Queue {
    counters: Arc<Counters>,
    capacity: usize,
    stall: Duration,
    state: Mutex<State>,
    filled: Condvar,
    taken: Condvar,
    written: Condvar,
}

#[derive(Debug, Default)]
struct State {
    spans: VecDeque<(u64, SpanData)>,
    /// Given up since the writer last took: one range, since nothing is queued while there is one.
    gap: Option<(u64, u64)>,
    /// First sequence that the writer has taken and not yet settled.
    writing: Option<u64>,
    /// How often the writer has taken.
    takes: u64,
    closed: bool,
}

impl State {
    /// Lowest sequence that is neither written nor counted as given up.
    fn first_open(&self) -> Option<u64> {
        let queued = self.spans.front().map(|(sequence, _)| *sequence);
        [queued, self.gap.map(|(first, _)| first), self.writing].into_iter().flatten().min()
    }
}

/// What the writer takes at once.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub spans: Vec<(u64, SpanData)>,
    pub gap: Option<(u64, u64)>,
}

impl Queue {
    /// A queue of at most `capacity` spans, numbered from `counters`. When it is full and the writer takes nothing for
    /// `stall`, spans are given up.
    pub fn new(counters: Arc<Counters>, capacity: usize, stall: Duration) -> Self {
        let state = State { spans: VecDeque::with_capacity(capacity), ..State::default() };
        Self {
            counters,
            capacity,
            stall,
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
        let full = |s: &mut State| s.spans.len() >= self.capacity && s.gap.is_none() && !s.closed;
        for _ in 0..WAITS_MAX {
            if !full(&mut state) {
                break;
            }
            let takes = state.takes;
            let waited = self.taken.wait_timeout_while(state, self.stall, full);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.takes == takes {
                break;
            }
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
        state.spans.push_back((sequence, span));
        drop(state);
        if first {
            self.filled.notify_one();
        }
    }

    /// For the writer: settles what it took before, waits for spans and takes the oldest, at most `most`. `None` when the
    /// queue is closed and empty; nothing is in it when nothing came for a second.
    pub fn take(&self, most: usize) -> Option<Taken> {
        let mut state = self.lock();
        if state.writing.take().is_some() {
            self.written.notify_all();
        }
        let idle = |s: &mut State| s.first_open().is_none() && !s.closed;
        state = self
            .filled
            .wait_timeout_while(state, Duration::from_secs(1), idle)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        if state.first_open().is_none() && state.closed {
            return None;
        }
        state.writing = state.first_open();
        state.takes += 1;
        let count = state.spans.len().min(most);
        let taken = Taken { spans: state.spans.drain(..count).collect(), gap: state.gap.take() };
        drop(state);
        self.taken.notify_all();
        Some(taken)
    }

    /// Waits until everything numbered by now is written or counted. False: not in time.
    pub fn flush(&self, timeout: Duration) -> bool {
        let state = self.lock();
        let through = self.counters.issued();
        let behind = |s: &mut State| s.first_open().is_some_and(|first| first <= through);
        !self.written.wait_timeout_while(state, timeout, behind).unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// No more spans. What is queued is still written.
    pub fn close(&self) {
        self.lock().closed = true;
        self.filled.notify_all();
        self.taken.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status};
    use std::time::SystemTime;

    fn span() -> SpanData {
        SpanData {
            span_context: SpanContext::empty_context(),
            parent_span_id: SpanId::INVALID,
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: "work".into(),
            start_time: SystemTime::UNIX_EPOCH,
            end_time: SystemTime::UNIX_EPOCH,
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: Default::default(),
            links: Default::default(),
            status: Status::Unset,
            instrumentation_scope: Default::default(),
        }
    }

    #[test]
    fn a_writer_that_stands_still_costs_one_wait_and_spans_that_are_counted() {
        let queue = Queue::new(Arc::new(Counters::in_memory().unwrap()), 4, Duration::from_millis(1));
        (0..10).for_each(|_| queue.push(span()));
        assert!(!queue.flush(Duration::ZERO));
        let first = queue.take(3).unwrap();
        let numbers = |taken: &Taken| taken.spans.iter().map(|(n, _)| *n).collect::<Vec<_>>();
        assert_eq!((numbers(&first), first.gap), (vec![1, 2, 3], Some((5, 10))));
        queue.push(span());
        let second = queue.take(3).unwrap();
        assert_eq!((numbers(&second), second.gap), (vec![4, 11], None));
        assert!(!queue.flush(Duration::ZERO), "taken is not written");
        queue.close();
        queue.push(span());
        assert!(queue.take(3).is_none());
        assert!(queue.flush(Duration::ZERO));
    }
}
