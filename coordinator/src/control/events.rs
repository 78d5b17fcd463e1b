//! The record of what happened: a ring of events for each object.
//!
//! Service and handle: the service owns the rings' positions and a bounded queue; whoever records never waits. An event
//! about an object that is gone goes into the fleet's ring, so that nothing is written that nobody would collect. What is
//! history of an instance is also kept with its deployment, in a ring of its own, for when the instance is gone.

use super::clock;
use crate::store::{Compare, Error, KeyValue, Op, Store, Txn, keys, pack::Step, records};
use drover_proto::{
    ids, limits,
    store::v1 as record,
    v1::{Event, Severity},
    world,
};
use prost::Message as _;
use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};
use tokio::{sync::mpsc, time::Instant};

/// Object of events that are about no single thing, or about one that is gone.
pub const FLEET: &str = "fleet";
/// What the names of rings of history begin with.
const HISTORY: &str = "history/";
/// Events that wait to be written; beyond that they are counted and left out.
const QUEUE: usize = 2048;
/// Objects whose ring position is remembered; beyond that all are forgotten and looked up again.
const REMEMBERED: usize = 4096;
/// How often the positions of rings are forgotten that nothing was written to since the last time: most are of objects that
/// are gone, and one that is not is read again.
const FORGET: Duration = Duration::from_secs(60);
/// Most characters of a message: what is written together fits the store with room to spare.
const MESSAGE_MAX: usize = 4000;
const ATTEMPTS: usize = 3;
/// How soon after the last write an event waits for others, to be written with them: what happens happens to many.
const LINGER: Duration = Duration::from_millis(100);
/// Events that are written by one transaction: each takes up to two of its 128 comparisons. Fewer than a ring holds, so that
/// none is overwritten by another of them.
const TOGETHER: usize = 48;

/// The ring that keeps the history of a deployment's instances when they are gone.
#[must_use]
pub fn history(deployment: &str) -> String {
    format!("{HISTORY}{deployment}")
}

/// PURE. Whether an event is one of such a ring.
fn is_copy(event: &Event) -> bool {
    event.object.starts_with(HISTORY)
}

/// PURE. An event of such a ring as the one about an instance that it is a copy of; any other as it is.
#[must_use]
pub fn restored(event: Event) -> Event {
    match event.message.split_once(": ") {
        Some((id, message)) if is_copy(&event) => {
            Event { object: format!("instance/{id}"), message: message.to_owned(), ..event }
        }
        _ => event,
    }
}

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
        let task = tokio::spawn(world::task(async move {
            let mut rings = Rings::new(store);
            let mut waiting = Vec::new();
            let mut written = Instant::now();
            while events.recv_many(&mut waiting, TOGETHER).await > 0 {
                gather(&mut events, &mut waiting, written + LINGER).await;
                rings.write_all(std::mem::take(&mut waiting)).await;
                written = Instant::now();
            }
        }));
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
        let event = Self::event(source.to_owned(), format!("instance/{id}"), reason, severity, message);
        let copy = ids::deployment_of(id).map(|deployment| {
            let message = format!("{id}: {}", event.message);
            Event { object: history(deployment), message, ..event.clone() }
        });
        self.queue(event);
        copy.into_iter().for_each(|copy| self.queue(copy));
    }

    /// Records an event that `source` reported.
    pub fn record_from(&self, source: String, object: String, reason: &str, severity: Severity, message: String) {
        self.queue(Self::event(source, object, reason, severity, message));
    }

    fn event(source: String, object: String, reason: &str, severity: Severity, message: String) -> Event {
        let traceparent = drover_telemetry::context::current_traceparent();
        let message = match message.char_indices().nth(MESSAGE_MAX) {
            Some((end, _)) => message[..end].to_owned(),
            None => message,
        };
        tracing::info!(object, reason, message, "event");
        Event {
            time: Some(clock::now()),
            object,
            reason: reason.to_owned(),
            message,
            severity: severity.into(),
            source,
            trace_id: drover_telemetry::context::trace_id_of(&traceparent).unwrap_or_default(),
            revision: 0,
        }
    }

    fn queue(&self, event: Event) {
        if self.queue.try_send(event).is_err() {
            tracing::warn!("the queue of events is full; one was not recorded");
        }
    }
}

/// Adds what comes until then, up to [`TOGETHER`].
async fn gather(events: &mut mpsc::Receiver<Event>, waiting: &mut Vec<Event>, until: Instant) {
    let more =
        async { while waiting.len() < TOGETHER && events.recv_many(waiting, TOGETHER - waiting.len()).await > 0 {} };
    // A receive that is broken off has taken nothing.
    let _ = tokio::time::timeout_at(until, more).await;
}

struct Rings {
    store: Store,
    /// Next sequence and the revisions of the slots, by object.
    next: HashMap<String, Ring>,
    /// When those that are not used were forgotten last.
    swept: Instant,
}

