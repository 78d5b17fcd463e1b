//! Events: the recorded ones in the order of their recording, then new ones as they happen.

use crate::{
    control::store_status,
    store::{Change, KeyValue, Store, keys},
};
use drover_proto::{
    status::invalid_field,
    store::v1 as record,
    v1::{Event, WatchEventsRequest, WatchEventsResponse},
};
use futures::{StreamExt as _, stream::BoxStream};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

const OUTBOUND: usize = 256;

/// Answers a watch.
pub(super) async fn watch(
    store: Store,
    request: WatchEventsRequest,
) -> Result<BoxStream<'static, Result<WatchEventsResponse, Status>>, Status> {
    let prefix = prefix(&request.object)?;
    if request.after_revision < 0 {
        return Err(invalid_field(
            "after_revision",
            format!("{} is negative: use 0 for all events", request.after_revision),
        ));
    }
    let listing = store.list(&prefix).await.map_err(store_status)?;
    let (send, stream) = mpsc::channel(OUTBOUND);
    tokio::spawn(async move {
        let mut recorded: Vec<Event> =
            listing.items.iter().filter_map(decode).filter(|e| e.revision > request.after_revision).collect();
        recorded.sort_by_key(|e| e.revision);
        for event in recorded {
            if send.send(answer(event)).await.is_err() {
                return;
            }
        }
        if !request.follow {
            return;
        }
        let failed = match store.watch(&prefix, listing.revision + 1).await {
            Err(error) => error,
            Ok(mut watch) => loop {
                let changes = tokio::select! {
                    changes = watch.next() => changes,
                    () = send.closed() => return,
                };
                match changes {
                    Err(error) => break error,
                    Ok(changes) => {
                        for change in changes.changes {
                            let Change::Put(item) = change else { continue };
                            let Some(event) = decode(&item) else { continue };
                            if send.send(answer(event)).await.is_err() {
                                return;
                            }
                        }
                    }
                }
            },
        };
        // The caller goes on from the last revision that it saw.
        let _ = send.send(Err(store_status(failed))).await;
    });
    Ok(ReceiverStream::new(stream).boxed())
}

fn answer(event: Event) -> Result<WatchEventsResponse, Status> {
    Ok(WatchEventsResponse { event: Some(event) })
}

fn decode(item: &KeyValue) -> Option<Event> {
    let mut event = record::Event::decode(item.value.as_slice()).ok()?.event?;
    event.revision = item.mod_revision;
    Some(event)
}

/// Part of the store that the object's events lie in.
fn prefix(object: &str) -> Result<String, Status> {
    match object.split_once('/') {
        None if object.is_empty() => Ok(keys::EVENTS.to_owned()),
        None if object == crate::control::events::FLEET => Ok(keys::events(object)),
        Some((kind @ ("deployment" | "instance" | "node"), name)) => {
            if name.is_empty() {
                return Ok(format!("{}{kind}/", keys::EVENTS));
            }
            if name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
                return Ok(keys::events(object));
            }
            Err(invalid(object))
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

    #[test]
    fn an_object_chooses_its_ring_a_kind_all_of_its_rings() {
        assert_eq!(prefix("").unwrap(), "events/");
        assert_eq!(prefix("deployment/tiny").unwrap(), "events/deployment/tiny/");
        assert_eq!(prefix("node/").unwrap(), "events/node/");
        assert_eq!(prefix("fleet").unwrap(), "events/fleet/");
        for bad in ["pod/x", "tiny", "deployment/../x", "node/A"] {
            assert!(prefix(bad).unwrap_err().message().contains("object"), "{bad}");
        }
    }
}
