//! One file with a checksum: its state, and the finding that follows.

use super::report::{FileReport, FileState, Finding, Severity};
use drover_shim::durable;
use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

/// What there is to do about a file that can't be read.
const READABLE: &str = "make it readable for the agent's user, or run this check as that user";
/// And about one whose content is not what was written.
const FIND_CAUSE: &str =
    "nothing has to be done for the servers; find out what damaged it: the kernel's log, the disk's health";

/// The state of a file that was read with this outcome.
pub(super) fn state<T>(path: &Path, read: Result<&T, &durable::Error>) -> FileReport {
    let (state, what) = match read {
        Ok(_) => (FileState::Good, None),
        Err(durable::Error::Missing(_)) => (FileState::Absent, None),
        Err(durable::Error::Damaged { what, .. }) => (FileState::Damaged, Some(what.clone())),
        Err(error @ durable::Error::Newer { .. }) => (FileState::Newer, Some(error.to_string())),
        Err(durable::Error::Io { source, .. }) => (FileState::Unreadable, Some(source.to_string())),
    };
    let version = durable::read::<serde_json::Value>(path).ok().and_then(|value| value.get("format")?.as_u64());
    FileReport { path: path.to_owned(), state, version, what }
}

/// What follows from a file that can't be used; `None` where it can be used, or is absent. `next_start` is about one whose
/// content is damaged: it is set aside.
pub(super) fn finding(file: &FileReport, next_start: &str) -> Option<Finding> {
    let what = file.what.clone().unwrap_or_default();
    let finding = Finding::new(Severity::Damaged, file.path.display(), what);
    match file.state {
        FileState::Good | FileState::Absent => None,
        FileState::Damaged => Some(finding.next_start(format!("it is set aside; {next_start}")).way_out(FIND_CAUSE)),
        FileState::Newer => Some(
            Finding { severity: Severity::Inconsistent, ..finding }
                .next_start(
                    "what it is about is left alone: neither taken back nor ended, and nothing is started in its place",
                )
                .way_out("run the agent of the version that wrote it"),
        ),
        FileState::Unreadable => {
            let next_start = format!("if the agent can't read it either, it is left where it is; {next_start}");
            Some(finding.next_start(next_start).way_out(READABLE))
        }
    }
}

/// The permissions of a file, as chmod has them.
pub(super) fn mode(path: &Path) -> Option<String> {
    fs::metadata(path).ok().map(|file| format!("{:04o}", file.permissions().mode() & 0o7777))
}
