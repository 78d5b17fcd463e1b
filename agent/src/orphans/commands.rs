//! What operators ask of this node, and the answers.

use super::{Orphans, Process, end};
use drover_proto::v1::{
    CommandAnswer, EndProcessesCommand, HostProcess, NodeCommand, ProcessAction, ProcessName, ProcessOwner,
    ProcessResult, node_command::Command,
};
use std::{collections::VecDeque, sync::Arc, time::Duration};
use tokio::{sync::mpsc, task::JoinSet};

/// Commands, and answers, that wait at a time.
pub const WAITING: usize = 16;
/// Most processes that one command may end.
const ENDS_MAX: usize = 256;
/// Longest work on one command: the asking coordinator waits a little longer than that.
const LIMIT: Duration = Duration::from_secs(8);
/// Orders whose answers are remembered.
const REMEMBERED: usize = 32;

/// Carries commands out, several at the same time, until nobody sends any more. Each is answered; an order that comes a
/// second time, over another stream, is answered again and not carried out again: a second SIGTERM makes llama-server
/// break off its clean end.
pub async fn work(orphans: Arc<Orphans>, mut asked: mpsc::Receiver<NodeCommand>, answers: mpsc::Sender<CommandAnswer>) {
    let mut running = JoinSet::new();
    let mut orders = Orders::default();
    let send = |answer: CommandAnswer| {
        if answers.try_send(answer).is_err() {
            tracing::warn!("too many answers wait: one is left out");
        }
    };
    loop {
        tokio::select! {
            command = asked.recv() => {
                let Some(command) = command else { return };
                if let Some(known) = orders.get(&command.id) {
                    known.iter().cloned().for_each(send);
                } else if running.len() >= WAITING {
                    let busy = format!("{WAITING} commands are under way on it already: try again in a moment");
                    send(CommandAnswer { id: command.id, ..failed(busy) });
                } else {
                    orders.begin(&command);
                    running.spawn(answered(orphans.clone(), command));
                }
            }
            Some(done) = running.join_next() => {
                let Ok(answer) = done else { continue };
                orders.end(&answer);
                send(answer);
            }
        }
    }
}

async fn answered(orphans: Arc<Orphans>, command: NodeCommand) -> CommandAnswer {
    let id = command.id.clone();
    let late = || failed("it took too long; what was begun goes on".to_owned());
    let answer = tokio::time::timeout(LIMIT, carry_out(&orphans, command)).await.unwrap_or_else(|_| late());
    CommandAnswer { id, ..answer }
}

/// PURE. The last orders, with their answers once there are any.
#[derive(Debug, Default)]
struct Orders(VecDeque<(String, Option<CommandAnswer>)>);

impl Orders {
    fn get(&self, id: &str) -> Option<&Option<CommandAnswer>> {
        self.0.iter().find(|(known, _)| known == id).map(|(_, answer)| answer)
    }

    /// Only what changes something is remembered: the answer to the rest is large, and asking again does no harm.
    fn begin(&mut self, command: &NodeCommand) {
        if !matches!(command.command, Some(Command::EndProcesses(_))) {
            return;
        }
        if self.0.len() >= REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back((command.id.clone(), None));
    }

    fn end(&mut self, answer: &CommandAnswer) {
        if let Some((_, known)) = self.0.iter_mut().find(|(id, _)| *id == answer.id) {
            *known = Some(answer.clone());
        }
    }
}

fn failed(error: String) -> CommandAnswer {
    CommandAnswer { error, ..CommandAnswer::default() }
}

async fn carry_out(orphans: &Orphans, command: NodeCommand) -> CommandAnswer {
    let unlisted = |error| failed(format!("the host's processes can't be listed: {error}"));
    match command.command {
        Some(Command::ListProcesses(wanted)) => match orphans.told(wanted.pid).await {
            Ok((processes, left_out)) => {
                let not_listed = i64::try_from(left_out).unwrap_or(i64::MAX);
                CommandAnswer { processes, not_listed, ..CommandAnswer::default() }
            }
            Err(error) => unlisted(error),
        },
        Some(Command::EndProcesses(order)) => match orphans.processes().await {
            Ok(all) => {
                let ends = order.processes.iter().take(ENDS_MAX).map(|named| end_one(orphans, &all, named, &order));
                CommandAnswer { results: futures::future::join_all(ends).await, ..CommandAnswer::default() }
            }
            Err(error) => unlisted(error),
        },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_that_comes_twice_is_known_and_a_question_is_not() {
        let mut orders = Orders::default();
        let order = |id: &str| NodeCommand {
            id: id.to_owned(),
            command: Some(Command::EndProcesses(EndProcessesCommand::default())),
        };
        orders.begin(&order("1"));
        assert_eq!(orders.get("1"), Some(&None), "under way");
        let answer = CommandAnswer { id: "1".to_owned(), ..failed("x".to_owned()) };
        orders.end(&answer);
        assert_eq!(orders.get("1"), Some(&Some(answer)));
        orders.begin(&NodeCommand { id: "2".to_owned(), command: Some(Command::ListProcesses(Default::default())) });
        assert_eq!(orders.get("2"), None);
        for n in 0..REMEMBERED {
            orders.begin(&order(&format!("further-{n}")));
        }
        assert_eq!((orders.get("1"), orders.0.len()), (None, REMEMBERED));
    }
}
