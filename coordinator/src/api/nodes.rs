//! What operators say of nodes: that lost ones are to be replaced all the same, that one which has left is not to be waited for
//! any longer, and that one is gone for good.

use crate::{
    control::{clock, events::Events, store_status, view::View},
    plan::{Freeze, snapshot::Snapshot},
    store::{self, Compare, Op, Store, Txn, keys, records},
};
use drover_proto::{
    ids,
    status::{invalid_field, reason, with_reason},
    store::v1 as record,
    v1::{self, EndAbsenceRequest, EndAbsenceResponse, OverrideFreezeRequest, RemoveNodeRequest, Severity},
};
use std::time::Duration;
use tonic::{Code, Status};

/// Longest time for which a freeze is overridden: whoever does it looks after what follows.
const OVERRIDE_MAX_MS: i64 = 3_600_000;
/// Most characters of a reason.
const REASON_MAX: usize = 200;
/// Records of runs that one transaction removes; one has room for 128 operations.
const RUNS_TOGETHER: usize = 100;
/// Longest wait for the view to show what was just written, so that a caller reads its own write.
const CATCH_UP: Duration = Duration::from_secs(2);
/// How often it is tried when a session's record is written meanwhile.
const ATTEMPTS: usize = 4;

/// Changes what is known of nodes.
#[derive(Debug, Clone)]
pub(super) struct Nodes {
    pub(super) store: Store,
    pub(super) view: View,
    pub(super) events: Events,
    /// Share of the nodes seen that may be lost, in percent.
    pub(super) freeze_share_percent: u32,
    /// Time to live of a session that nobody renews, in milliseconds.
    pub(super) session_ttl_ms: i64,
}

impl Nodes {
    /// The freeze as it is now.
    pub(super) fn freeze(&self) -> v1::Freeze {
        let (snapshot, now_ms) = (self.view.snapshot(), clock::now_ms());
        shown(&snapshot, Freeze::of(&snapshot, now_ms, self.freeze_share_percent), self.freeze_share_percent)
    }

    pub(super) async fn override_freeze(&self, by: &str, request: OverrideFreezeRequest) -> Result<v1::Freeze, Status> {
        check_reason(&request.reason)?;
        let for_ms = request.for_ms;
        if !(0..=OVERRIDE_MAX_MS).contains(&for_ms) {
            let what = format!("{for_ms} is not allowed: use 0 (no longer) to {OVERRIDE_MAX_MS} (an hour)");
            return Err(invalid_field("for_ms", what));
        }
        let op = if for_ms == 0 {
            Op::Delete(keys::FREEZE.to_owned())
        } else {
            let until = Some(clock::timestamp(clock::now_ms() + for_ms));
            let freeze = record::Freeze { override_until: until, by: by.to_owned(), reason: request.reason.clone() };
            records::put(keys::FREEZE, &freeze, 0)
        };
        let schema = self.view.snapshot().schema.as_ref().map_or(0, |schema| schema.mod_revision);
        // Not in a store that has just come back empty.
        let compare = vec![Compare::ModRevision(keys::SCHEMA.to_owned(), schema)];
        let outcome = self.store.txn(Txn { compare, then: vec![op], otherwise: vec![] }).await.map_err(store_status)?;
        if !outcome.succeeded {
            let what = "the store is not the one that this coordinator sees: try again";
            return Err(with_reason(Code::Unavailable, reason::STORE_CHANGED, what));
        }
        let message = if for_ms == 0 {
            format!("by {by}: replacement may freeze again{}", because(&request.reason))
        } else {
            format!(
                "by {by} for {} s: replacement goes on whatever share of the nodes is lost{}",
                for_ms / 1000,
                because(&request.reason)
            )
        };
        self.events.record("fleet".to_owned(), "FreezeOverridden", Severity::Warning, message);
        let _ = self.view.at_least(outcome.revision, CATCH_UP).await;
        Ok(self.freeze())
    }

