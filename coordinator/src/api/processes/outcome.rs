//! PURE. What is said of processes and of what was done to them.

use crate::{control::commands, control::store_status, plan::snapshot::Snapshot};
use drover_proto::{
    status::{reason, with_reason},
    v1::{HostProcess, ProcessAction, ProcessOwner, ProcessResult},
};
use std::path::Path;
use tonic::{Code, Status};

/// What an operator may have ended: what no agent keeps and whose identity is known.
pub(super) fn ends_on_request(process: &HostProcess) -> bool {
    matches!(process.owner(), ProcessOwner::Stale | ProcessOwner::Foreign)
}

/// Whether a process serves the model of that name, as far as its command line tells: by its alias, else by its file.
pub(super) fn bears(process: &HostProcess, name: &str) -> bool {
    let file = Path::new(&process.model_path);
    let is = |part: Option<&std::ffi::OsStr>| part.is_some_and(|part| part == name);
    process.model_alias == name || is(file.file_stem()) || is(file.file_name())
}

pub(super) fn would_end(process: HostProcess) -> ProcessResult {
    let message = format!("is {}: it would be ended, with confirmation", word(process.owner()));
    ProcessResult { process: Some(process), action: ProcessAction::WouldEnd.into(), message }
}

pub(super) fn left_alone(process: HostProcess) -> ProcessResult {
    let why = if process.message.is_empty() { "it is none of this node's" } else { process.message.as_str() };
    let message = why.to_owned();
    ProcessResult { process: Some(process), action: ProcessAction::LeftAlone.into(), message }
}

/// What the store knows of the process of an instance.
pub(super) fn process_of(snapshot: &Snapshot, id: &str) -> HostProcess {
    let owned = snapshot.claims.get(id);
    let token = snapshot.token(id);
    let status = snapshot.statuses.get(id).filter(|status| status.value.token == token);
    HostProcess {
        node: owned.map(|claim| claim.value.node.clone()).unwrap_or_default(),
        pid: status.map_or(0, |status| status.value.pid),
        owner: ProcessOwner::Owned.into(),
        instance: id.to_owned(),
        token,
        ..HostProcess::default()
    }
}

/// To whom a process belongs, for people.
pub(super) fn word(owner: ProcessOwner) -> &'static str {
    match owner {
        ProcessOwner::Owned => "owned",
        ProcessOwner::Stale => "stale",
        ProcessOwner::Foreign => "foreign",
        ProcessOwner::OtherAgent => "another agent's",
        ProcessOwner::Unknown | ProcessOwner::Unspecified => "of unknown owner",
    }
}

/// Results of the processes that a node was told to end, in that order: what it does not speak of is said too, and what it
/// was not asked about counts for nothing.
pub(super) fn settle(asked: Vec<HostProcess>, answered: Vec<ProcessResult>) -> Vec<ProcessResult> {
    let name = |p: &HostProcess| (p.pid, p.start_ticks);
    let settled = asked.into_iter().map(|process| {
        let same = |r: &&ProcessResult| r.process.as_ref().is_some_and(|p| name(p) == name(&process));
        // Of one that has ended meanwhile the node knows no more than its name.
        let (action, message) = match answered.iter().find(same) {
            Some(result) => (result.action(), result.message.clone()),
            None => (ProcessAction::LeftAlone, "its node does not say what became of it: look again".to_owned()),
        };
        ProcessResult { process: Some(process), action: action.into(), message }
    });
    settled.collect()
}

/// An error of asking a node as the API tells it.
pub(super) fn status_of(error: commands::Error) -> Status {
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
    fn a_process_bears_the_name_of_its_alias_or_of_its_file() {
        let process = |alias: &str, path: &str| HostProcess {
            model_alias: alias.to_owned(),
            model_path: path.to_owned(),
            ..HostProcess::default()
        };
        assert!(bears(&process("tiny", ""), "tiny") && bears(&process("", "/m/tiny.gguf"), "tiny"));
        assert!(bears(&process("", "/m/tiny.gguf"), "tiny.gguf"));
        assert!(!bears(&process("tiny-2", "/tiny/m.gguf"), "tiny") && !bears(&process("", ""), "tiny"));
    }

    #[test]
    fn each_process_asked_about_has_one_result_and_no_other_has() {
        let process = |pid, start_ticks| HostProcess {
            pid,
            start_ticks,
            node: "a".to_owned(),
            owner: ProcessOwner::Foreign.into(),
            ..HostProcess::default()
        };
        let answer = |pid, start_ticks| ProcessResult {
            process: Some(HostProcess { node: "forged".to_owned(), ..process(pid, start_ticks) }),
            action: ProcessAction::Ended.into(),
            message: "ended by SIGTERM".to_owned(),
        };
        let asked = vec![process(1, 1), process(2, 1), process(3, 1)];
        let settled = settle(asked, vec![answer(3, 1), answer(2, 9), answer(77, 1), answer(1, 1)]);
        let actions: Vec<_> = settled.iter().map(|r| (r.process.as_ref().map_or(0, |p| p.pid), r.action())).collect();
        assert_eq!(actions, [(1, ProcessAction::Ended), (2, ProcessAction::LeftAlone), (3, ProcessAction::Ended)]);
        assert!(settled.iter().all(|r| r.process.as_ref().is_some_and(|p| p.node == "a")));
    }
}
