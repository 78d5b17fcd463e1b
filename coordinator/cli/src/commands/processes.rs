//! `drover processes`: the llama-servers of the hosts, whoever started them.

use super::{Context, fetch};
use crate::{
    arguments::{Cleanup, Processes, ProcessesCommand, StopProcess},
    failure::Failure,
    output::tables,
    trace::Trace,
};
use drover_proto::v1::{CleanupProcessesRequest, NodeFailure, ProcessAction, ProcessResult, StopProcessRequest};
use serde_json::json;

/// Lists, cleans up or stops.
pub async fn run(context: &Context, options: &Processes) -> Result<(), Failure> {
    match &options.command {
        ProcessesCommand::List(list) => show(context, list.node.as_deref().unwrap_or_default()).await,
        ProcessesCommand::Cleanup(options) => clean_up(context, options).await,
        ProcessesCommand::Stop(options) => stop(context, options).await,
    }
}

async fn show(context: &Context, node: &str) -> Result<(), Failure> {
    let (processes, unreachable) = fetch::processes(&context.client()?, node).await?;
    let output = &context.output;
    if output.is_json() {
        return output.document(&json!({
            "processes": fetch::json_list("HostProcess", &processes)?,
            "unreachable": fetch::json_list("NodeFailure", &unreachable)?,
        }));
    }
    output.table(&tables::PROCESSES, tables::processes(&processes), "no llama-server runs on these hosts")?;
    tell_unreachable(context, &unreachable);
    Ok(())
}

async fn clean_up(context: &Context, options: &Cleanup) -> Result<(), Failure> {
    let request = CleanupProcessesRequest {
        node: options.node.clone().unwrap_or_default(),
        dry_run: Some(!options.yes),
        force: options.force,
        reason: options.reason.clone().unwrap_or_default(),
    };
    let trace = Trace::begin();
    let answer = context
        .client()?
        .write(|mut fleet| {
            let request = trace.request(request.clone());
            async move { fleet.cleanup_processes(request).await }
        })
        .await?;
    context.output.verbose(&format!("trace {}", trace.id()));
    let output = &context.output;
    if output.is_json() {
        output.document(&json!({
            "results": fetch::json_list("ProcessResult", &answer.results)?,
            "dry_run": answer.dry_run,
            "unreachable": fetch::json_list("NodeFailure", &answer.unreachable)?,
            "trace_id": trace.id(),
        }))?;
    } else {
        output.table(&tables::RESULTS, tables::results(&answer.results), "nothing to clean up")?;
        if answer.dry_run && !answer.results.is_empty() {
            output.notice("nothing was done: add --yes to end them");
        }
        tell_unreachable(context, &answer.unreachable);
    }
    let lives = answer.results.iter().filter(|result| !over(result)).count();
    match (lives, answer.unreachable.first()) {
        (0, None) => Ok(()),
        (0, Some(node)) => Err(Failure::Answered(format!("{} was left out: {}", node.node, node.message))),
        (lives, _) if answer.dry_run => Err(Failure::Answered(format!("{lives} processes are of no known action"))),
        (lives, _) => Err(Failure::Answered(format!("{lives} processes have not ended: see their messages"))),
    }
}

async fn stop(context: &Context, options: &StopProcess) -> Result<(), Failure> {
    let request = StopProcessRequest {
        instance: options.instance.clone().unwrap_or_default(),
        node: options.node.clone().unwrap_or_default(),
        pid: options.pid.map_or(0, i64::from),
        force: options.force,
        reason: options.reason.clone().unwrap_or_default(),
    };
    let trace = Trace::begin();
    let answer = context
        .client()?
        .write(|mut fleet| {
            let request = trace.request(request.clone());
            async move { fleet.stop_process(request).await }
        })
        .await?;
    context.output.verbose(&format!("trace {}", trace.id()));
    let result = answer.result.ok_or_else(|| fetch::empty("StopProcess"))?;
    if context.output.is_json() {
        let shown = fetch::json("ProcessResult", &result)?;
        context.output.document(&json!({ "result": shown, "trace_id": trace.id() }))?;
    } else {
        context.output.table(&tables::RESULTS, tables::results(std::slice::from_ref(&result)), "")?;
    }
    if over(&result) { Ok(()) } else { Err(Failure::Answered(format!("it has not ended: {}", result.message))) }
}

/// Whether what was asked for is done, or under way by itself.
fn over(result: &ProcessResult) -> bool {
    matches!(result.action(), ProcessAction::Ended | ProcessAction::Draining | ProcessAction::WouldEnd)
}

fn tell_unreachable(context: &Context, unreachable: &[NodeFailure]) {
    for node in unreachable {
        context.output.notice(&crate::output::printable(&format!("{} is left out: {}", node.node, node.message)));
    }
}