#[derive(Debug, Default)]
struct Ring {
    next: u64,
    slots: HashMap<u64, i64>,
    /// Whether it was written to since the last sweep.
    used: bool,
}

impl Rings {
    fn new(store: Store) -> Self {
        Self { store, next: HashMap::new(), swept: Instant::now() }
    }

    /// Forgets the rings that nothing was written to since the last time.
    fn sweep(&mut self) {
        if self.swept.elapsed() >= FORGET {
            self.swept = Instant::now();
            self.next.retain(|_, ring| std::mem::take(&mut ring.used));
        }
    }

    /// Writes events in their order: all at once, or, where that fails, each for itself.
    async fn write_all(&mut self, events: Vec<Event>) {
        self.sweep();
        match self.write_together(&events).await {
            Ok(true) => return,
            Err(error @ (Error::Unavailable(_) | Error::NoSpace(_) | Error::Changed(_))) => {
                return tracing::warn!(%error, events = events.len(), "events were not recorded");
            }
            Ok(false) | Err(_) => {}
        }
        for event in &events {
            self.next.remove(&event.object);
        }
        for (n, event) in events.iter().enumerate() {
            // Its copy in the ring of history comes right behind it.
            let is_copied = events[n + 1..].iter().any(|later| is_copy(later) && restored(later.clone()) == *event);
            if let Err(error) = self.write(event.clone(), is_copied).await {
                tracing::warn!(%error, "an event was not recorded");
            }
        }
    }

    /// False when a ring was written by others, or an object is gone: then nothing was written.
    async fn write_together(&mut self, events: &[Event]) -> Result<bool, Error> {
        self.know(events).await?;
        let mut after: HashMap<&str, u64> = HashMap::new();
        let mut steps = Vec::new();
        for event in events {
            let Some(ring) = self.next.get(&event.object) else { return Ok(false) };
            let sequence = after.entry(&event.object).or_insert(ring.next);
            steps.push(ring.step(event, *sequence));
            *sequence += 1;
        }
        let outcome = self.store.txn(in_a_store(Step::join(&steps))).await?;
        if outcome.succeeded {
            for (object, next) in after {
                self.next.entry(object.to_owned()).or_default().written(next, outcome.revision);
            }
        }
        Ok(outcome.succeeded)
    }

    /// Reads the rings of these events that are not known yet, in one go.
    async fn know(&mut self, events: &[Event]) -> Result<(), Error> {
        let objects: BTreeSet<&String> = events.iter().map(|event| &event.object).collect();
        if self.next.len() + objects.len() > REMEMBERED {
            self.next.clear();
        }
        let unknown: Vec<&String> = objects.into_iter().filter(|object| !self.next.contains_key(*object)).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let then = unknown.iter().map(|object| Op::List(keys::events(object))).collect();
        let read = self.store.txn(Txn { then, ..Txn::default() }).await?;
        for (object, items) in unknown.into_iter().zip(read.reads) {
            self.next.insert(object.clone(), Ring::of(&items));
        }
        Ok(())
    }

    /// Writes an event to its object's ring; of an object that is gone to the fleet's, unless a copy outlives it.
    async fn write(&mut self, mut event: Event, is_copied: bool) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            if !self.next.contains_key(&event.object) {
                if self.next.len() >= REMEMBERED {
                    self.next.clear();
                }
                let ring = self.read(&event.object).await?;
                self.next.insert(event.object.clone(), ring);
            }
            let Some(ring) = self.next.get_mut(&event.object) else { continue };
            match self.store.txn(in_a_store(ring.step(&event, ring.next))).await {
                Ok(outcome) if outcome.succeeded => {
                    ring.written(ring.next + 1, outcome.revision);
                    return Ok(());
                }
                // Another coordinator wrote to the ring, or the object is gone.
                Ok(_) | Err(Error::OutcomeUnknown(_)) => {
                    self.next.remove(&event.object);
                    if self.store.get(keys::SCHEMA).await?.is_none() {
                        return Err(Error::Unavailable("the store is empty".to_owned()));
                    }
                    if let Some(key) = owner(&event.object)
                        && self.store.get(&key).await?.is_none()
                    {
                        if is_copy(&event) || (is_copied && self.has_history(&event).await?) {
                            return Ok(());
                        }
                        event.message = format!("{}: {}", event.object, event.message);
                        FLEET.clone_into(&mut event.object);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::Unavailable(format!("the ring of {} was written by others {ATTEMPTS} times in a row", event.object)))
    }

    /// Whether the ring of history that has an event's copy is still there.
    async fn has_history(&self, event: &Event) -> Result<bool, Error> {
        let instance = event.object.strip_prefix("instance/").unwrap_or_default();
        let Some(deployment) = ids::deployment_of(instance) else { return Ok(false) };
        Ok(self.store.get(&keys::deployment(deployment)).await?.is_some())
    }

    async fn read(&self, object: &str) -> Result<Ring, Error> {
        Ok(Ring::of(&self.store.list(&keys::events(object)).await?.items))
    }
}

/// Nothing is written into a store that has just come back empty, which is no store of ours.
fn in_a_store(Step { mut compare, then }: Step) -> Txn {
    compare.push(Compare::Exists(keys::SCHEMA.to_owned()));
    Txn { compare, then, otherwise: vec![] }
}

impl Ring {
    fn of(items: &[KeyValue]) -> Self {
        let mut ring = Self::default();
        for item in items {
            let Ok(stored) = record::Event::decode(item.value.as_slice()) else { continue };
            ring.next = ring.next.max(stored.sequence + 1);
            ring.slots.insert(stored.sequence % limits::EVENTS_PER_OBJECT, item.mod_revision);
        }
        ring
    }

