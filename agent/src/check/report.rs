//! PURE: what a check has found, as it is shown. The fields are those of the JSON output.

use crate::lock::Holder;
use serde::Serialize;
use std::path::PathBuf;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Good to know; nothing is wrong.
    Note,
    /// Files, processes or sockets do not fit together.
    Inconsistent,
    /// A file is not what was once written, or can't be read.
    Damaged,
}

/// Something to know about a file, a process or a socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// The file; or whatever else it is about.
    pub about: String,
    /// What was found.
    pub what: String,
    /// What the next agent makes of it.
    pub next_start: String,
    /// What the operator can do.
    pub way_out: String,
}

impl Finding {
    /// A finding.
    pub fn new(severity: Severity, about: impl ToString, what: impl Into<String>) -> Self {
        let (about, what) = (about.to_string(), what.into());
        Self { severity, about, what, next_start: String::new(), way_out: String::new() }
    }

    /// What the next agent makes of it.
    pub fn next_start(mut self, what: impl Into<String>) -> Self {
        self.next_start = what.into();
        self
    }

    /// What the operator can do.
    pub fn way_out(mut self, what: impl Into<String>) -> Self {
        self.way_out = what.into();
        self
    }
}

/// State of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum FileState {
    Good,
    Absent,
    Damaged,
    Unreadable,
    /// A later version has written it.
    Newer,
}

/// A file with a checksum.
#[derive(Debug, Clone, Serialize)]
pub(super) struct FileReport {
    pub(super) path: PathBuf,
    pub(super) state: FileState,
    /// Format that its writer gave it.
    pub(super) version: Option<u64>,
    /// Where and how it is damaged.
    pub(super) what: Option<String>,
}

/// Who holds a lock.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "holder", content = "detail", rename_all = "lowercase")]
pub(super) enum LockReport {
    Nobody,
    Process(i32),
    Unknown(String),
}

impl From<Holder> for LockReport {
    fn from(holder: Holder) -> Self {
        match holder {
            Holder::Nobody => Self::Nobody,
            Holder::Process(pid) => Self::Process(pid),
            Holder::Unknown(why) => Self::Unknown(why),
        }
    }
}

/// The session, as stored.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Session {
    pub(super) file: FileReport,
    pub(super) id: String,
    pub(super) store_generation: u64,
    pub(super) cluster_id: String,
    pub(super) halt_generation: u64,
}

/// What adoption would say of the recorded process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ProcessState {
    /// It lives, and its whole identity matches.
    Matching,
    /// Its pid is another program's.
    Other,
    /// It can't be told.
    Unknown,
    /// It has ended.
    Ended,
    /// No record names one, and none serves the socket.
    None,
}

/// The process of an instance.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Process {
    pub(super) state: ProcessState,
    /// Why it is other or unknown.
    pub(super) detail: String,
    pub(super) pid: Option<i32>,
    pub(super) boot_id: Option<String>,
    pub(super) start_ticks: Option<u64>,
    pub(super) executable: Option<PathBuf>,
}

/// How a server ended.
#[derive(Debug, Clone, Serialize)]
pub(super) struct End {
    pub(super) code: Option<i32>,
    pub(super) signal: Option<i32>,
    /// Whether the kernel has killed it because memory was short; null when that can't be told.
    pub(super) oom_killed: Option<bool>,
    /// Whether its shim has ended it because its lease was not renewed in time.
    pub(super) lease_lost: bool,
    pub(super) ended_at_ms: i64,
    pub(super) log_lines_dropped: u64,
}

/// An instance.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Instance {
    pub(super) id: String,
    /// The highest token on disk.
    pub(super) token: String,
    pub(super) stage: Option<&'static str>,
    pub(super) started_at_ms: Option<i64>,
    pub(super) process: Process,
    pub(super) shim: LockReport,
    pub(super) socket: PathBuf,
    pub(super) spec: FileReport,
    pub(super) record: FileReport,
    pub(super) claim: FileReport,
    pub(super) exit: FileReport,
    pub(super) end: Option<End>,
}

/// A socket in the runtime folder that no instance's directory accounts for.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Socket {
    pub(super) path: PathBuf,
    /// The process that serves it, if one does.
    pub(super) pid: Option<i32>,
}

/// A file that was found damaged and set aside.
#[derive(Debug, Clone, Serialize)]
pub(super) struct SetAside {
    pub(super) path: PathBuf,
    /// When, in milliseconds since the Unix epoch.
    pub(super) at_ms: i64,
    pub(super) why: String,
}

/// The rest of a write that was cut off.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Leftover {
    pub(super) path: PathBuf,
    pub(super) writer: i32,
    pub(super) writer_lives: bool,
}

/// The proxy. Its routes stand in no file: an agent gives them to it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Proxy {
    pub(super) lock: LockReport,
    pub(super) address: Option<String>,
    pub(super) socket: PathBuf,
    pub(super) socket_mode: Option<String>,
    pub(super) secret_file: Option<PathBuf>,
    pub(super) secret_file_mode: Option<String>,
}

/// One life of the span source.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Life {
    pub(super) epoch: String,
    pub(super) lock: LockReport,
    pub(super) issued: Option<u64>,
    pub(super) acknowledged: Option<u64>,
    pub(super) rejected: Option<u64>,
    pub(super) given_up: Option<u64>,
    pub(super) held: u64,
    pub(super) ended: Option<bool>,
    pub(super) segments: Vec<Segment>,
}

/// A segment of the spool.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Segment {
    pub(super) path: PathBuf,
    pub(super) first: Option<u64>,
    pub(super) last: Option<u64>,
    pub(super) held: u64,
    pub(super) damaged: bool,
}

/// Everything.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Report {
    pub(super) version: &'static str,
    pub(super) state_dir: PathBuf,
    pub(super) runtime_dir: PathBuf,
    /// Nothing is damaged, and all fits together.
    pub(super) good: bool,
    /// Who holds the state folder's lock: its agent.
    pub(super) agent: LockReport,
    pub(super) session: Session,
    /// File with the machine's identity; used where the system has none.
    pub(super) machine: FileReport,
    pub(super) instances: Vec<Instance>,
    /// Sockets without an owner.
    pub(super) sockets: Vec<Socket>,
    pub(super) set_aside: Vec<SetAside>,
    pub(super) leftovers: Vec<Leftover>,
    pub(super) proxy: Proxy,
    pub(super) spool: Vec<Life>,
    pub(super) findings: Vec<Finding>,
}
