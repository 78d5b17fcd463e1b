//! One watch: a stream of its own, followed by a task until something goes wrong or its reader leaves.

use super::{
    Settings,
    convert::Prefix,
    error::{self, Kind},
};
use crate::store::{Changes, Error, WATCH_QUEUE, Watch};
use etcd_client::{WatchClient, WatchOptions, WatchResponse, WatchStream};
use std::time::Duration;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};

/// Opens a watch and waits for etcd's first answer, which says `created` and bears no events.
pub(super) async fn open(
    mut client: WatchClient,
    prefix: Prefix,
    under: &str,
    from_revision: i64,
    settings: &Settings,
) -> Result<Watch, Error> {
    let deadline = Instant::now() + settings.call_timeout;
    let silence = |_| error::silence(Kind::Read, "watch", settings.call_timeout);
    let lost = |error: etcd_client::Error| error::map(&error, Kind::Read, "watch");
    // Fragments stay off (the default): an answer then never splits a revision.
    let options = WatchOptions::new().with_prefix().with_start_revision(from_revision.max(0)).with_progress_notify();

    let opening = client.watch(prefix.add(under), Some(options));
    let mut stream = timeout_at(deadline, opening).await.map_err(silence)?.map_err(lost)?;
    let first = timeout_at(deadline, stream.message()).await.map_err(silence)?.map_err(lost)?;
    match first {
        Some(answer) if answer.canceled() => {
            return Err(error::cancelled(answer.compact_revision(), answer.cancel_reason()));
        }
        Some(answer) if answer.created() => {}
        _ => return Err(Error::Unavailable("etcd did not confirm the watch".to_owned())),
    }

    let (sender, changes) = mpsc::channel(WATCH_QUEUE);
    let (silence, patience) = (settings.watch_silence, settings.call_timeout);
    tokio::spawn(async move {
        tokio::select! {
            () = sender.closed() => {}
            error = follow(&mut stream, &prefix, &sender, silence, patience) => {
                // The reader may have left meanwhile; then nobody needs the error.
                let _ = sender.send(Err(error)).await;
            }
        }
    });
    Ok(Watch { changes })
}

/// Hands on what comes until the watch breaks; returns why.
async fn follow(
    stream: &mut WatchStream,
    prefix: &Prefix,
    reader: &mpsc::Sender<Result<Changes, Error>>,
    silence: Duration,
    patience: Duration,
) -> Error {
    let mut asked = false;
    loop {
        let answer = match timeout(if asked { patience } else { silence }, stream.message()).await {
            Ok(Ok(Some(answer))) => answer,
            Ok(Ok(None)) => return Error::Unavailable("etcd ended the watch".to_owned()),
            Ok(Err(error)) => return error::map(&error, Kind::Read, "watch"),
            Err(_) if asked => return error::silence(Kind::Read, "watch", patience),
            // A stream can be silent because nothing happens, or because it is dead: any answer tells.
            Err(_) => match timeout(patience, stream.request_progress()).await {
                Ok(Ok(())) => {
                    asked = true;
                    continue;
                }
                Ok(Err(error)) => return error::map(&error, Kind::Read, "watch"),
                Err(_) => return error::silence(Kind::Read, "watch", patience),
            },
        };
        asked = false;
        if answer.canceled() || answer.compact_revision() > 0 {
            return error::cancelled(answer.compact_revision(), answer.cancel_reason());
        }
        let Some(changes) = delivered(&answer, prefix) else { continue };
        if reader.send(Ok(changes)).await.is_err() {
            return Error::Unavailable("the watch has no reader".to_owned());
        }
    }
}

/// What an answer delivers. Its header is trusted only in progress answers of etcd's own accord: while a watch catches up,
/// the header of a batch is ahead of it; and the answer to a progress request (watch id -1) could overtake events before
/// etcd 3.4.25 and 3.5.8 (etcd issue 15220), so it is a sign of life and no more.
fn delivered(answer: &WatchResponse, prefix: &Prefix) -> Option<Changes> {
    let changes: Vec<_> = answer.events().iter().filter_map(|event| prefix.change(event)).collect();
    let last = answer.events().last().and_then(|event| event.kv()).map(etcd_client::KeyValue::mod_revision);
    match last {
        Some(revision) => Some(Changes { changes, revision }),
        None if answer.watch_id() >= 0 => Some(Changes { changes, revision: answer.header()?.revision() }),
        None => None,
    }
}
