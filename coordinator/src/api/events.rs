//! Events: the recorded ones in the order of their recording, then new ones as they happen.

use crate::{
    control::{
        events::{history, restored},
        store_status,
    },
    store::{Change, Error, KeyValue, Store, keys},
};
use drover_proto::{
    ids,
    status::invalid_field,
    store::v1 as record,
    v1::{Event, WatchEventsRequest, WatchEventsResponse},
};
use futures::{StreamExt as _, stream::BoxStream};
use prost::Message as _;
use std::collections::VecDeque;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

const OUTBOUND: usize = 256;
/// Events among which copies of one are looked for.
const COPIES_WITHIN: usize = 128;

/// Answers a watch.
pub(super) async fn watch(
    store: Store,
    request: WatchEventsRequest,
) -> Result<BoxStream<'static, Result<WatchEventsResponse, Status>>, Status> {
    let place = place(&request.object)?;
    if request.after_revision < 0 {
        return Err(invalid_field(
            "after_revision",
            format!("{} is negative: use 0 for all events", request.after_revision),
        ));
    }
    let mut recorded = Vec::new();
    let mut from = Vec::new();
    for prefix in &place.prefixes {
        let listing = store.list(prefix).await.map_err(store_status)?;
        recorded.extend(listing.items.iter().filter_map(decode));
        from.push((prefix.clone(), listing.revision + 1));
    }
    recorded.retain(|(event, _)| event.revision > request.after_revision);
    // Events that were written together have one revision, and times are in milliseconds.
    recorded.sort_by_key(|(event, sequence)| {
        (event.revision, event.time.map(|time| (time.seconds, time.nanos)), *sequence)
    });
    let (send, stream) = mpsc::channel(OUTBOUND);
    tokio::spawn(async move {
        let mut told = Told::default();
        for event in recorded.into_iter().map(|(event, _)| event).filter(|event| place.shows(event)) {
            if told.is_new(&event) && send.send(answer(event)).await.is_err() {
                return;
            }
        }
        if !request.follow {
            return;
        }
        let failed = tokio::select! {
            failed = follow(&store, from, &place, &mut told, &send) => failed,
            () = send.closed() => return,
        };
        // The caller goes on from the last revision that it saw.
        let _ = send.send(Err(store_status(failed))).await;
    });
    Ok(ReceiverStream::new(stream).boxed())
}

type Answers = mpsc::Sender<Result<WatchEventsResponse, Status>>;

/// Sends new events until the store fails.
async fn follow(store: &Store, from: Vec<(String, i64)>, place: &Place, told: &mut Told, send: &Answers) -> Error {
    let mut watches = Vec::new();
    for (prefix, revision) in from {
        match store.watch(&prefix, revision).await {
            Ok(watch) => watches.push(watch),
            Err(error) => return error,
        }
    }
    loop {
        let any = futures::future::select_all(watches.iter_mut().map(|watch| Box::pin(watch.next())));
        let changes = match any.await.0 {
            Ok(changes) => changes,
            Err(error) => return error,
        };
        for change in changes.changes {
            let Change::Put(item) = change else { continue };
            let Some((event, _)) = decode(&item).filter(|(event, _)| place.shows(event)) else { continue };
            if told.is_new(&event) {
                // Who has gone is seen by whoever runs this.
                let _ = send.send(answer(event)).await;
            }
        }
    }
}

/// Events told last. Copies of an event are written right after it, so that each is told once.
#[derive(Debug, Default)]
struct Told(VecDeque<Event>);

impl Told {
    fn is_new(&mut self, event: &Event) -> bool {
        let same = |known: &Event| Event { revision: 0, ..known.clone() } == Event { revision: 0, ..event.clone() };
        if self.0.iter().any(same) {
            return false;
        }
        if self.0.len() >= COPIES_WITHIN {
            self.0.pop_front();
        }
        self.0.push_back(event.clone());
        true
    }
}

fn answer(event: Event) -> Result<WatchEventsResponse, Status> {
    Ok(WatchEventsResponse { event: Some(event) })
}

/// An event and its number within its ring.
fn decode(item: &KeyValue) -> Option<(Event, u64)> {
    let record::Event { event, sequence } = record::Event::decode(item.value.as_slice()).ok()?;
    let event = Event { revision: item.mod_revision, ..event? };
    Some((restored(event), sequence))
}