    /// Takes the promise of a return out of the session's record: nobody renews its lease any more. The lease is not revoked:
    /// an agent that is back in this moment goes on with it.
    pub(super) async fn end_absence(&self, by: &str, request: EndAbsenceRequest) -> Result<EndAbsenceResponse, Status> {
        let node = &request.node;
        ids::check_node_name(node).map_err(|e| invalid_field("node", e.to_string()))?;
        check_reason(&request.reason)?;
        for _ in 0..ATTEMPTS {
            let snapshot = self.view.snapshot();
            if !snapshot.nodes.contains_key(node) {
                return Err(with_reason(Code::NotFound, reason::NOT_FOUND, format!("there is no node {node}")));
            }
            let stored = self.store.get(&keys::session(node)).await.map_err(store_status)?;
            let stored = stored.ok_or_else(|| not_absent(node, "it has no session"))?;
            let session = records::decode::<record::Session>(&stored).map_err(store_status)?;
            if !session.stream.is_empty() {
                return Err(not_absent(node, "it is connected"));
            }
            let absent_until = session.absent_until.filter(|until| clock::millis(until) > clock::now_ms());
            let Some(absent_until) = absent_until else {
                return Err(not_absent(node, "it has not said that it will be back, and its session runs out"));
            };
            let ends = record::Session { version: session.version + 1, absent_until: None, ..session };
            let compare = vec![
                Compare::ModRevision(keys::session(node), stored.mod_revision),
                Compare::ModRevision(keys::SCHEMA.to_owned(), snapshot.schema.as_ref().map_or(0, |s| s.mod_revision)),
            ];
            let then = vec![records::put(keys::session(node), &ends, ends.lease)];
            let outcome = match self.store.txn(Txn { compare, then, otherwise: vec![] }).await {
                Err(store::Error::LeaseGone) => return Err(not_absent(node, "its session has just ended")),
                outcome => outcome.map_err(store_status)?,
            };
            if !outcome.succeeded {
                // It was written meanwhile: by an agent that is back, or by another operator.
                continue;
            }
            let within_s = self.session_ttl_ms / 1000;
            let why = because(&request.reason);
            let message = format!("by {by}: its session runs out within {within_s} s unless its agent is back{why}");
            self.events.record(format!("node/{node}"), "AbsenceEnded", Severity::Warning, message);
            let _ = self.view.at_least(outcome.revision, CATCH_UP).await;
            let absent_until = Some(absent_until);
            return Ok(EndAbsenceResponse { absent_until, ends_within_ms: self.session_ttl_ms });
        }
        let what = format!("the session of {node} was written by others {ATTEMPTS} times in a row: try again");
        Err(with_reason(Code::Unavailable, reason::STORE_UNAVAILABLE, what))
    }

    /// Each transaction compares that the node has no session: one that is back is as it was, but for records of runs that it
    /// tells again.
    pub(super) async fn remove(&self, by: &str, request: RemoveNodeRequest) -> Result<(), Status> {
        let name = &request.name;
        ids::check_node_name(name).map_err(|e| invalid_field("name", e.to_string()))?;
        check_reason(&request.reason)?;
        let absent = Compare::CreateRevision(keys::session(name), 0);
        let stored = self.store.get(&keys::node(name)).await.map_err(store_status)?;
        let stored =
            stored.ok_or_else(|| with_reason(Code::NotFound, reason::NOT_FOUND, format!("there is no node {name}")))?;
        let runs: Vec<String> = {
            let snapshot = self.view.snapshot();
            let theirs = snapshot.runs.iter().filter(|(_, run)| run.value.node == *name);
            theirs.map(|(key, _)| format!("{}{key}", keys::RUNS)).collect()
        };
        for some in runs.chunks(RUNS_TOGETHER) {
            let then = some.iter().cloned().map(Op::Delete).collect();
            self.write(name, Txn { compare: vec![absent.clone()], then, ..Txn::default() }).await?;
        }
        let compare = vec![absent, Compare::ModRevision(keys::node(name), stored.mod_revision)];
        let then = vec![Op::Delete(keys::node(name)), Op::DeletePrefix(keys::events(&format!("node/{name}")))];
        self.write(name, Txn { compare, then, ..Txn::default() }).await?;
        let message = format!("{name}, by {by}: its name is free{}", because(&request.reason));
        self.events.record("fleet".to_owned(), "NodeRemoved", Severity::Info, message);
        Ok(())
    }

    async fn write(&self, name: &str, txn: Txn) -> Result<(), Status> {
        let outcome = self.store.txn(txn).await.map_err(store_status)?;
        if !outcome.succeeded {
            let what =
                format!("node {name} has a session, or was just changed: end its agent and wait until it is gone");
            return Err(with_reason(Code::FailedPrecondition, reason::SESSION_EXISTS, what));
        }
        let _ = self.view.at_least(outcome.revision, CATCH_UP).await;
        Ok(())
    }
}

