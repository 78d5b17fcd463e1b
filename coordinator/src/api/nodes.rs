//! What operators say of nodes: that lost ones are to be replaced all the same, and that one is gone for good.

use crate::{
    control::{clock, events::Events, store_status, view::View},
    plan::{Freeze, snapshot::Snapshot},
    store::{Compare, Op, Store, Txn, keys, records},
};
use drover_proto::{
    ids,
    status::{invalid_field, reason, with_reason},
    store::v1 as record,
    v1::{self, OverrideFreezeRequest, RemoveNodeRequest, Severity},
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

/// Changes what is known of nodes.
#[derive(Debug, Clone)]
pub(super) struct Nodes {
    pub(super) store: Store,
    pub(super) view: View,
    pub(super) events: Events,
    /// Share of the nodes seen that may be lost, in percent.
    pub(super) freeze_share_percent: u32,
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
        let outcome = self.store.txn(Txn { then: vec![op], ..Txn::default() }).await.map_err(store_status)?;
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
