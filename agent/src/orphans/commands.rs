//! What operators ask of this node, and the answers.

use super::{Orphans, Process, end};
use drover_proto::v1::{
    CommandAnswer, EndProcessesCommand, HostProcess, NodeCommand, ProcessAction, ProcessName, ProcessOwner,
    ProcessResult, node_command::Command,
};
use std::{sync::Arc, time::Duration};
use tokio::{sync::mpsc, task::JoinSet};

/// Commands, and answers, that wait at a time.
pub const WAITING: usize = 16;
/// Most processes that one command may end.
const ENDS_MAX: usize = 256;
/// Longest work on one command: the asking coordinator does not wait longer.
const LIMIT: Duration = Duration::from_secs(10);

/// Carries commands out, several at the same time, until nobody sends any more. Each is answered once.
pub async fn work(orphans: Arc<Orphans>, mut asked: mpsc::Receiver<NodeCommand>, answers: mpsc::Sender<CommandAnswer>) {
    let mut running = JoinSet::new();
    while let Some(command) = asked.recv().await {
        while running.try_join_next().is_some() {}
        if running.len() >= WAITING {
            tracing::warn!(id = command.id, "too many commands at once: one is left out");
            continue;
        }
        let (orphans, answers) = (orphans.clone(), answers.clone());
        running.spawn(async move {
            let id = command.id.clone();
            let late = || failed("it took too long".to_owned());
            let answer = tokio::time::timeout(LIMIT, carry_out(&orphans, command)).await.unwrap_or_else(|_| late());
            if answers.try_send(CommandAnswer { id, ..answer }).is_err() {
                tracing::warn!("too many answers wait: one is left out");
            }
        });
    }
}

fn failed(error: String) -> CommandAnswer {
    CommandAnswer { error, ..CommandAnswer::default() }
}

async fn carry_out(orphans: &Orphans, command: NodeCommand) -> CommandAnswer {
    let all = match orphans.processes().await {
        Ok(all) => all,
        Err(error) => return failed(format!("the host's processes can't be listed: {error}")),
    };
    match command.command {
        Some(Command::ListProcesses(_)) => {
            let processes = all.into_iter().map(|process| process.told).collect();
            CommandAnswer { processes, ..CommandAnswer::default() }
        }
        Some(Command::EndProcesses(order)) => {
            let ends = order.processes.iter().take(ENDS_MAX).map(|named| end_one(orphans, &all, named, &order));
            CommandAnswer { results: futures::future::join_all(ends).await, ..CommandAnswer::default() }
        }
        None => failed("its agent does not know this command: it is older than the coordinator".to_owned()),
    }
}

async fn end_one(
    orphans: &Orphans,
    all: &[Process],
    named: &ProcessName,
    order: &EndProcessesCommand,
) -> ProcessResult {
    let same = |p: &&Process| p.told.pid == named.pid && p.seen.start_ticks == named.start_ticks;
    let Some(process) = all.iter().find(same) else {
        let process = HostProcess { pid: named.pid, start_ticks: named.start_ticks, ..HostProcess::default() };
        return result(process, ProcessAction::Ended, "it had ended already".to_owned());
    };
    match process.told.owner() {
        ProcessOwner::Stale | ProcessOwner::Foreign => {}
        ProcessOwner::Owned if order.owned => {}
        _ => {
            let why = match process.told.message.as_str() {
                "" => "it belongs to an instance: stop that".to_owned(),
                message => message.to_owned(),
            };
            return result(process.told.clone(), ProcessAction::LeftAlone, why);
        }
    }
    if process.told.owner() == ProcessOwner::Owned && order.force {
        // Its supervisor ends it, and knows then that this was no crash.
        if !orphans.force(&process.told.instance) {
            let why = "its supervisor does not hear: it is gone, or has too much to do; try again".to_owned();
            return result(process.told.clone(), ProcessAction::LeftAlone, why);
        }
        let (outcome, how) = end::wait(&process.seen, orphans.boot_id(), end::Patience::asked(true)).await;
        return result(process.told.clone(), outcome.action(), how);
    }
    let (outcome, how) = end::end(&process.seen, orphans.boot_id(), end::Patience::asked(order.force)).await;
    result(process.told.clone(), outcome.action(), how)
}

fn result(process: HostProcess, action: ProcessAction, message: String) -> ProcessResult {
    ProcessResult { process: Some(process), action: action.into(), message }
}
