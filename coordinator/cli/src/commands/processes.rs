//! `drover processes`: the llama-servers of the hosts, whoever started them.

use super::{
    Context,
    fetch::{self, Listed},
};
use crate::{
    arguments::{Cleanup, Processes, ProcessesCommand, StopProcess},
    failure::Failure,
    output::tables,
    progress::Progress,
    trace::Trace,
};
use drover_proto::v1::{
    CleanupProcessesRequest, NodeFailure, NotListed, ProcessAction, ProcessResult, StopProcessRequest,
};
use serde_json::json;
use std::time::Duration;

/// How long a call may take before it is said what is waited for.
const MOMENT: Duration = Duration::from_secs(1);

/// Lists, cleans up or stops.
pub async fn run(context: &Context, options: &Processes) -> Result<(), Failure> {
    match &options.command {
        ProcessesCommand::List(list) => show(context, list.node.as_deref().unwrap_or_default()).await,
        ProcessesCommand::Cleanup(options) => clean_up(context, options).await,
        ProcessesCommand::Stop(options) => stop(context, options).await,
    }
}

async fn show(context: &Context, node: &str) -> Result<(), Failure> {
    let client = context.client()?;
    let Listed { processes, unreachable, not_listed } =
        shown("asking the nodes", fetch::processes(&client, node)).await?;
    let output = &context.output;
    if output.is_json() {
        return output.document(&json!({
            "processes": fetch::json_list("HostProcess", &processes)?,
            "unreachable": fetch::json_list("NodeFailure", &unreachable)?,
            "not_listed": fetch::json_list("NotListed", &not_listed)?,
        }));
    }
    output.table(&tables::PROCESSES, tables::processes(&processes), "no llama-server runs on these hosts")?;
    tell_missing(context, &unreachable, &not_listed);
    Ok(())
}

async fn clean_up(context: &Context, options: &Cleanup) -> Result<(), Failure> {
    let request = CleanupProcessesRequest {
        node: options.node.clone().unwrap_or_default(),
        dry_run: Some(!options.yes),
        force: options.force,
        reason: options.reason.clone().unwrap_or_default(),
    };
    let (client, trace) = (context.client()?, Trace::begin());
    let call = client.write_once(|mut fleet| {
        let request = trace.request(request.clone());
        async move { fleet.cleanup_processes(request).await }
    });
    let answer = shown("asking the nodes", call).await?;
    context.output.verbose(&format!("trace {}", trace.id()));
    let output = &context.output;
    if output.is_json() {
        output.document(&json!({
            "results": fetch::json_list("ProcessResult", &answer.results)?,
            "dry_run": answer.dry_run,
            "unreachable": fetch::json_list("NodeFailure", &answer.unreachable)?,
            "not_listed": fetch::json_list("NotListed", &answer.not_listed)?,
            "trace_id": trace.id(),
        }))?;
    } else {
        output.table(&tables::RESULTS, tables::results(&answer.results), "nothing to clean up")?;
        if answer.dry_run && !answer.results.is_empty() {
            output.notice("nothing was done: add --yes to end them");
        }
        tell_missing(context, &answer.unreachable, &answer.not_listed);
    }
    let done = |result: &&ProcessResult| over(result) || answer.dry_run && result.action() == ProcessAction::WouldEnd;
    outcome(answer.results.len() - answer.results.iter().filter(done).count(), &answer.unreachable)
}

async fn stop(context: &Context, options: &StopProcess) -> Result<(), Failure> {
    let request = StopProcessRequest {
        instance: options.instance.clone().unwrap_or_default(),
        node: options.node.clone().unwrap_or_default(),
        pid: options.pid.map_or(0, i64::from),
        force: options.force,
        reason: options.reason.clone().unwrap_or_default(),
        name: options.name.clone().unwrap_or_default(),
        all: options.all,
        replace: options.replace,
        confirm: options.yes,
    };
    let (client, trace) = (context.client()?, Trace::begin());
    let call = client.write_once(|mut fleet| {
        let request = trace.request(request.clone());
        async move { fleet.stop_process(request).await }
    });
    let answer = shown("stopping", call).await?;
    let output = &context.output;
    output.verbose(&format!("trace {}", trace.id()));
    if output.is_json() {
        output.document(&json!({
            "results": fetch::json_list("ProcessResult", &answer.results)?,
            "unreachable": fetch::json_list("NodeFailure", &answer.unreachable)?,
            "not_listed": fetch::json_list("NotListed", &answer.not_listed)?,
            "trace_id": trace.id(),
        }))?;
    } else {
        output.table(&tables::RESULTS, tables::results(&answer.results), "nothing runs there")?;
        tell_missing(context, &answer.unreachable, &answer.not_listed);
    }
    let unconfirmed = answer.results.iter().filter(|result| result.action() == ProcessAction::WouldEnd).count();
    if unconfirmed > 0 {
        output.notice(&format!("{unconfirmed} belong to no instance and were left alone: add --yes to end them too"));
    }
    outcome(answer.results.iter().filter(|result| !over(result)).count(), &answer.unreachable)
}

/// Whether what was asked for is done, or under way by itself.
fn over(result: &ProcessResult) -> bool {
    matches!(result.action(), ProcessAction::Ended | ProcessAction::Draining)
}

/// Each was shown; the exit code tells that there was something.
fn outcome(lives: usize, unreachable: &[NodeFailure]) -> Result<(), Failure> {
    match (lives, unreachable.first()) {
        (0, None) => Ok(()),
        (0, Some(node)) => Err(Failure::Answered(format!("{} was left out: {}", node.node, node.message))),
        (1, _) => Err(Failure::Answered("1 process has not ended: see its message".to_owned())),
        (lives, _) => Err(Failure::Answered(format!("{lives} processes have not ended: see their messages"))),
    }
}

/// Waits for a call, and says what for when it takes longer than a moment.
pub(super) async fn shown<T>(what: &str, call: impl Future<Output = T>) -> T {
    let progress = Progress::begin();
    let mut call = std::pin::pin!(call);
    let done = match tokio::time::timeout(MOMENT, &mut call).await {
        Ok(done) => done,
        Err(_) => {
            progress.doing(what);
            call.await
        }
    };
    progress.end();
    done
}

pub(super) fn tell_missing(context: &Context, unreachable: &[NodeFailure], not_listed: &[NotListed]) {
    for node in unreachable {
        context.output.notice(&crate::output::printable(&format!("{} is left out: {}", node.node, node.message)));
    }
    for node in not_listed {
        let what = format!("{}: {} more processes are not listed", node.node, node.processes);
        context.output.notice(&crate::output::printable(&what));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anything_left_over_is_a_failure() {
        assert!(outcome(0, &[]).is_ok());
        let text = |failure: Result<(), Failure>| match failure {
            Err(Failure::Answered(text)) => text,
            other => panic!("{other:?}"),
        };
        assert!(text(outcome(2, &[])).contains("2 processes have not ended"));
        let away = NodeFailure { node: "b".to_owned(), message: "is away".to_owned() };
        assert!(text(outcome(0, &[away])).contains("b was left out: is away"));
        let result = |action: ProcessAction| ProcessResult { action: action.into(), ..ProcessResult::default() };
        assert!(over(&result(ProcessAction::Ended)) && over(&result(ProcessAction::Draining)));
        assert!(!over(&result(ProcessAction::WouldEnd)) && !over(&result(ProcessAction::ToldToEnd)));
    }
}
