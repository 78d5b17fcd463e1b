//! What owners report: written only while the report's token is that of the standing claim, in the same transaction.

use super::{clock, events::Events, mutant, view::View};
use crate::{
    plan::snapshot::Snapshot,
    store::{Compare, Error, Op, Store, Txn, keys, records},
};
use drover_proto::{
    store::v1 as record,
    v1::{InstanceState, Severity, StatusReport, Token},
};
use std::time::Duration;

/// Longest wait for the view to reach the claim that a report is about.
const CATCH_UP: Duration = Duration::from_secs(2);
/// Attempts to replace the last status.
const ATTEMPTS: usize = 4;
/// Records of older runs that one report removes at most; a transaction has room for 128 operations.
const OLDER_RUNS: usize = 64;

/// Records reports.
#[derive(Debug, Clone)]
pub struct Statuses {
    store: Store,
    view: View,
    events: Events,
}

impl Statuses {
    /// Over this store and view.
    #[must_use]
    pub fn new(store: Store, view: View, events: Events) -> Self {
        Self { store, view, events }
    }

    /// Records one report; false when its token is not that of the node's standing claim, so that it changed nothing.
    ///
    /// The status that it replaces is compared too: a report whose outcome was unknown, and which commits after all, does
    /// not replace what its node has reported since, maybe through another coordinator.
    pub async fn record(&self, node: &str, report: &StatusReport) -> Result<bool, Error> {
        // Of a key that does not exist the revision is 0, so no such token may get as far as the compare.
        let Some(token) = report.token.filter(|token| token.revision > 0) else { return Ok(false) };
        // The view at the token's revision or later shows the claim, or that it is gone.
        let reached = self.view.at_least(token.revision, CATCH_UP).await;
        let snapshot = reached.map_err(|behind| Error::Unavailable(behind.to_string()))?;
        let id = &report.instance;
        let others = snapshot.claims.get(id).is_some_and(|c| c.mod_revision == token.revision && c.value.node != node);
        if token.generation != snapshot.generation() || others {
            return Ok(false);
        }
        let status = record::Status {
            token: Some(token),
            node: node.to_owned(),
            state: report.state,
            pid: report.pid,
            restarts: report.restarts,
            message: report.message.clone(),
            since: report.since.or_else(|| Some(clock::now())),
        };
        let known = snapshot.statuses.get(id);
        if known.is_some_and(|k| k.value == status) && snapshot.token(id) == Some(token) {
            return Ok(true);
        }
        let ended = report.state() == InstanceState::Stopped;
        let then = writes(&snapshot, id, &token, &status, ended);
        let mut replaces = known.map_or(0, |k| k.mod_revision);
        for _ in 0..ATTEMPTS {
            let compare = if mutant::on(mutant::name::STATUS_WITHOUT_FENCE) {
                vec![]
            } else {
                vec![
                    // A claim is never rewritten, so its revision is the token, and it names one owner.
                    Compare::ModRevision(keys::claim(id), token.revision),
                    Compare::ModRevision(keys::status(id), replaces),
                ]
            };
            let otherwise = vec![Op::Get(keys::claim(id)), Op::Get(keys::status(id))];
            let outcome = self.store.txn(Txn { compare, then: then.clone(), otherwise }).await?;
            if outcome.succeeded {
                let before = known.filter(|k| k.value.token == Some(token)).map(|k| k.value.state());
                self.tell(node, report, &token, before);
                return Ok(true);
            }
            let revision = |n: usize| outcome.reads.get(n).and_then(|r| r.first()).map_or(0, |kv| kv.mod_revision);
            if revision(0) != token.revision {
                return if ended { self.close_own_run(node, id, &token).await } else { Ok(false) };
            }
            // The view had not seen the last report yet.
            replaces = revision(1);
        }
        Err(Error::Unavailable(format!("the status of {id} was written by others {ATTEMPTS} times in a row")))
    }

    /// A node may close the record of a run of its own that has ended, whoever owns the instance now.
    async fn close_own_run(&self, node: &str, id: &str, token: &Token) -> Result<bool, Error> {
        let key = keys::run(id, token);
        let Some(stored) = self.store.get(&key).await? else { return Ok(true) };
        if records::decode::<record::Run>(&stored)?.node != node {
            return Ok(false);
        }
        let compare = vec![Compare::ModRevision(key.clone(), stored.mod_revision)];
        Ok(self.store.txn(Txn { compare, then: vec![Op::Delete(key)], otherwise: vec![] }).await?.succeeded)
    }

    fn tell(&self, node: &str, report: &StatusReport, token: &Token, before: Option<InstanceState>) {
        let state = report.state();
        if before == Some(state) {
            return;
        }
        let (reason, severity) = match state {
            InstanceState::Starting => ("Starting", Severity::Info),
            InstanceState::Loading => ("Loading", Severity::Info),
            InstanceState::Ready => ("Ready", Severity::Info),
            InstanceState::Draining => ("Draining", Severity::Info),
            InstanceState::Stopped => ("Stopped", Severity::Info),
            InstanceState::Suspect => ("Suspect", Severity::Warning),
            InstanceState::Failed => ("Failed", Severity::Error),
            // The node tells each end and each failed attempt itself, with its reason: a state that soon passes may never be
            // reported.
            InstanceState::Backoff => return,
            InstanceState::Unspecified | InstanceState::Pending | InstanceState::Claimed => return,
        };
        let mut message = format!("on {node}, token {token}");
        if report.pid != 0 {
            message.push_str(&format!(", pid {}", report.pid));
        }
        // Of one that runs again it is how the one before it ended, which was told then.
        let ended = matches!(state, InstanceState::Stopped | InstanceState::Failed);
        if let Some(code) = report.exit_code.filter(|_| ended) {
            message.push_str(&format!(", exit code {code}"));
        }
        if let Some(signal) = report.exit_signal.filter(|_| ended) {
            message.push_str(&format!(", signal {signal}"));
        }
        if !report.message.is_empty() {
            message.push_str(&format!(": {}", report.message));
        }
        if ended || state == InstanceState::Ready {
            self.events.record_by_node(node, &report.instance, reason, severity, message);
        } else {
            let (source, object) = (format!("node/{node}"), format!("instance/{}", report.instance));
            self.events.record_from(source, object, reason, severity, message);
        }
    }
}

/// What a report writes: the status, and the records of runs. One that is reported for the first time has taken the place
/// of its node's older ones: a node has one process of an instance, and raises its token when it claims it again.
fn writes(snapshot: &Snapshot, id: &str, token: &Token, status: &record::Status, ended: bool) -> Vec<Op> {
    let mut then = vec![records::put(keys::status(id), status, 0)];
    if ended {
        then.push(Op::Delete(keys::claim(id)));
        then.push(Op::Delete(keys::run(id, token)));
    } else if !snapshot.runs.contains_key(&format!("{id}/{token}")) {
        let run = record::Run { node: status.node.clone(), token: Some(*token), started_at: Some(clock::now()) };
        then.push(records::put(keys::run(id, token), &run, 0));
    } else {
        return then;
    }
    let all = format!("{id}/");
    let runs =
        snapshot.runs.range(all.clone()..).take_while(|(key, _)| key.starts_with(&all)).map(|(_, run)| &run.value);
    let older = runs.filter(|run| run.node == status.node).filter_map(|run| run.token.filter(|t| t < token));
    then.extend(older.take(OLDER_RUNS).map(|older| Op::Delete(keys::run(id, &older))));
    then
}