/// Where the events of an object lie.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    /// Parts of the store.
    prefixes: Vec<String>,
    /// The only object shown of what lies there.
    only: Option<String>,
}

impl Place {
    fn shows(&self, event: &Event) -> bool {
        self.only.as_ref().is_none_or(|object| event.object == *object)
    }
}

fn place(object: &str) -> Result<Place, Status> {
    let all_of = |prefix: String| Ok(Place { prefixes: vec![prefix], only: None });
    match object.split_once('/') {
        None if object.is_empty() => all_of(keys::EVENTS.to_owned()),
        None if object == crate::control::events::FLEET => all_of(keys::events(object)),
        Some((kind @ ("deployment" | "instance" | "node"), name)) => {
            if name.is_empty() {
                return all_of(format!("{}{kind}/", keys::EVENTS));
            }
            if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
                return Err(invalid(object));
            }
            match ids::deployment_of(name).filter(|_| kind == "instance") {
                // What its deployment keeps of it, when it is gone itself.
                Some(deployment) => Ok(Place {
                    prefixes: vec![keys::events(object), keys::events(&history(deployment))],
                    only: Some(object.to_owned()),
                }),
                None => all_of(keys::events(object)),
            }
        }
        _ => Err(invalid(object)),
    }
}

fn invalid(object: &str) -> Status {
    let shown = object.escape_debug();
    invalid_field(
        "object",
        format!("\"{shown}\" is no object: use deployment/NAME, instance/ID, node/NAME, fleet, or nothing for all"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        control::events::Events,
        store::{memory::Memory, schema},
    };
    use drover_proto::v1::Severity;
    use std::sync::Arc;

    #[tokio::test]
    async fn events_that_were_written_together_are_told_in_their_order() {
        let store: Store = Arc::new(Memory::start(1));
        schema::open(&store, None).await.unwrap();
        let (events, written) = Events::start(store.clone(), "coordinator/test".to_owned());
        // More than a ring holds: the last ones lie before the first ones.
        for n in 0..70 {
            events.record("fleet".to_owned(), "Told", Severity::Info, n.to_string());
        }
        drop(events);
        written.await.unwrap();
        let stream = watch(store, WatchEventsRequest::default()).await.unwrap();
        let told: Vec<u32> =
            stream.map(|answer| answer.unwrap().event.unwrap().message.parse::<u32>().unwrap()).collect().await;
        assert_eq!(told, (6..70).collect::<Vec<_>>());
    }

    #[test]
    fn an_object_chooses_its_ring_a_kind_all_of_its_rings() {
        let prefixes = |object: &str| place(object).unwrap().prefixes;
        assert_eq!(prefixes(""), ["events/"]);
        assert_eq!(prefixes("deployment/tiny"), ["events/deployment/tiny/"]);
        assert_eq!(prefixes("node/"), ["events/node/"]);
        assert_eq!(prefixes("fleet"), ["events/fleet/"]);
        for bad in ["pod/x", "tiny", "deployment/../x", "node/A"] {
            assert!(place(bad).unwrap_err().message().contains("object"), "{bad}");
        }
    }

    #[test]
    fn an_instance_is_also_looked_for_where_its_deployment_keeps_it() {
        let place = place("instance/tiny-222222").unwrap();
        assert_eq!(place.prefixes, ["events/instance/tiny-222222/", "events/history/tiny/"]);
        let of = |object: &str| Event { object: object.to_owned(), ..Event::default() };
        assert!(place.shows(&of("instance/tiny-222222")) && !place.shows(&of("deployment/tiny")));
    }

    #[test]
    fn a_copy_is_told_once_and_the_same_thing_at_another_time_again() {
        let event = |seconds, revision| Event {
            time: Some(prost_types::Timestamp { seconds, nanos: 0 }),
            object: "instance/tiny-222222".to_owned(),
            revision,
            ..Event::default()
        };
        let mut told = Told::default();
        assert!(told.is_new(&event(1, 5)) && !told.is_new(&event(1, 6)) && told.is_new(&event(2, 7)));
        for n in 0..i64::try_from(COPIES_WITHIN).unwrap() {
            assert!(told.is_new(&event(100 + n, n)));
        }
        assert_eq!(told.0.len(), COPIES_WITHIN);
    }
}
