//! The mark in a session's record that says by which stream its agent is attached: taken away when that ends, so that the
//! next agent of the host may have the session, and exchanged for the time of a planned absence when the agent leaves.

use super::Opened;
use crate::control::{clock, mutant};
use crate::store::{Compare, Error, Store, Txn, keys, records};
use drover_proto::{limits, store::v1 as record};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Pause after a write that has failed or that others have overtaken.
const RETRY: Duration = Duration::from_millis(300);

/// Takes the mark away after the stream's end. Tried for as long as the session can live without its agent: a mark that
/// stays keeps the next agent waiting until it has ended.
pub(super) async fn detach(store: &Store, node: &str, opened: &Opened) {
    let until = Instant::now() + opened.ttl;
    while Instant::now() < until {
        match write(store, node, opened, None).await {
            Ok(_) => return,
            Err(error) => tracing::debug!(node, %error, "the session is not free for the node's next agent yet"),
        }
        sleep(RETRY).await;
    }
}

/// Writes that the agent has left, and until when its session is kept for it. `false` when it is attached by another stream
/// by now, or the session is gone: then what it said on this one is void. The write also ends a claim that is under way.
pub(super) async fn leave(store: &Store, node: &str, opened: &Opened, within: Duration) -> Result<bool, Error> {
    let within_ms = i64::try_from(within.min(limits::ABSENCE_MAX).as_millis()).unwrap_or(i64::MAX);
    let until = Instant::now() + opened.ttl;
    loop {
        match write(store, node, opened, Some(within_ms)).await {
            Err(error) if Instant::now() + RETRY >= until => return Err(error),
            Err(_) => sleep(RETRY).await,
            settled => return settled,
        }
    }
}

/// An error when nothing is known to have been written: to be tried again.
async fn write(store: &Store, node: &str, opened: &Opened, absent_ms: Option<i64>) -> Result<bool, Error> {
    let key = keys::session(node);
    let Some(stored) = store.get(&key).await? else { return Ok(false) };
    let session = records::decode::<record::Session>(&stored)?;
    let ours = session.stream == opened.stream || mutant::on(mutant::name::ABSENCE_WITHOUT_STREAM_COMPARE);
    if session.session_id != opened.session_id || !ours {
        return Ok(false);
    }
    let left = record::Session {
        version: session.version + 1,
        stream: String::new(),
        absent_until: absent_ms.filter(|ms| *ms > 0).map(|ms| clock::timestamp(clock::now_ms() + ms)),
        ..session
    };
    let compare = vec![
        Compare::ModRevision(key.clone(), stored.mod_revision),
        Compare::ModRevision(keys::SCHEMA.to_owned(), opened.schema),
    ];
    let txn = Txn { compare, then: vec![records::put(key, &left, left.lease)], otherwise: vec![] };
    match store.txn(txn).await {
        Ok(outcome) if outcome.succeeded => Ok(true),
        Ok(_) => Err(Error::Unavailable("the session's record was just written by others".to_owned())),
        // With its lease the session is gone.
        Err(Error::LeaseGone) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{memory::Memory, schema};
    use std::sync::Arc;

    async fn world() -> (Store, Opened) {
        let store: Store = Arc::new(Memory::start(1));
        let schema = schema::open(&store, None).await.unwrap();
        let lease = store.grant(Duration::from_secs(10)).await.unwrap();
        let opened = Opened { lease, schema: schema.mod_revision, ..Opened::example("s", "first") };
        put(&store, &opened, "first").await;
        (store, opened)
    }

    async fn put(store: &Store, opened: &Opened, stream: &str) {
        let [session_id, stream] = ["s", stream].map(str::to_owned);
        let session = record::Session { session_id, stream, lease: opened.lease, ..record::Session::default() };
        let then = vec![records::put(keys::session("a"), &session, opened.lease)];
        store.txn(Txn { then, ..Txn::default() }).await.unwrap();
    }

    async fn session(store: &Store) -> record::Session {
        records::decode(&store.get(&keys::session("a")).await.unwrap().unwrap()).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_says_until_when_and_is_attached_no_more() {
        let (store, opened) = world().await;
        assert_eq!(leave(&store, "a", &opened, Duration::from_secs(60)).await, Ok(true));
        let left = session(&store).await;
        let ms = clock::millis(&left.absent_until.unwrap()) - clock::now_ms();
        assert!(left.stream.is_empty() && (59_000..=60_000).contains(&ms), "{ms}");
        assert_eq!(leave(&store, "a", &opened, Duration::from_secs(60)).await, Ok(false), "it was attached no more");
        put(&store, &opened, "first").await;
        assert_eq!(leave(&store, "a", &opened, limits::ABSENCE_MAX * 9).await, Ok(true));
        let most = clock::millis(&session(&store).await.absent_until.unwrap()) - clock::now_ms();
        assert!(most <= i64::try_from(limits::ABSENCE_MAX.as_millis()).unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_gone_on_elsewhere_is_neither_away_nor_detached() {
        let (store, opened) = world().await;
        put(&store, &opened, "second").await;
        assert_eq!(leave(&store, "a", &opened, Duration::from_secs(60)).await, Ok(false));
        detach(&store, "a", &opened).await;
        let now = session(&store).await;
        assert_eq!((now.stream.as_str(), now.absent_until), ("second", None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_has_ended_frees_the_session() {
        let (store, opened) = world().await;
        detach(&store, "a", &opened).await;
        let now = session(&store).await;
        assert_eq!((now.stream.as_str(), now.session_id.as_str()), ("", "s"));
    }
}
