//! What owners report: written only while the report's token is that of the standing claim, in the same transaction.

use super::{clock, events::Events, mutant, view::View};
use crate::store::{Compare, Error, Op, Store, Txn, keys, records};
use drover_proto::{
    store::v1 as record,
    v1::{InstanceState, Severity, StatusReport, Token},
};

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

    /// Records one report; false when its token is not that of the standing claim, so that it changed nothing.
    pub async fn record(&self, node: &str, report: &StatusReport) -> Result<bool, Error> {
        let Some(token) = report.token else { return Ok(false) };
        let snapshot = self.view.snapshot();
        if token.generation != snapshot.generation() {
            return Ok(false);
        }
        let id = &report.instance;
        let status = record::Status {
            token: Some(token),
            node: node.to_owned(),
            state: report.state,
            pid: report.pid,
            restarts: report.restarts,
            message: report.message.clone(),
            since: report.since.or_else(|| Some(clock::now())),
        };
        let known = snapshot.statuses.get(id).map(|s| &s.value);
        if known == Some(&status) && snapshot.token(id) == Some(token) {
            return Ok(true);
        }
        let run = record::Run { node: node.to_owned(), token: Some(token), started_at: Some(clock::now()) };
        let mut then = vec![records::put(keys::status(id), &status, 0)];
        let ended = report.state() == InstanceState::Stopped;
        if ended {
            then.push(Op::Delete(keys::claim(id)));
            then.push(Op::Delete(keys::run(id, &token)));
        } else if !snapshot.runs.contains_key(&format!("{id}/{token}")) {
            then.push(records::put(keys::run(id, &token), &run, 0));
        }
        let compare = if mutant::on(mutant::name::STATUS_WITHOUT_FENCE) {
            vec![]
        } else {
            // A claim is never rewritten, so its revision is the token, and it names one owner.
            vec![Compare::ModRevision(keys::claim(id), token.revision)]
        };
        let outcome = self.store.txn(Txn { compare, then, otherwise: vec![] }).await?;
        if outcome.succeeded {
            self.tell(node, report, &token, known.filter(|k| k.token == Some(token)).map(record::Status::state));
            return Ok(true);
        }
        if ended { self.close_own_run(node, id, &token).await } else { Ok(false) }
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
            InstanceState::Backoff => ("BackOff", Severity::Warning),
            InstanceState::Suspect => ("Suspect", Severity::Warning),
            InstanceState::Failed => ("Failed", Severity::Error),
            InstanceState::Unspecified | InstanceState::Pending | InstanceState::Claimed => return,
        };
        let mut message = format!("on {node}, token {token}");
        if report.pid != 0 {
            message.push_str(&format!(", pid {}", report.pid));
        }
        if let Some(code) = report.exit_code {
            message.push_str(&format!(", exit code {code}"));
        }
        if let Some(signal) = report.exit_signal {
            message.push_str(&format!(", signal {signal}"));
        }
        if !report.message.is_empty() {
            message.push_str(&format!(": {}", report.message));
        }
        self.events.record_from(
            format!("node/{node}"),
            format!("instance/{}", report.instance),
            reason,
            severity,
            message,
        );
    }
}
