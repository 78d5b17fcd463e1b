//! The instances: their files, the processes that these name, and what adoption would make of them.

use super::{
    files,
    report::{End, FileReport, FileState, Finding, Instance, LockReport, Process, ProcessState, Severity},
};
use crate::{
    config::{View, socket_of},
    host::processes::{self, Found},
    instance::{claim, traces::Traces},
    lock::holder,
};
use drover_proto::ids;
use drover_shim::record::{Record, Stage};
use std::{fs, io, path::Path};

/// Looks at all instances, in the order of their ids.
pub(super) fn look(view: &View, findings: &mut Vec<Finding>) -> Vec<Instance> {
    let folder = view.state_dir.join("instances");
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            let finding = Finding::new(Severity::Damaged, folder.display(), format!("it can't be listed: {error}"));
            findings.push(
                finding
                    .next_start("the agent does not start: it would not know what runs here")
                    .way_out("make it a folder that the agent's user can read"),
            );
            return Vec::new();
        }
    };
    let mut names = Vec::new();
    for entry in entries.flatten() {
        match entry.file_name().into_string() {
            Ok(name) if ids::check_instance_id(&name).is_ok() => names.push(name),
            _ => findings.push(
                Finding::new(Severity::Note, entry.path().display(), "it is no instance's directory")
                    .next_start("it is left alone")
                    .way_out("remove it if nobody needs it"),
            ),
        }
    }
    names.sort();
    names.iter().map(|name| look_at(view, &Traces::read(&folder, name), findings)).collect()
}

fn look_at(view: &View, traces: &Traces, findings: &mut Vec<Finding>) -> Instance {
    let directory = &traces.directory;
    let socket = socket_of(&view.runtime_dir, &traces.instance);
    let recorded = traces.record.as_ref().ok().cloned();
    // The shim's place in a rebuilt record matters for a held process only, and that serves no socket yet.
    let rebuilt = || traces.rebuilt(&socket, view.llama_server.as_deref()?, Path::new(""));
    let record = recorded.clone().or_else(rebuilt);
    let instance = Instance {
        token: traces.claim(record.as_ref()).token.to_string(),
        stage: record.as_ref().map(|record| match record.stage {
            Stage::Held => "held",
            Stage::Released => "released",
        }),
        started_at_ms: recorded.as_ref().map(|record| record.started_at_ms),
        process: process(record.as_ref()),
        shim: LockReport::from(holder(&directory.lock())),
        spec: files::state(&directory.spec(), traces.spec.as_ref()),
        record: files::state(&directory.record(), traces.record.as_ref()),
        claim: files::state(&claim::path(directory.path()), traces.claim.as_ref()),
        exit: files::state(&directory.exit(), traces.exit.as_ref()),
        end: traces.exit.as_ref().ok().map(|exit| End {
            code: exit.code,
            signal: exit.signal,
            oom_killed: exit.oom_killed,
            lease_lost: exit.lease_lost,
            ended_at_ms: exit.ended_at_ms,
            log_lines_dropped: exit.log_lines_dropped,
        }),
        socket,
        id: traces.instance.clone(),
    };
    findings.extend(judge(&instance, view.llama_server.is_some()));
    findings.extend(named_otherwise(traces));
    findings.extend(lease(traces, &instance));
    instance
}

/// What adoption would say of the process, by adoption's own eyes. The server is not asked what it serves, as adoption does
/// then: it would write that into its log.
fn process(record: Option<&Record>) -> Process {
    let found = record.map(processes::find);
    let (state, detail) = match found {
        None => (ProcessState::None, String::new()),
        Some(Found::Living(_)) => (ProcessState::Matching, String::new()),
        Some(Found::Other(what)) => (ProcessState::Other, what),
        Some(Found::Unknown(why)) => (ProcessState::Unknown, why),
        Some(Found::Gone) => (ProcessState::Ended, String::new()),
    };
    let process = record.map(|record| &record.process);
    Process {
        state,
        detail,
        pid: process.map(|p| p.pid),
        boot_id: process.map(|p| p.boot_id.clone()),
        start_ticks: process.map(|p| p.start_ticks),
        executable: process.map(|p| p.executable.clone()),
    }
}