fn not_absent(node: &str, why: &str) -> Status {
    let what = format!("the agent of {node} is not absent on purpose: {why}");
    with_reason(Code::FailedPrecondition, reason::NOT_ABSENT, what)
}

fn shown(snapshot: &Snapshot, freeze: Freeze, share_percent: u32) -> v1::Freeze {
    let whole = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let word = snapshot.freeze.as_ref().map(|f| &f.value).filter(|_| freeze.override_until_ms > 0);
    v1::Freeze {
        frozen: freeze.frozen(),
        lost: whole(freeze.lost),
        seen: whole(freeze.seen),
        share_percent: i32::try_from(share_percent).unwrap_or(i32::MAX),
        override_until: word.and_then(|word| word.override_until),
        override_by: word.map(|word| word.by.clone()).unwrap_or_default(),
        override_reason: word.map(|word| word.reason.clone()).unwrap_or_default(),
    }
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(" ({reason})") }
}

fn check_reason(reason: &str) -> Result<(), Status> {
    let count = reason.chars().count();
    if count > REASON_MAX {
        return Err(invalid_field("reason", format!("has {count} characters, {REASON_MAX} are allowed")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{memory::Memory, schema};
    use drover_proto::status::reason_of;
    use std::sync::Arc;
    use tokio_util::sync::CancellationToken;

    const TTL: Duration = Duration::from_secs(10);

    struct World {
        nodes: Nodes,
        lease: i64,
    }

    impl World {
        async fn new() -> Self {
            let store: Store = Arc::new(Memory::start(1));
            schema::open(&store, None).await.unwrap();
            let view = View::start(store.clone(), CancellationToken::new());
            let (events, _) = Events::start(store.clone(), "coordinator/test".to_owned());
            let then = vec![records::put(keys::node("a"), &record::Node::default(), 0)];
            let revision = store.txn(Txn { then, ..Txn::default() }).await.unwrap().revision;
            view.at_least(revision, CATCH_UP).await.unwrap();
            let lease = store.grant(TTL).await.unwrap();
            let nodes = Nodes { store, view, events, freeze_share_percent: 55, session_ttl_ms: 10_000 };
            Self { nodes, lease }
        }

        async fn session(&self, stream: &str, absent_ms: Option<i64>) {
            let absent_until = absent_ms.map(|ms| clock::timestamp(clock::now_ms() + ms));
            let stream = stream.to_owned();
            let session =
                record::Session { stream, absent_until, lease: self.lease, version: 7, ..record::Session::default() };
            let then = vec![records::put(keys::session("a"), &session, self.lease)];
            self.nodes.store.txn(Txn { then, ..Txn::default() }).await.unwrap();
        }

        async fn asked(&self, node: &str) -> Result<EndAbsenceResponse, Status> {
            let request = EndAbsenceRequest { node: node.to_owned(), reason: String::new() };
            self.nodes.end_absence("an operator", request).await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_promise_of_a_return_is_taken_back_and_the_session_left_to_its_lease() {
        let world = World::new().await;
        world.session("", Some(600_000)).await;
        let answer = world.asked("a").await.unwrap();
        assert!(answer.absent_until.is_some() && answer.ends_within_ms == 10_000);
        let left = world.nodes.store.get(&keys::session("a")).await.unwrap().unwrap();
        let session: record::Session = records::decode(&left).unwrap();
        assert_eq!((session.absent_until, session.version, left.lease), (None, 8, world.lease));
        let again = world.asked("a").await.unwrap_err();
        assert_eq!((again.code(), reason_of(&again).as_deref()), (Code::FailedPrecondition, Some(reason::NOT_ABSENT)));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_not_absent_is_left_alone_and_the_reason_is_told() {
        let world = World::new().await;
        assert_eq!(world.asked("b").await.unwrap_err().code(), Code::NotFound);
        assert_eq!(world.asked("no/name").await.unwrap_err().code(), Code::InvalidArgument);
        assert!(world.asked("a").await.unwrap_err().message().contains("it has no session"));
        for (stream, absent_ms, why) in [
            ("a stream", Some(600_000), "it is connected"),
            ("", None, "has not said that it will be back"),
            ("", Some(-1), "has not said that it will be back"),
        ] {
            world.session(stream, absent_ms).await;
            let refused = world.asked("a").await.unwrap_err();
            assert!(refused.message().contains(why), "{refused:?}");
            let kept = world.nodes.store.get(&keys::session("a")).await.unwrap().unwrap();
            assert_eq!(records::decode::<record::Session>(&kept).unwrap().version, 7);
        }
    }
}
