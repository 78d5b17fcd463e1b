//! The record of what happened: a ring of events for each object.
//!
//! Service and handle: the service owns the rings' positions and a bounded queue; whoever records never waits. An event
//! about an object that is gone goes into the fleet's ring, so that nothing is written that nobody would collect.

use super::clock;
use crate::store::{Compare, Error, Store, Txn, keys, records};
use drover_proto::{
    limits,
    store::v1 as record,
    v1::{Event, Severity},
};
use prost::Message as _;
use std::collections::HashMap;
use tokio::sync::mpsc;

/// Object of events that are about no single thing, or about one that is gone.
pub const FLEET: &str = "fleet";
/// Events that wait to be written; beyond that they are counted and left out.
const QUEUE: usize = 2048;
/// Objects whose ring position is remembered; beyond that all are forgotten and looked up again.
const REMEMBERED: usize = 4096;
const ATTEMPTS: usize = 3;

/// Handle: cheap to clone.
#[derive(Debug, Clone)]
pub struct Events {
    queue: mpsc::Sender<Event>,
    source: String,
}

impl Events {
    /// Starts the service; it ends, having written what is queued, when the last handle is dropped.
    #[must_use]
    pub fn start(store: Store, source: String) -> (Self, tokio::task::JoinHandle<()>) {
        let (queue, mut events) = mpsc::channel(QUEUE);
        let task = tokio::spawn(async move {
            let mut rings = Rings { store, next: HashMap::new() };
            while let Some(event) = events.recv().await {
                if let Err(error) = rings.write(event).await {
                    tracing::warn!(%error, "an event was not recorded");
                }
            }
        });
        (Self { queue, source }, task)
    }

    /// Records an event of the coordinator itself, with the trace of the current span.
    pub fn record(&self, object: String, reason: &str, severity: Severity, message: String) {
        self.record_from(self.source.clone(), object, reason, severity, message);
    }

    /// Records what was decided about an instance that `node` has, if one has it: see [`Events::record_by_node`].
    pub fn record_on_node(&self, node: Option<&str>, id: &str, reason: &str, severity: Severity, message: String) {
        self.record_twice(&self.source, node, id, reason, severity, message);
    }

    /// Records what a node did with an instance: in the instance's ring, and in the node's, which outlives the instance.
    pub fn record_by_node(&self, node: &str, id: &str, reason: &str, severity: Severity, message: String) {
        self.record_twice(&format!("node/{node}"), Some(node), id, reason, severity, message);
    }

    fn record_twice(
        &self,
        source: &str,
        node: Option<&str>,
        id: &str,
        reason: &str,
        severity: Severity,
        message: String,
    ) {
        if let Some(node) = node {
            let named = format!("{id}: {message}");
            self.record_from(source.to_owned(), format!("node/{node}"), reason, severity, named);
        }
        self.record_from(source.to_owned(), format!("instance/{id}"), reason, severity, message);
    }

    /// Records an event that `source` reported.
    pub fn record_from(&self, source: String, object: String, reason: &str, severity: Severity, message: String) {
        let traceparent = drover_telemetry::context::current_traceparent();
        tracing::info!(object, reason, message, "event");
        let event = Event {
            time: Some(clock::now()),
            object,
            reason: reason.to_owned(),
            message,
            severity: severity.into(),
            source,
            trace_id: drover_telemetry::context::trace_id_of(&traceparent).unwrap_or_default(),
            revision: 0,
        };
        if self.queue.try_send(event).is_err() {
            tracing::warn!("the queue of events is full; one was not recorded");
        }
    }
}

struct Rings {
    store: Store,
    /// Next sequence and the revisions of the slots, by object.
    next: HashMap<String, Ring>,
}

#[derive(Default)]
struct Ring {
    next: u64,
    slots: HashMap<u64, i64>,
}

impl Rings {
    async fn write(&mut self, mut event: Event) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            if !self.next.contains_key(&event.object) {
                if self.next.len() >= REMEMBERED {
                    self.next.clear();
                }
                let ring = self.read(&event.object).await?;
                self.next.insert(event.object.clone(), ring);
            }
            let Some(ring) = self.next.get_mut(&event.object) else { continue };
            let slot = ring.next % limits::EVENTS_PER_OBJECT;
            let key = keys::event(&event.object, slot);
            let known = ring.slots.get(&slot).copied().unwrap_or(0);
            let mut compare = vec![Compare::ModRevision(key.clone(), known)];
            compare.extend(owner(&event.object).map(Compare::Exists));
            let value = record::Event { event: Some(event.clone()), sequence: ring.next };
            let txn = Txn { compare, then: vec![records::put(key, &value, 0)], otherwise: vec![] };
            match self.store.txn(txn).await {
                Ok(outcome) if outcome.succeeded => {
                    ring.slots.insert(slot, outcome.revision);
                    ring.next += 1;
                    return Ok(());
                }
                // Another coordinator wrote to the ring, or the object is gone.
                Ok(_) | Err(Error::OutcomeUnknown(_)) => {
                    self.next.remove(&event.object);
                    if let Some(key) = owner(&event.object)
                        && self.store.get(&key).await?.is_none()
                    {
                        event.message = format!("{}: {}", event.object, event.message);
                        FLEET.clone_into(&mut event.object);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::Unavailable(format!("the ring of {} was written by others {ATTEMPTS} times in a row", event.object)))
    }

    async fn read(&self, object: &str) -> Result<Ring, Error> {
        let mut ring = Ring::default();
        for item in self.store.list(&keys::events(object)).await?.items {
            let Ok(stored) = record::Event::decode(item.value.as_slice()) else { continue };
            ring.next = ring.next.max(stored.sequence + 1);
            ring.slots.insert(stored.sequence % limits::EVENTS_PER_OBJECT, item.mod_revision);
        }
        Ok(ring)
    }
}

/// Key whose existence an object's ring depends on.
fn owner(object: &str) -> Option<String> {
    let (kind, name) = object.split_once('/')?;
    match kind {
        "deployment" => Some(keys::deployment(name)),
        "instance" => Some(keys::instance(name)),
        "node" => Some(keys::node(name)),
        _ => None,
    }
}