    /// Writes an event as number `sequence` of the ring, if its slot is as known and its object is there.
    fn step(&self, event: &Event, sequence: u64) -> Step {
        let slot = sequence % limits::EVENTS_PER_OBJECT;
        let key = keys::event(&event.object, slot);
        let known = self.slots.get(&slot).copied().unwrap_or(0);
        let mut compare = vec![Compare::ModRevision(key.clone(), known)];
        compare.extend(owner(&event.object).map(Compare::Exists));
        let value = record::Event { event: Some(event.clone()), sequence };
        Step { compare, then: vec![records::put(key, &value, 0)] }
    }

    /// All up to `next` were written, the last of them at this revision.
    fn written(&mut self, next: u64, revision: i64) {
        for sequence in self.next..next {
            self.slots.insert(sequence % limits::EVENTS_PER_OBJECT, revision);
        }
        (self.next, self.used) = (next, true);
    }
}

/// Key whose existence an object's ring depends on.
fn owner(object: &str) -> Option<String> {
    let (kind, name) = object.split_once('/')?;
    match kind {
        "deployment" | "history" => Some(keys::deployment(name)),
        "instance" => Some(keys::instance(name)),
        "node" => Some(keys::node(name)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{memory::Memory, schema};
    use std::sync::Arc;

    #[tokio::test(start_paused = true)]
    async fn nothing_is_told_to_a_store_that_came_back_empty() {
        let store: Store = Arc::new(Memory::start(1));
        let event = || Event { object: FLEET.to_owned(), ..Event::default() };
        Rings::new(store.clone()).write_all(vec![event(), event()]).await;
        assert_eq!(store.list("").await.unwrap().items, []);
    }

    #[tokio::test(start_paused = true)]
    async fn the_ring_of_an_object_that_is_gone_is_forgotten_and_one_in_use_is_not() {
        let store: Store = Arc::new(Memory::start(1));
        schema::open(&store, None).await.unwrap();
        let mut rings = Rings::new(store);
        let told = |object: &str| Event { object: object.to_owned(), ..Event::default() };
        rings.write_all(vec![told(FLEET), told("gone")]).await;
        assert_eq!(rings.next.len(), 2);
        for _ in 0..2 {
            tokio::time::advance(FORGET).await;
            rings.write_all(vec![told(FLEET)]).await;
        }
        tokio::time::advance(FORGET).await;
        rings.sweep();
        assert_eq!(rings.next.keys().collect::<Vec<_>>(), [FLEET]);
        rings.write_all(vec![told("gone")]).await;
        assert_eq!(rings.next["gone"].next, 2, "it goes on where it was");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_told_of_an_instance_that_is_gone_is_told_once() {
        let store: Store = Arc::new(Memory::start(1));
        schema::open(&store, None).await.unwrap();
        let told = async |object: &str| store.list(&keys::events(object)).await.unwrap().items.len();
        let event =
            || Event { object: "instance/tiny-222222".to_owned(), message: "on a".to_owned(), ..Event::default() };
        let copy = || Event { object: history("tiny"), message: "tiny-222222: on a".to_owned(), ..event() };
        let mut rings = Rings::new(store.clone());
        // Deployment and all: then the fleet's ring has it.
        rings.write_all(vec![event(), copy()]).await;
        assert_eq!((told(FLEET).await, told("history/tiny").await), (1, 0));
        let then = vec![Op::Put { key: keys::deployment("tiny"), value: vec![], lease: 0 }];
        assert!(store.txn(Txn { then, ..Txn::default() }).await.unwrap().succeeded);
        rings.write_all(vec![event(), copy()]).await;
        assert_eq!((told(FLEET).await, told("history/tiny").await), (1, 1));
    }

    #[test]
    fn a_copy_is_told_as_what_it_is_a_copy_of() {
        let event = |object: &str, message: &str| Event {
            object: object.to_owned(),
            message: message.to_owned(),
            ..Event::default()
        };
        let copy = event(&history("tiny"), "tiny-222222: on a: x");
        assert_eq!(restored(copy), event("instance/tiny-222222", "on a: x"));
        let others = [event("node/a", "tiny-222222: on a"), event("fleet", "x: y"), event("deployment/tiny", "x")];
        assert_eq!(others.clone().map(restored), others);
    }
}