/// PURE: what follows from the state of an instance. `findable`: it is known which program a server whose record is lost
/// would execute.
fn judge(instance: &Instance, findable: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    let lives = instance.process.state == ProcessState::Matching;
    let pid = instance.process.pid.unwrap_or_default();
    let shim = matches!(instance.shim, LockReport::Process(_));
    let after_record = match (lives, findable) {
        (true, _) => format!("the record is rebuilt from pid {pid}, which serves the instance's socket and goes on"),
        (false, true) => {
            "no process serves the instance's socket: its server counts as ended, and is started again where \
                          it is claimed and wanted"
                .to_owned()
        }
        (false, false) => {
            "the record is rebuilt from the process that serves the instance's socket, if one does; name the \
                           program with --llama-server to have it looked for here"
                .to_owned()
        }
    };
    let after = [
        (&instance.record, after_record.as_str()),
        (&instance.spec, "it is written anew with the next start of the server; one that runs goes on"),
        (&instance.claim, "what is to run comes back with the coordinator's set of claims; a server that runs goes on"),
        (&instance.exit, "how the server ended stays unknown"),
    ];
    for (file, next_start) in after {
        findings.extend(files::finding(file, next_start));
    }
    let absent = |file: &FileReport| file.state == FileState::Absent;
    let mut inconsistent = |about: &FileReport, what: String, next_start: &str, way_out: &str| {
        let finding = Finding::new(Severity::Inconsistent, about.path.display(), what);
        findings.push(finding.next_start(next_start).way_out(way_out));
    };
    let nothing = "nothing has to be done";
    if lives && absent(&instance.record) {
        inconsistent(&instance.record, "it is absent, though the server runs".to_owned(), &after_record, nothing);
    }
    if lives && absent(&instance.claim) {
        inconsistent(&instance.claim, "it is absent, though the server runs".to_owned(), after[2].1, nothing);
    }
    if lives && absent(&instance.spec) {
        inconsistent(&instance.spec, "it is absent, though the server runs".to_owned(), after[1].1, nothing);
    }
    match instance.process.state {
        ProcessState::Unknown => inconsistent(
            &instance.record,
            format!("it can't be told whether pid {pid} is the recorded server: {}", instance.process.detail),
            "the process is left alone, and nothing is started in its place",
            "run this check, and the agent, as a user that may read /proc/<pid> of its servers",
        ),
        ProcessState::Matching if !shim => inconsistent(
            &instance.record,
            format!("pid {pid} runs without its shim, which has died"),
            "the server is taken back and serves on; its log goes nowhere, and how it ends will stay unknown",
            "restart the instance when it suits",
        ),
        ProcessState::Other if shim => inconsistent(
            &instance.record,
            format!("its shim keeps a process that the record does not name: {}", instance.process.detail),
            "the server counts as ended, and none can be started in its place while the shim lives",
            "drover processes list; drover processes cleanup",
        ),
        ProcessState::Ended | ProcessState::Other if absent(&instance.exit) && !shim => inconsistent(
            &instance.exit,
            format!("it is absent, though pid {pid} has ended: its shim ended before it, as with the host"),
            "the server counts as ended, exit unknown, and is started again where it is claimed and wanted",
            nothing,
        ),
        _ => {}
    }
    findings
}

