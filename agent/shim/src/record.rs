//! The files of an instance's directory, and who writes which.
//!
//! | file | type | writer |
//! |---|---|---|
//! | `spec` | [`Spec`] | the agent, before it starts a shim |
//! | `record` | [`Record`] | the shim until the start is over; afterwards the agent, to raise the token |
//! | `exit` | [`Exit`] | the shim, when the process has ended |
//! | `lease` | [`crate::lease::Times`] | the agent, whenever the lease is renewed; only where its loss ends the server |
//! | `lock` | – | held by the shim for as long as it lives |
//! | `log/` | [`crate::logs`] | the shim |
//!
//! Agent and shim may be of different versions: a shim lives on while its agent is upgraded, and an agent may start a shim
//! that is not upgraded yet. Fields are only added, and each is optional: a reader passes over what it does not know, and
//! does without what is not there. The format says what a file may hold:
//!
//! | format | what it adds |
//! |---|---|
//! | 1 | |
//! | 2 | record: the cgroup, the executable's file; exit: whether the kernel has killed it for memory |
//! | 3 | spec: that the loss of the lease ends it; exit: whether that was so |
//!
//! What a reader may not pass over raises the format of the files that have it, and of no others: a shim that would not end
//! its server with the lease refuses to start it, and an agent that would not renew the lease leaves the run alone.
//!
//! A file of a higher format than the reader's own is not read, set aside or written over ([`Error::Newer`]): whatever it
//! is about is left alone.

use crate::{cgroup::Cgroup, durable, identity::Process};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    fmt,
    path::{Path, PathBuf},
};

/// The highest format that this version reads and writes: of what [`LEASED_FORMAT`] says, and of nothing else.
pub const FORMAT: u32 = LEASED_FORMAT;

/// Format of the files of a server that ends with its lease.
pub const LEASED_FORMAT: u32 = 3;

/// Format of the records and exits of all others.
pub const RECORD_FORMAT: u32 = 2;

/// Format of the specs that agents write for all others: that of an older version, so that its shims take them. What format
/// 2 adds is optional, and they pass over it.
pub const SPEC_FORMAT: u32 = 1;

/// Paths of an instance's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory(PathBuf);

impl Directory {
    /// Takes the directory of an instance.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }
    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
    /// What is to run.
    #[must_use]
    pub fn spec(&self) -> PathBuf {
        self.0.join("spec")
    }
    /// What was started.
    #[must_use]
    pub fn record(&self) -> PathBuf {
        self.0.join("record")
    }
    /// How it ended.
    #[must_use]
    pub fn exit(&self) -> PathBuf {
        self.0.join("exit")
    }
    /// Until when it may live, where the loss of the lease ends it.
    #[must_use]
    pub fn lease(&self) -> PathBuf {
        self.0.join("lease")
    }
    /// Held by the shim.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }
    /// Log files of the server.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.0.join("log")
    }
}

/// Fencing token, as in the contract; repeated here so that the shim stays small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Token {
    /// Generation of the store; compared first.
    pub generation: u64,
    /// Revision of the claim.
    pub revision: i64,
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.generation, self.revision)
    }
}

/// What a shim is to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// [`SPEC_FORMAT`] of the writer, or [`LEASED_FORMAT`].
    pub format: u32,
    /// Id of the instance.
    pub instance: String,
    /// Token under which it is started; lower ones are refused from then on.
    pub token: Token,
    /// Absolute path of the program.
    pub program: PathBuf,
    /// Its arguments, without the program's name.
    pub arguments: Vec<String>,
    /// The whole environment; nothing is inherited.
    pub environment: Vec<(String, String)>,
    /// Unix socket that the server listens on; recorded, and removed before the start when a dead one left it.
    pub socket: PathBuf,
    /// Size at which a log file is rotated, in bytes.
    pub log_bytes_max: u64,
    /// Number of log files kept, the current one included.
    pub log_files_max: u32,
    /// The process is not released later than this, in nanoseconds on CLOCK_BOOTTIME of the boot named next.
    pub start_deadline_ns: u64,
    /// Boot that the deadline belongs to.
    pub boot_id: String,
    /// While a file exists here nothing is released.
    pub halt_file: PathBuf,
    /// Folder of cgroups below which the process gets one of its own; `None` where the host offers none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup_base: Option<PathBuf>,
    /// Whether the shim ends it before its lease does, as the file `lease` says; else it lives on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ends_with_lease: bool,
}

/// How far a start has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The process exists and waits for its release; it has not executed the program.
    Held,
    /// It executes the program.
    Released,
}

/// What a shim has started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// [`RECORD_FORMAT`] of the writer, or [`LEASED_FORMAT`].
    pub format: u32,
    /// Id of the instance.
    pub instance: String,
    /// Token of the run; raised when the run is re-claimed.
    pub token: Token,
    /// How far the start has come.
    pub stage: Stage,
    /// The process.
    pub process: Process,
    /// Executable of the shim, which is what a held process shows.
    pub shim: PathBuf,
    /// Arguments, without the program's name.
    pub arguments: Vec<String>,
    /// Unix socket of the server.
    pub socket: PathBuf,
    /// When the record was first written, in milliseconds since the Unix epoch.
    pub started_at_ms: i64,
    /// The cgroup that holds the process and what it starts, and nothing else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<Cgroup>,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// That of the record.
    pub format: u32,
    /// The process that ended; tells which run this is about.
    pub process: Process,
    /// Token of the run when it ended.
    pub token: Token,
    /// Exit code, when it exited.
    pub code: Option<i32>,
    /// Signal, when one ended it.
    pub signal: Option<i32>,
    /// Why the program could not be executed at all.
    pub exec_error: Option<String>,
    /// When, in milliseconds since the Unix epoch.
    pub ended_at_ms: i64,
    /// Lines of its log that could not be written.
    pub log_lines_dropped: u64,
    /// Whether the kernel has killed it because memory was short; `None` when that can't be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oom_killed: Option<bool>,
    /// Whether its shim has ended it because its lease was not renewed in time.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lease_lost: bool,
}

pub use durable::{Error, write};

/// Reads one of the files.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    #[derive(Deserialize)]
    struct Versioned {
        format: u32,
    }
    let content = durable::content(path)?;
    let Versioned { format } = durable::parse(path, &content)?;
    if format > FORMAT {
        return Err(Error::Newer { path: path.to_owned(), format, known: FORMAT });
    }
    durable::parse(path, &content)
}
