//! Asks the nodes what runs there, and has them end it.

use super::{Order, Processes, by_node, outcome};
use crate::control::commands;
use drover_proto::{
    ids,
    status::invalid_field,
    v1::{
        CommandAnswer, EndProcessesCommand, HostProcess, ListProcessesCommand, NodeFailure, NotListed, ProcessAction,
        ProcessName, ProcessResult, Severity, node_command::Command,
    },
};
use futures::StreamExt as _;
use std::{collections::BTreeMap, time::Duration};
use tonic::Status;

/// How long a node may take to say what runs on it.
const LIST: Duration = Duration::from_secs(4);
/// How long it may take to end processes.
const END: Duration = Duration::from_secs(9);
/// Nodes that are asked at the same time. All that are there answer within milliseconds, and one that is away is not asked.
const CONCURRENT: usize = 64;
/// Most characters of a node's own word in an answer.
const TEXT_MAX: usize = 500;

/// What nodes have said of their processes.
#[derive(Debug, Default)]
pub(super) struct Looked {
    /// By "<node>/<pid>".
    pub(super) all: BTreeMap<String, HostProcess>,
    /// Nodes that did not say.
    pub(super) unreachable: Vec<NodeFailure>,
    /// Nodes that have more.
    pub(super) not_listed: Vec<NotListed>,
}

impl Looked {
    fn add(&mut self, node: &str, answer: CommandAnswer) {
        for process in answer.processes {
            // Its name is that of the session which the answer came over, whatever it says.
            let process = HostProcess { node: node.to_owned(), ..process };
            self.all.insert(format!("{node}/{:010}", process.pid), process);
        }
        if answer.not_listed > 0 {
            self.not_listed.push(NotListed { node: node.to_owned(), processes: answer.not_listed });
        }
    }
}

impl Processes {
    /// The processes of a node, or of all when it is empty; of this pid, or of any when it is 0. A node that was named has
    /// to answer.
    pub(super) async fn look(&self, node: &str, pid: i64) -> Result<Looked, Status> {
        if node.is_empty() {
            let nodes = self.view.snapshot().nodes.keys().cloned().collect();
            return Ok(self.look_at(nodes).await);
        }
        ids::check_node_name(node).map_err(|e| invalid_field("node", e.to_string()))?;
        let answer = self.ask_what_runs(node, pid).await.map_err(outcome::status_of)?;
        let mut looked = Looked::default();
        looked.add(node, answer);
        Ok(looked)
    }

    /// The processes of these nodes.
    pub(super) async fn look_at(&self, nodes: Vec<String>) -> Looked {
        let asked = nodes.into_iter().map(|node| async move {
            let answer = self.ask_what_runs(&node, 0).await;
            (node, answer)
        });
        let mut answers: Vec<_> = futures::stream::iter(asked).buffer_unordered(CONCURRENT).collect().await;
        answers.sort_by(|(one, _), (other, _)| one.cmp(other));
        let mut looked = Looked::default();
        for (node, answer) in answers {
            match answer {
                Ok(answer) => looked.add(&node, answer),
                Err(error) => looked.unreachable.push(NodeFailure { node, message: bounded(&error.to_string()) }),
            }
        }
        looked
    }

    async fn ask_what_runs(&self, node: &str, pid: i64) -> Result<CommandAnswer, commands::Error> {
        self.commands.ask(node, Command::ListProcesses(ListProcessesCommand { pid }), LIST).await
    }

    /// Has the nodes end these processes, all at the same time; names the nodes that fail.
    pub(super) async fn end_all(
        &self,
        order: &Order<'_>,
        processes: Vec<HostProcess>,
        owned: bool,
    ) -> (Vec<ProcessResult>, Vec<NodeFailure>) {
        let asked = by_node(processes).into_iter().map(|(node, processes)| async move {
            let outcome = self.end(order, &node, processes, owned).await;
            outcome.map_err(|error| NodeFailure { node, message: bounded(&error.to_string()) })
        });
        let outcomes: Vec<_> = futures::stream::iter(asked).buffer_unordered(CONCURRENT).collect().await;
        let (mut results, mut failures) = (Vec::new(), Vec::new());
        for outcome in outcomes {
            match outcome {
                Ok(more) => results.extend(more),
                Err(failure) => failures.push(failure),
            }
        }
        results.sort_by_cached_key(|r| r.process.as_ref().map(|p| (p.node.clone(), p.pid)));
        failures.sort_by(|one: &NodeFailure, other| one.node.cmp(&other.node));
        (results, failures)
    }

    /// Has a node end processes, and records what became of each. `owned`: those of instances, which the store says are to
    /// stop.
    pub(super) async fn end(
        &self,
        order: &Order<'_>,
        node: &str,
        processes: Vec<HostProcess>,
        owned: bool,
    ) -> Result<Vec<ProcessResult>, commands::Error> {
        let (who, why) = (order.who, order.why);
        let named = processes.iter().map(|p| ProcessName { pid: p.pid, start_ticks: p.start_ticks }).collect();
        let command = Command::EndProcesses(EndProcessesCommand { processes: named, force: order.force, owned });
        let object = format!("node/{node}");
        let answer = match self.commands.ask(node, command, END).await {
            Ok(answer) => answer,
            Err(error) => {
                let what = format!("{who} wanted to end {} processes{why}: {error}", processes.len());
                self.events.record(object, "ProcessesNotEnded", Severity::Warning, what);
                return Err(error);
            }
        };
        let results = outcome::settle(processes, answer.results);
        for result in &results {
            let (pid, owner) = result.process.as_ref().map_or((0, ""), |p| (p.pid, outcome::word(p.owner())));
            let (reason, severity) = match result.action() {
                ProcessAction::Ended => ("ProcessEnded", Severity::Info),
                ProcessAction::ToldToEnd => ("ProcessToldToEnd", Severity::Warning),
                _ => ("ProcessLeftAlone", Severity::Warning),
            };
            let what = format!("pid {pid} ({owner}): {}; asked for by {who}{why}", bounded(&result.message));
            self.events.record(object.clone(), reason, severity, what);
        }
        Ok(results)
    }
}

fn bounded(text: &str) -> String {
    text.chars().take(TEXT_MAX).collect()
}
