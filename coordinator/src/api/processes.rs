//! Processes of the hosts: listed, stopped by hand, cleaned up. The nodes say what there is and do what is decided here.

use super::{convert, page};
use crate::{
    control::{
        commands::{self, Commands},
        events::Events,
        store_status,
        view::View,
    },
    plan::snapshot::Snapshot,
    store::{Compare, Store, Txn, keys, records},
};
use drover_proto::{
    ids,
    status::{invalid_field, reason, with_reason},
    store::v1 as record,
    transport::Peer,
    v1::{
        CleanupProcessesRequest, CleanupProcessesResponse, EndProcessesCommand, HostProcess, ListProcessesCommand,
        ListProcessesRequest, ListProcessesResponse, NodeFailure, ProcessAction, ProcessName, ProcessOwner,
        ProcessResult, Severity, StopProcessRequest, StopProcessResponse, node_command::Command,
    },
};
use std::{collections::BTreeMap, time::Duration};
use tonic::{Code, Request, Status};

/// How long a node may take to say what runs on it.
const LIST: Duration = Duration::from_secs(4);
/// How long it may take to end processes.
const END: Duration = Duration::from_secs(9);
/// Longest reason, in characters.
const REASON_MAX: usize = 200;
/// How often a record that others change meanwhile is read again.
const ATTEMPTS: usize = 5;
/// Longest wait for the view to show what was just written.
const CATCH_UP: Duration = Duration::from_secs(2);

/// Lists and ends processes.
#[derive(Debug, Clone)]
pub(super) struct Processes {
    pub(super) store: Store,
    pub(super) view: View,
    pub(super) events: Events,
    pub(super) commands: Commands,
}

/// Who asks for something, for the events.
pub(super) fn caller<T>(request: &Request<T>) -> String {
    let node = Peer::of(request).ok().and_then(|peer| peer.node);
    let address = request.remote_addr().map_or_else(|| "an unknown address".to_owned(), |a| a.to_string());
    node.map_or_else(|| format!("an operator at {address}"), |node| format!("node {node} at {address}"))
}

impl Processes {
    pub(super) async fn list(&self, request: ListProcessesRequest) -> Result<ListProcessesResponse, Status> {
        let (all, unreachable) = self.look(&request.node).await?;
        let (page, next_page_token) = page::cut(all.iter(), request.page_size, &request.page_token)?;
        let processes = page.into_iter().map(|(_, process)| process.clone()).collect();
        Ok(ListProcessesResponse { processes, next_page_token, unreachable })
    }

    pub(super) async fn stop(&self, who: &str, request: StopProcessRequest) -> Result<StopProcessResponse, Status> {
        let why = why(&request.reason)?;
        let result = match (request.instance.as_str(), request.node.as_str(), request.pid) {
            ("", "", 0) => return Err(invalid_field("instance", "is empty: name an instance, or a node and a pid")),
            ("", "", _) => return Err(invalid_field("node", "is empty: a pid is one of a node; name that too")),
            ("", node, pid) => {
                if i32::try_from(pid).is_ok_and(|pid| pid > 0) {
                    self.stop_pid(who, &why, node, pid, request.force).await?
                } else {
                    return Err(invalid_field("pid", format!("{pid} is not allowed: use the id of a process")));
                }
            }
            (instance, "", 0) => self.stop_instance(who, &why, instance, request.force).await?,
            _ => {
                return Err(invalid_field("instance", "is given together with a node or a pid: name one or the other"));
            }
        };
        Ok(StopProcessResponse { result: Some(result) })
    }

    pub(super) async fn clean_up(
        &self,
        who: &str,
        request: CleanupProcessesRequest,
    ) -> Result<CleanupProcessesResponse, Status> {
        let why = why(&request.reason)?;
        let dry_run = request.dry_run.unwrap_or(true);
        let (all, mut unreachable) = self.look(&request.node).await?;
        let mut by_node: BTreeMap<String, Vec<HostProcess>> = BTreeMap::new();
        for process in all.into_values().filter(ends_on_request) {
            by_node.entry(process.node.clone()).or_default().push(process);
        }
        let (because, force) = (why.as_str(), request.force);
        let ended = by_node.into_iter().map(|(node, processes)| async move {
            if dry_run {
                return Ok(processes.into_iter().map(would_end).collect());
            }
            let outcome = self.end(who, because, &node, processes, force, false).await;
            outcome.map_err(|error| NodeFailure { node, message: error.to_string() })
        });
        let mut results: Vec<ProcessResult> = Vec::new();
        for outcome in futures::future::join_all(ended).await {
            match outcome {
                Ok(more) => results.extend::<Vec<_>>(more),
                Err(failure) => unreachable.push(failure),
            }
        }
        tracing::debug!(who, why, dry_run, processes = results.len(), "a clean-up was asked for");
        Ok(CleanupProcessesResponse { results, dry_run, unreachable })
    }

