//! What is known of each life of each span source. Bounded: the epochs heard of least recently are forgotten, their counts
//! stay in the totals.
//!
//! A seam: the ledger that proves every span accounted for takes its place.

use drover_proto::v1::SpanCheckpoint;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, any_value::Value},
    trace::v1::ResourceSpans,
};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Most epochs that are remembered.
const EPOCHS_MAX: usize = 4096;
/// Longest epoch that is remembered, in bytes; ours have 36.
const EPOCH_BYTES_MAX: usize = 64;

/// Totals since the coordinator began. A span that is sent again counts again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Spans that came in.
    pub received: u64,
    /// Spans that the backend took; where none is configured, those received.
    pub accepted: u64,
    /// Spans that the backend rejected out of batches that it took.
    pub rejected: u64,
    /// Spans of batches that were refused for good.
    pub refused: u64,
    /// Spans of batches that were pushed back; they come again.
    pub pushed_back: u64,
    /// Spans received without an epoch: from programs that don't number them.
    pub unaudited: u64,
    /// Epochs remembered now.
    pub epochs: u64,
    /// Epochs forgotten because there were too many.
    pub forgotten: u64,
}

/// One epoch.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Epoch {
    /// Its name.
    pub epoch: String,
    /// Node that told of it on its session; empty for others.
    pub node: String,
    /// Program, as its spans or its checkpoint say.
    pub program: String,
    /// Spans that came in.
    pub received: u64,
    /// Spans that the backend took, or that were received where none is configured.
    pub accepted: u64,
    /// The last checkpoint.
    pub checkpoint: Option<SpanCheckpoint>,
    heard: u64,
}

/// What became of a batch.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fate {
    /// Taken, but for a number of spans.
    Accepted { rejected: u64 },
    /// Refused for good.
    Refused,
    /// To be sent again.
    PushedBack,
}

/// How many spans of each epoch are in a batch; "" for those without one.
#[derive(Debug, Default)]
pub(super) struct Share {
    epochs: BTreeMap<String, (u64, String)>,
    pub spans: u64,
}

impl Share {
    /// Counts a batch.
    pub fn of(batch: &ExportTraceServiceRequest) -> Self {
        let mut share = Self::default();
        for resource in &batch.resource_spans {
            let spans = resource.scope_spans.iter().map(|scope| scope.spans.len() as u64).sum::<u64>();
            let epoch = attribute(resource, drover_telemetry::EPOCH_ATTRIBUTE).unwrap_or_default();
            let known = if epoch.len() <= EPOCH_BYTES_MAX { epoch } else { "" };
            let entry = share.epochs.entry(known.to_owned()).or_default();
            entry.0 += spans;
            entry.1 = attribute(resource, "service.name").unwrap_or_default().chars().take(64).collect();
            share.spans += spans;
        }
        share
    }
}

fn attribute<'a>(resource: &'a ResourceSpans, key: &str) -> Option<&'a str> {
    let found = resource.resource.as_ref()?.attributes.iter().find(|a| a.key == key)?;
    match found.value.as_ref()? {
        AnyValue { value: Some(Value::StringValue(text)) } => Some(text),
        _ => None,
    }
}

/// All epochs.
#[derive(Debug, Default)]
pub(super) struct Epochs(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    epochs: HashMap<String, Epoch>,
    counts: Counts,
    /// Rises with everything heard.
    clock: u64,
}

impl Epochs {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts what became of a batch.
    pub fn record(&self, share: &Share, fate: Fate) {
        let mut state = self.lock();
        let counts = &mut state.counts;
        counts.received += share.spans;
        match fate {
            Fate::Accepted { rejected } => {
                counts.rejected += rejected.min(share.spans);
                counts.accepted += share.spans.saturating_sub(rejected);
            }
            Fate::Refused => counts.refused += share.spans,
            Fate::PushedBack => counts.pushed_back += share.spans,
        }
        counts.unaudited += share.epochs.get("").map_or(0, |(spans, _)| *spans);
        let single = share.epochs.len() == 1;
        for (name, (spans, program)) in share.epochs.iter().filter(|(name, _)| !name.is_empty()) {
            let epoch = state.hear(name);
            epoch.received += spans;
            if let Fate::Accepted { rejected } = fate {
                // Of a batch of several epochs nobody knows whose spans were rejected; ours have one.
                epoch.accepted += if single { spans.saturating_sub(rejected) } else { *spans };
            }
            epoch.program.clone_from(program);
        }
    }