/// The file by which the shim of a server that ends with its lease knows until when that is.
fn lease(traces: &Traces, instance: &Instance) -> Option<Finding> {
    let ends_with_lease = traces.spec.as_ref().is_ok_and(|spec| spec.ends_with_lease);
    let lives = instance.process.state == ProcessState::Matching;
    let error = drover_shim::lease::read(&traces.directory.lease()).err().filter(|_| ends_with_lease && lives)?;
    let path = traces.directory.lease();
    let finding =
        Finding::new(Severity::Damaged, path.display(), format!("until when its lease lives is not known: {error}"));
    Some(
        finding
            .next_start("it is written anew with the next renewal; without one the shim ends the server when the time is over that it knew last")
            .way_out("start the agent, if none runs"),
    )
}

/// Files that name another instance than their directory does, as in a copy made by hand.
fn named_otherwise(traces: &Traces) -> Vec<Finding> {
    let named = [
        (traces.directory.spec(), traces.spec.as_ref().ok().map(|spec| &spec.instance)),
        (traces.directory.record(), traces.record.as_ref().ok().map(|record| &record.instance)),
        (claim::path(traces.directory.path()), traces.claim.as_ref().ok().map(|claim| &claim.instance)),
    ];
    let others = named.into_iter().filter_map(|(path, name)| Some((path, name.filter(|n| **n != traces.instance)?)));
    let finding = |(path, name): (std::path::PathBuf, &String)| {
        Finding::new(Severity::Inconsistent, path.display(), format!("it is about instance {name}"))
            .next_start("its process would be kept under both names")
            .way_out("if the directory is a copy made by hand, remove it before the next agent starts")
    };
    others.map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(state: FileState) -> FileReport {
        FileReport { path: "/s/file".into(), state, version: None, what: None }
    }

    fn instance(state: ProcessState, shim: LockReport, exit: FileState) -> Instance {
        let process =
            Process { state, detail: String::new(), pid: Some(7), boot_id: None, start_ticks: None, executable: None };
        Instance {
            id: "m-222222".to_owned(),
            token: "1.2".to_owned(),
            stage: None,
            started_at_ms: None,
            process,
            shim,
            socket: "/r/m".into(),
            spec: file(FileState::Good),
            record: file(FileState::Good),
            claim: file(FileState::Good),
            exit: file(exit),
            end: None,
        }
    }

    #[test]
    fn what_fits_together_is_no_finding_and_what_does_not_is_told_with_a_way_out() {
        use FileState::{Absent, Good};
        let kept = || LockReport::Process(6);
        for good in [
            instance(ProcessState::Matching, kept(), Absent),
            instance(ProcessState::Ended, LockReport::Nobody, Good),
            instance(ProcessState::Other, LockReport::Nobody, Good),
            // Its end is being written this moment.
            instance(ProcessState::Ended, kept(), Absent),
            // A claim whose server was not started yet.
            Instance {
                record: file(Absent),
                spec: file(Absent),
                ..instance(ProcessState::None, LockReport::Nobody, Absent)
            },
        ] {
            assert_eq!(judge(&good, true), [], "{good:?}");
        }
        for (bad, named) in [
            (instance(ProcessState::Unknown, kept(), Absent), "it can't be told"),
            (instance(ProcessState::Matching, LockReport::Nobody, Absent), "without its shim"),
            (instance(ProcessState::Ended, LockReport::Nobody, Absent), "absent, though pid 7 has ended"),
            (instance(ProcessState::Other, kept(), Absent), "a process that the record does not name"),
            (Instance { record: file(Absent), ..instance(ProcessState::Matching, kept(), Absent) }, "absent"),
            (
                Instance {
                    spec: FileReport { what: Some("it has format 9".to_owned()), ..file(FileState::Newer) },
                    ..instance(ProcessState::Matching, kept(), Absent)
                },
                "it has format 9",
            ),
        ] {
            let [finding] = &judge(&bad, true)[..] else { panic!("one finding about {bad:?}") };
            assert!(finding.what.contains(named), "{finding:?}");
            assert!(!finding.next_start.is_empty() && !finding.way_out.is_empty(), "{finding:?}");
        }
    }
}