    /// The processes of a node, or of all, by "<node>/<pid>"; and the nodes that did not say. A node that was named has to.
    async fn look(&self, node: &str) -> Result<(BTreeMap<String, HostProcess>, Vec<NodeFailure>), Status> {
        let snapshot = self.view.snapshot();
        let nodes: Vec<String> = if node.is_empty() {
            snapshot.nodes.keys().cloned().collect()
        } else {
            ids::check_node_name(node).map_err(|e| invalid_field("node", e.to_string()))?;
            vec![node.to_owned()]
        };
        let asked = nodes.into_iter().map(|node| async move {
            let answer = self.commands.ask(&node, Command::ListProcesses(ListProcessesCommand {}), LIST).await;
            (node, answer)
        });
        let (mut all, mut unreachable) = (BTreeMap::new(), Vec::new());
        for (name, answer) in futures::future::join_all(asked).await {
            match answer {
                Ok(answer) => {
                    for process in answer.processes {
                        let process = HostProcess { node: name.clone(), ..process };
                        all.insert(format!("{name}/{:010}", process.pid), process);
                    }
                }
                Err(error) if !node.is_empty() => return Err(status_of(error)),
                Err(error) => unreachable.push(NodeFailure { node: name, message: error.to_string() }),
            }
        }
        Ok((all, unreachable))
    }

    async fn stop_pid(&self, who: &str, why: &str, node: &str, pid: i64, force: bool) -> Result<ProcessResult, Status> {
        let (all, _) = self.look(node).await?;
        let Some(process) = all.into_values().find(|process| process.pid == pid) else {
            let what = format!("node {node} has no llama-server with pid {pid}: `drover processes list` shows them");
            return Err(with_reason(Code::NotFound, reason::NOT_FOUND, what));
        };
        match process.owner() {
            ProcessOwner::Owned => self.stop_instance(who, why, &process.instance, force).await,
            _ if ends_on_request(&process) => {
                let ended = self.end(who, why, node, vec![process], force, false).await.map_err(status_of)?;
                ended.into_iter().next().ok_or_else(|| Status::internal(format!("node {node} did not say what it did")))
            }
            _ => Ok(left_alone(process)),
        }
    }

    /// Stops an instance: it is wanted no more, so its node drains and ends it, and the reconciler makes another one.
    async fn stop_instance(&self, who: &str, why: &str, id: &str, force: bool) -> Result<ProcessResult, Status> {
        ids::check_instance_id(id).map_err(|e| invalid_field("instance", e.to_string()))?;
        let deployment = self.want_no_more(id).await?;
        let how = if force { "at once" } else { "after draining" };
        let asked = format!("{who} has {id} stopped {how}{why}");
        let holder = self.view.snapshot().claims.get(id).map(|claim| claim.value.node.clone());
        self.events.record_on_node(holder.as_deref(), id, "StoppedByHand", Severity::Info, asked.clone());
        // What is recorded of the instance goes with it.
        self.events.record(format!("deployment/{deployment}"), "StoppedByHand", Severity::Info, asked);
        let snapshot = self.view.snapshot();
        let process = process_of(&snapshot, id);
        let message = format!("{id} is drained and stopped; its deployment gets another one");
        let draining =
            ProcessResult { process: Some(process.clone()), action: ProcessAction::Draining.into(), message };
        if !force || process.node.is_empty() {
            return Ok(draining);
        }
        let (all, _) = self.look(&process.node).await?;
        let running = |p: &HostProcess| p.instance == id && p.owner() == ProcessOwner::Owned;
        let Some(running) = all.into_values().find(running) else { return Ok(draining) };
        let ended = self.end(who, why, &process.node, vec![running], true, true).await.map_err(status_of)?;
        Ok(ended.into_iter().next().unwrap_or(draining))
    }

    /// Gives the deployment that the instance belongs to.
    async fn want_no_more(&self, id: &str) -> Result<String, Status> {
        for _ in 0..ATTEMPTS {
            let key = keys::instance(id);
            let stored = self.store.get(&key).await.map_err(store_status)?.ok_or_else(|| convert::no_instance(id))?;
            let now: record::Instance = records::decode(&stored).map_err(store_status)?;
            if !now.wanted {
                return Ok(now.deployment);
            }
            let deployment = now.deployment.clone();
            let traceparent = drover_telemetry::context::current_traceparent();
            let next = record::Instance { wanted: false, offer: None, traceparent, ..now };
            let compare = vec![Compare::ModRevision(key.clone(), stored.mod_revision)];
            let txn = Txn { compare, then: vec![records::put(key, &next, 0)], otherwise: vec![] };
            let outcome = self.store.txn(txn).await.map_err(store_status)?;
            if outcome.succeeded {
                // Written is written; a view that lags only shows it later.
                let _ = self.view.at_least(outcome.revision, CATCH_UP).await;
                return Ok(deployment);
            }
        }
        let what = format!("{id} was changed by others {ATTEMPTS} times in a row: try again");
        Err(with_reason(Code::Aborted, reason::GENERATION_MISMATCH, what))
    }