    /// Records a checkpoint. A node can't take over the epoch of another.
    pub fn checkpoint(&self, node: &str, checkpoint: SpanCheckpoint) {
        if checkpoint.epoch.is_empty() || checkpoint.epoch.len() > EPOCH_BYTES_MAX {
            return;
        }
        let mut state = self.lock();
        let epoch = state.hear(&checkpoint.epoch);
        if !epoch.node.is_empty() && epoch.node != node {
            tracing::warn!(
                epoch = epoch.epoch,
                owner = epoch.node,
                node,
                "a node told of the spans of another: not recorded"
            );
            return;
        }
        node.clone_into(&mut epoch.node);
        if epoch.checkpoint.as_ref().is_none_or(|last| last.highest_sequence <= checkpoint.highest_sequence) {
            epoch.program = checkpoint.program.chars().take(64).collect();
            epoch.checkpoint = Some(checkpoint);
        }
    }

    /// Totals.
    pub fn counts(&self) -> Counts {
        let state = self.lock();
        Counts { epochs: state.epochs.len() as u64, ..state.counts }
    }

    /// All epochs, the most recently heard of first.
    pub fn list(&self) -> Vec<Epoch> {
        let mut list: Vec<_> = self.lock().epochs.values().cloned().collect();
        list.sort_by_key(|epoch| std::cmp::Reverse(epoch.heard));
        list
    }
}

impl State {
    fn hear(&mut self, name: &str) -> &mut Epoch {
        if self.epochs.len() >= EPOCHS_MAX && !self.epochs.contains_key(name) {
            let oldest = self.epochs.values().min_by_key(|epoch| epoch.heard).map(|epoch| epoch.epoch.clone());
            oldest.and_then(|oldest| self.epochs.remove(&oldest));
            self.counts.forgotten += 1;
        }
        self.clock += 1;
        let epoch = self.epochs.entry(name.to_owned()).or_default();
        if epoch.epoch.is_empty() {
            name.clone_into(&mut epoch.epoch);
        }
        epoch.heard = self.clock;
        epoch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(epoch: &str, highest_sequence: u64) -> SpanCheckpoint {
        SpanCheckpoint { epoch: epoch.to_owned(), highest_sequence, ..Default::default() }
    }

    #[test]
    fn checkpoints_only_move_forward_and_belong_to_one_node() {
        let epochs = Epochs::default();
        epochs.checkpoint("a", told("e", 5));
        epochs.checkpoint("a", told("e", 3));
        epochs.checkpoint("b", told("e", 9));
        epochs.checkpoint("b", told("", 9));
        epochs.checkpoint("b", told(&"x".repeat(65), 9));
        let list = epochs.list();
        assert_eq!(list.len(), 1);
        assert_eq!((list[0].node.as_str(), list[0].checkpoint.as_ref().unwrap().highest_sequence), ("a", 5));
    }

    #[test]
    fn the_epochs_heard_of_least_recently_are_forgotten_beyond_the_bound() {
        let epochs = Epochs::default();
        for i in 0..EPOCHS_MAX {
            epochs.checkpoint("a", told(&format!("{i}"), 1));
        }
        epochs.checkpoint("a", told("0", 2));
        epochs.checkpoint("a", told("new", 1));
        let list = epochs.list();
        assert_eq!((list.len(), epochs.counts().forgotten), (EPOCHS_MAX, 1));
        assert_eq!((list[0].epoch.as_str(), list[1].epoch.as_str()), ("new", "0"));
        assert!(!list.iter().any(|e| e.epoch == "1"));
    }
}
