//! The agent's side of a proxy that is about to end: it goes on being told the routes, and its requests in flight count,
//! until it is gone. Else a server would be stopped under a stream that an upgraded proxy still carries.

use super::{
    client::{Desired, Observed},
    peer::Peer,
    wire::{FromAgent, FromProxy},
};
use std::collections::BTreeMap;
use tokio::sync::watch;

/// What a retired proxy told last.
#[derive(Debug, Default, Clone)]
pub(super) struct Retired {
    pub(super) applied: u64,
    pub(super) in_flight: BTreeMap<String, u64>,
}

/// Talks with a retired proxy until it is gone; `sent` is the sequence of the routes that it was given last.
pub(super) async fn attend(
    mut peer: Peer,
    mut sent: u64,
    mut desires: watch::Receiver<Desired>,
    observed: watch::Sender<Observed>,
) {
    let pid = peer.hello.pid;
    loop {
        let desired = desires.borrow_and_update().clone();
        if let Some(within) = desired.end {
            if let Err(error) = peer.end(within).await {
                tracing::warn!(pid, "a retired proxy has not ended: {error:#}");
            }
            break;
        }
        if let Some(routes) = desired.routes.filter(|_| desired.sequence > sent) {
            let message = FromAgent::Routes { sequence: desired.sequence, routes: routes.to_vec() };
            if peer.send(&message).await.is_err() {
                break;
            }
            sent = desired.sequence;
        }
        tokio::select! {
            changed = desires.changed() => if changed.is_err() {
                // The agent ends; the proxy drains on.
                return;
            },
            message = peer.next() => match message {
                Ok(Some(FromProxy::State { applied, in_flight })) => observed.send_modify(|o| {
                    o.retired.insert(pid, Retired { applied, in_flight });
                }),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            },
        }
    }
    observed.send_modify(|o| {
        o.retired.remove(&pid);
    });
}
