//! What owners report: written only while the report's token is that of the standing claim, in the same transaction.

use super::{clock, events::Events, mutant, view::View};
use crate::{
    plan::snapshot::Snapshot,
    store::{
        Compare, Error, Op, Store, Txn, keys,
        pack::{Step, pack},
        records,
    },
};
use drover_proto::{
    store::v1 as record,
    v1::{InstanceState, Severity, StatusReport, Token},
};
use futures::future::join_all;
use std::time::Duration;
use tracing::{Instrument as _, Span};

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

    /// Records reports of a node about different instances, by few transactions: what [`Statuses::record`] answers for each.
    /// `stream` is the session's revision at which the stream was welcomed that they came by. `written` is the revision of the
    /// last such transaction: what it wrote is what these replace.
    pub async fn record_all(
        &self,
        node: &str,
        stream: i64,
        reports: &[StatusReport],
        written: &mut i64,
    ) -> Vec<Result<bool, Error>> {
        let spans: Vec<Span> = reports.iter().map(span).collect();
        let together = if reports.len() > 1 {
            self.record_together(node, stream, reports, &spans, written).await
        } else {
            vec![None]
        };
        let each = reports.iter().zip(spans).zip(together).map(async |((report, span), recorded)| match recorded {
            Some(accepted) => Ok(accepted),
            None => self.record(node, stream, report).instrument(span).await,
        });
        join_all(each).await
    }

    /// For each report whether it was recorded; `None` for those that are to be tried for themselves.
    async fn record_together(
        &self,
        node: &str,
        stream: i64,
        reports: &[StatusReport],
        spans: &[Span],
        written: &mut i64,
    ) -> Vec<Option<bool>> {
        let mut settled = vec![None; reports.len()];
        let known = reports.iter().map(|report| self.refers_to(report)).fold(*written, i64::max);
        let Ok(snapshot) = self.view.at_least(known, CATCH_UP).await else { return settled };
        let mut writes = Vec::new();
        for (n, report) in reports.iter().enumerate() {
            match Write::of(&snapshot, node, stream, report) {
                Ok(write) => writes.push((n, write.step(), write)),
                Err(accepted) => settled[n] = Some(accepted),
            }
        }
        for run in pack(writes, 1, |(_, step, _)| step) {
            let together = in_this_store(&snapshot, Step::join(run.iter().map(|(_, step, _)| step)), vec![]);
            let outcome = self.store.txn(together).await;
            let Ok(outcome) = outcome else { continue };
            if outcome.succeeded {
                *written = outcome.revision;
                for (n, _, write) in run {
                    spans[n].in_scope(|| self.tell(node, &reports[n], &write.token, write.before));
                    settled[n] = Some(true);
                }
            }
        }
        settled
    }

    /// Revision of the store that tells what a report is about: its claim, or that this is gone. The tokens of an earlier
    /// generation have revisions that may never come again; nothing is waited for, since they are refused anyway.
    fn refers_to(&self, report: &StatusReport) -> i64 {
        let token = report.token.unwrap_or_default();
        if token.generation < self.view.snapshot().generation() { 0 } else { token.revision }
    }

    /// Records one report; false when its token is not that of the node's standing claim, so that it changed nothing.
    ///
    /// The status that it replaces is compared too: a report whose outcome was unknown, and which commits after all, does
    /// not replace what its node has reported since, maybe through another coordinator. Nor does one that has waited here for
    /// so long that its node has gone on to another stream, and has reported on that.
    pub async fn record(&self, node: &str, stream: i64, report: &StatusReport) -> Result<bool, Error> {
        let id = &report.instance;
        // The view at the token's revision or later shows the claim, or that it is gone.
        let mut known = self.refers_to(report);
        for _ in 0..ATTEMPTS {
            let reached = self.view.at_least(known, CATCH_UP).await;
            let snapshot = reached.map_err(|behind| Error::Unavailable(behind.to_string()))?;
            let write = match Write::of(&snapshot, node, stream, report) {
                Ok(write) => write,
                Err(accepted) => return Ok(accepted),
            };
            let token = write.token;
            let otherwise = vec![Op::Get(keys::claim(id)), Op::Get(keys::status(id)), Op::Get(keys::SCHEMA.to_owned())];
            let outcome = self.store.txn(in_this_store(&snapshot, write.step(), otherwise)).await?;
            if outcome.succeeded {
                self.tell(node, report, &token, write.before);
                return Ok(true);
            }
            let revision = |n: usize| outcome.reads.get(n).and_then(|r| r.first()).map_or(0, |kv| kv.mod_revision);
            if revision(2) != schema_revision(&snapshot) {
                return Err(Error::Unavailable(
                    "the store was restored meanwhile: what the token says is read anew".to_owned(),
                ));
            }
            if revision(0) != token.revision {
                return if write.ended { self.close_own_run(node, id, &token).await } else { Ok(false) };
            }
            // The view had not seen the last report yet: what follows from it (the run's record) is worked out anew.
            known = known.max(revision(1));
        }
        Err(Error::Unavailable(format!("the status of {id} was written by others {ATTEMPTS} times in a row")))
    }

    /// A node may close the record of a run of its own that has ended, whoever owns the instance now.
    pub(super) async fn close_own_run(&self, node: &str, id: &str, token: &Token) -> Result<bool, Error> {
        let key = keys::run(id, token);
        let Some(stored) = self.store.get(&key).await? else { return Ok(true) };
        if records::decode::<record::Run>(&stored)?.node != node {
            return Ok(false);
        }
        let compare = vec![Compare::ModRevision(key.clone(), stored.mod_revision)];
        let step = Step { compare, then: vec![Op::Delete(key)] };
        Ok(self.store.txn(in_this_store(&self.view.snapshot(), step, vec![])).await?.succeeded)
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

fn schema_revision(snapshot: &Snapshot) -> i64 {
    snapshot.schema.as_ref().map_or(0, |schema| schema.mod_revision)
}

/// A transaction of a step that was decided from a snapshot: void once the store was restored, where the revisions that it
/// compares may come again.
fn in_this_store(snapshot: &Snapshot, Step { mut compare, then }: Step, otherwise: Vec<Op>) -> Txn {
    if !mutant::on(mutant::name::NO_SCHEMA_COMPARE) {
        compare.push(Compare::ModRevision(keys::SCHEMA.to_owned(), schema_revision(snapshot)));
    }
    Txn { compare, then, otherwise }
}

fn span(report: &StatusReport) -> Span {
    let state = report.state().as_str_name();
    let span = tracing::info_span!("status.record", instance = report.instance, state);
    drover_telemetry::context::set_parent(&span, &report.traceparent);
    span
}

/// A report as it is written.
struct Write {
    id: String,
    token: Token,
    then: Vec<Op>,
    /// Revision of the status that it replaces.
    replaces: i64,
    /// State reported before under the same token.
    before: Option<InstanceState>,
    /// Whether it says that the run has ended.
    ended: bool,
}

impl Write {
    /// `Err` when the snapshot settles it: with `true` it stands there already, with `false` it is another's.
    fn of(snapshot: &Snapshot, node: &str, stream: i64, report: &StatusReport) -> Result<Self, bool> {
        // Of a key that does not exist the revision is 0, so no such token may get as far as the compare.
        let token = report.token.filter(|token| token.revision > 0).ok_or(false)?;
        let id = &report.instance;
        let others = snapshot.claims.get(id).is_some_and(|c| c.mod_revision == token.revision && c.value.node != node);
        if token.generation != snapshot.generation() || others {
            return Err(false);
        }
        let status = record::Status {
            token: Some(token),
            node: node.to_owned(),
            state: report.state,
            pid: report.pid,
            restarts: report.restarts,
            message: report.message.clone(),
            since: report.since.or_else(|| Some(clock::now())),
            progressed_at: report.progressed_at,
            stream_revision: stream,
        };
        let known = snapshot.statuses.get(id);
        // What was compared is what was read: of the same run, so the same session's revisions or a later session's.
        let newer = known.is_some_and(|k| k.value.token == Some(token) && k.value.stream_revision > stream);
        if newer && !mutant::on(mutant::name::REPORTS_OF_AN_OLDER_STREAM) {
            return Err(false);
        }
        if known.is_some_and(|k| k.value == status) && snapshot.token(id) == Some(token) {
            return Err(true);
        }
        let ended = report.state() == InstanceState::Stopped;
        Ok(Self {
            id: id.clone(),
            token,
            then: writes(snapshot, id, &token, &status, ended),
            replaces: known.map_or(0, |k| k.mod_revision),
            before: known.filter(|k| k.value.token == Some(token)).map(|k| k.value.state()),
            ended,
        })
    }

    /// Written while the claim stands, in the place of the status that the snapshot shows.
    fn step(&self) -> Step {
        let compare = if mutant::on(mutant::name::STATUS_WITHOUT_FENCE) {
            vec![]
        } else {
            vec![
                // A claim is never rewritten, so its revision is the token, and it names one owner.
                Compare::ModRevision(keys::claim(&self.id), self.token.revision),
                Compare::ModRevision(keys::status(&self.id), self.replaces),
            ]
        };
        Step { compare, then: self.then.clone() }
    }
}

/// What a report writes: the status, and the records of runs. One that is reported for the first time has taken the place
/// of its node's older ones: a node has one process of an instance, and raises its token when it claims it again.
fn writes(snapshot: &Snapshot, id: &str, token: &Token, status: &record::Status, ended: bool) -> Vec<Op> {
    let mut then = vec![records::put(keys::status(id), status, 0)];
    if ended {
        then.push(Op::Delete(keys::claim(id)));
        then.push(Op::Delete(keys::run(id, token)));
    } else {
        // Written together with the status, which is compared: what the snapshot shows of it is what stands.
        let known = snapshot.runs.get(&format!("{id}/{token}")).map(|stored| &stored.value);
        let ready = status.state() == InstanceState::Ready;
        if known.is_none_or(|known| known.ready != ready) {
            let started_at = known.and_then(|known| known.started_at).or_else(|| Some(clock::now()));
            let run = record::Run { node: status.node.clone(), token: Some(*token), started_at, ready };
            then.push(records::put(keys::run(id, token), &run, 0));
        }
        if known.is_some() {
            return then;
        }
    }
    let all = format!("{id}/");
    let runs =
        snapshot.runs.range(all.clone()..).take_while(|(key, _)| key.starts_with(&all)).map(|(_, run)| &run.value);
    let older = runs.filter(|run| run.node == status.node).filter_map(|run| run.token.filter(|t| t < token));
    then.extend(older.take(OLDER_RUNS).map(|older| Op::Delete(keys::run(id, &older))));
    then
}
