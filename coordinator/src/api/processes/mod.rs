//! Processes of the hosts: listed, stopped by hand, cleaned up. The nodes say what there is and do what is decided here.
//!
//! | file | what it is for |
//! |---|---|
//! | `request` | PURE: what a request to stop is about |
//! | `stop` | what is done about it |
//! | `unwanted` | the desired state: instances that are wanted no more, deployments that ask for fewer |
//! | `ask` | the nodes: what runs there, and its end |
//! | `outcome` | PURE: answers for people |
//! | `duplicates` | PURE: instances that several of them serve |

mod ask;
mod duplicates;
mod outcome;
mod request;
mod stop;
#[cfg(test)]
mod tests;
mod unwanted;

use super::page;
use crate::{
    control::{commands::Commands, events::Events, view::View},
    store::Store,
};
use drover_proto::{
    status::invalid_field,
    transport::Peer,
    v1::{
        CheckDuplicatesResponse, CleanupProcessesRequest, CleanupProcessesResponse, HostProcess, ListProcessesRequest,
        ListProcessesResponse, NodeFailure, ProcessResult,
    },
};
use std::collections::BTreeMap;
use tonic::{Request, Status};

/// Longest reason, in characters.
const REASON_MAX: usize = 200;

/// Lists and ends processes.
#[derive(Debug, Clone)]
pub(super) struct Processes {
    pub(super) store: Store,
    pub(super) view: View,
    pub(super) events: Events,
    pub(super) commands: Commands,
}

/// Who wants something ended, how and why.
#[derive(Debug, Clone, Copy)]
struct Order<'a> {
    /// For events.
    who: &'a str,
    /// As it ends an event's message.
    why: &'a str,
    /// SIGKILL follows soon.
    force: bool,
    /// Deployments get other instances for those that are stopped.
    replace: bool,
    /// What no instance accounts for is ended too.
    confirm: bool,
}

/// Who asks for something, for the events.
pub(super) fn caller<T>(request: &Request<T>) -> String {
    let node = Peer::of(request).ok().and_then(|peer| peer.node);
    let address = request.remote_addr().map_or_else(|| "an unknown address".to_owned(), |a| a.to_string());
    node.map_or_else(|| format!("an operator at {address}"), |node| format!("node {node} at {address}"))
}

impl Processes {
    pub(super) async fn list(&self, request: ListProcessesRequest) -> Result<ListProcessesResponse, Status> {
        // A page that can't be cut is refused before any node is asked.
        page::cut(std::iter::empty::<(&String, ())>(), request.page_size, &request.page_token)?;
        let looked = self.look(&request.node, 0).await?;
        let (page, next_page_token) = page::cut(looked.all.iter(), request.page_size, &request.page_token)?;
        let processes = page.into_iter().map(|(_, process)| process.clone()).collect();
        let (unreachable, not_listed) = (looked.unreachable, looked.not_listed);
        Ok(ListProcessesResponse { processes, next_page_token, unreachable, not_listed })
    }

    pub(super) async fn clean_up(
        &self,
        who: &str,
        request: CleanupProcessesRequest,
    ) -> Result<CleanupProcessesResponse, Status> {
        let why = why(&request.reason)?;
        let dry_run = request.dry_run.unwrap_or(true);
        let order = Order { who, why: &why, force: request.force, replace: false, confirm: !dry_run };
        let looked = self.look(&request.node, 0).await?;
        let others = looked.all.into_values().filter(outcome::ends_on_request).collect();
        let (results, failures) = self.end_others(&order, others).await;
        tracing::debug!(who, why, dry_run, processes = results.len(), "a clean-up was asked for");
        let unreachable = looked.unreachable.into_iter().chain(failures).collect();
        Ok(CleanupProcessesResponse { results, dry_run, unreachable, not_listed: looked.not_listed })
    }

    pub(super) async fn check_duplicates(&self) -> Result<CheckDuplicatesResponse, Status> {
        let looked = self.look("", 0).await?;
        // Read after the nodes were asked: what they said then is compared with claims that are as new.
        let duplicates = duplicates::duplicates(looked.all.into_values(), &self.view.snapshot());
        Ok(CheckDuplicatesResponse { duplicates, unreachable: looked.unreachable, not_listed: looked.not_listed })
    }

    /// Ends what no instance accounts for, if that is confirmed; else says that it would. Nodes that fail are named.
    async fn end_others(&self, order: &Order<'_>, others: Vec<HostProcess>) -> (Vec<ProcessResult>, Vec<NodeFailure>) {
        if !order.confirm {
            return (others.into_iter().map(outcome::would_end).collect(), Vec::new());
        }
        self.end_all(order, others, false).await
    }
}

/// By the node that they run on.
fn by_node(processes: Vec<HostProcess>) -> BTreeMap<String, Vec<HostProcess>> {
    let mut by_node: BTreeMap<String, Vec<HostProcess>> = BTreeMap::new();
    for process in processes {
        by_node.entry(process.node.clone()).or_default().push(process);
    }
    by_node
}

/// The reason as it ends an event's message.
#[allow(clippy::result_large_err)] // tonic's own type
pub(super) fn why(reason: &str) -> Result<String, Status> {
    let reason = reason.trim();
    let count = reason.chars().count();
    if count > REASON_MAX {
        return Err(invalid_field("reason", format!("has {count} characters: use at most {REASON_MAX}")));
    }
    if let Some(bad) = reason.chars().find(|c| c.is_control()) {
        let what = format!("has a control character ({}): use one line of plain text", bad.escape_default());
        return Err(invalid_field("reason", what));
    }
    Ok(if reason.is_empty() { String::new() } else { format!(", because: {reason}") })
}

#[cfg(test)]
mod reasons {
    use super::*;

    #[test]
    fn a_reason_is_one_bounded_line() {
        assert_eq!(why(" x ").unwrap(), ", because: x");
        assert_eq!(why("").unwrap(), "");
        assert!(why(&"x".repeat(201)).unwrap_err().message().contains("reason"));
        assert!(why("x\ny").unwrap_err().message().contains("\\n"));
    }
}