    /// Has a node end processes, and records what became of each.
    async fn end(
        &self,
        who: &str,
        why: &str,
        node: &str,
        processes: Vec<HostProcess>,
        force: bool,
        owned: bool,
    ) -> Result<Vec<ProcessResult>, commands::Error> {
        let named = processes.iter().map(|p| ProcessName { pid: p.pid, start_ticks: p.start_ticks }).collect();
        let command = Command::EndProcesses(EndProcessesCommand { processes: named, force, owned });
        let asked = self.commands.ask(node, command, END).await;
        let object = format!("node/{node}");
        let mut results = match asked {
            Ok(answer) => answer.results,
            Err(error) => {
                let what = format!("{who} wanted to end {} processes{why}: {error}", processes.len());
                self.events.record(object, "ProcessesNotEnded", Severity::Warning, what);
                return Err(error);
            }
        };
        for result in &mut results {
            // Of one that has ended meanwhile the node knows no more than its name.
            let same = |p: &&HostProcess| {
                result.process.as_ref().is_some_and(|r| (r.pid, r.start_ticks) == (p.pid, p.start_ticks))
            };
            result.process = processes.iter().find(same).cloned().or_else(|| result.process.take());
            let (pid, owner) = result.process.as_ref().map_or((0, ""), |p| (p.pid, word(p.owner())));
            let (reason, severity) = match result.action() {
                ProcessAction::Ended => ("ProcessEnded", Severity::Info),
                ProcessAction::ToldToEnd => ("ProcessToldToEnd", Severity::Warning),
                _ => ("ProcessLeftAlone", Severity::Warning),
            };
            let what = format!("pid {pid} ({owner}): {}; asked for by {who}{why}", result.message);
            self.events.record(object.clone(), reason, severity, what);
        }
        Ok(results)
    }
}

/// What an operator may have ended: what no agent keeps and whose identity is known.
fn ends_on_request(process: &HostProcess) -> bool {
    matches!(process.owner(), ProcessOwner::Stale | ProcessOwner::Foreign)
}

fn would_end(process: HostProcess) -> ProcessResult {
    let message = "would be ended".to_owned();
    ProcessResult { process: Some(process), action: ProcessAction::WouldEnd.into(), message }
}

fn left_alone(process: HostProcess) -> ProcessResult {
    let message =
        if process.message.is_empty() { "it is none of this node's".to_owned() } else { process.message.clone() };
    ProcessResult { process: Some(process), action: ProcessAction::LeftAlone.into(), message }
}

/// What the store knows of the process of an instance.
fn process_of(snapshot: &Snapshot, id: &str) -> HostProcess {
    let owned = snapshot.claims.get(id);
    HostProcess {
        node: owned.map(|claim| claim.value.node.clone()).unwrap_or_default(),
        pid: snapshot.statuses.get(id).map_or(0, |status| status.value.pid),
        owner: ProcessOwner::Owned.into(),
        instance: id.to_owned(),
        token: snapshot.token(id),
        ..HostProcess::default()
    }
}

fn word(owner: ProcessOwner) -> &'static str {
    match owner {
        ProcessOwner::Owned => "owned",
        ProcessOwner::Stale => "stale",
        ProcessOwner::Foreign => "foreign",
        ProcessOwner::OtherAgent => "another agent's",
        ProcessOwner::Unknown | ProcessOwner::Unspecified => "of unknown owner",
    }
}

/// The reason as it ends an event's message.
#[allow(clippy::result_large_err)] // tonic's own type
fn why(reason: &str) -> Result<String, Status> {
    let count = reason.chars().count();
    if count > REASON_MAX {
        return Err(invalid_field("reason", format!("has {count} characters: use at most {REASON_MAX}")));
    }
    let reason = reason.trim();
    Ok(if reason.is_empty() { String::new() } else { format!(", because: {reason}") })
}

fn status_of(error: commands::Error) -> Status {
    use commands::Error as E;
    let text = error.to_string();
    match error {
        E::NoNode(_) => with_reason(Code::NotFound, reason::NOT_FOUND, text),
        E::Away(_) | E::Silent { .. } | E::Failed { .. } => {
            with_reason(Code::Unavailable, reason::NODE_UNREACHABLE, text)
        }
        E::Busy(_) => with_reason(Code::ResourceExhausted, reason::NODE_UNREACHABLE, text),
        E::Store(error) => store_status(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_no_agent_keeps_and_what_is_known_ends_on_request() {
        let ends =
            |owner: ProcessOwner| ends_on_request(&HostProcess { owner: owner.into(), ..HostProcess::default() });
        assert!(ends(ProcessOwner::Foreign) && ends(ProcessOwner::Stale));
        for owner in [ProcessOwner::Owned, ProcessOwner::OtherAgent, ProcessOwner::Unknown, ProcessOwner::Unspecified] {
            assert!(!ends(owner), "{owner:?}");
        }
        assert!(!ends_on_request(&HostProcess { owner: 99, ..HostProcess::default() }), "of a newer agent");
    }

    #[test]
    fn a_reason_is_bounded() {
        assert_eq!(why(" x ").unwrap(), ", because: x");
        assert_eq!(why("").unwrap(), "");
        assert!(why(&"x".repeat(201)).unwrap_err().message().contains("reason"));
    }
}
