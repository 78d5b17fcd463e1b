//! The start of a process: lock, checks, fork, record, release. Each refusal has an exit code of its own.
//!
//! Order matters: the lock before the record is read, the record on disk before the release, the deadline and the halt
//! directly before the release. A shim that dies anywhere in between leaves nothing running, since its end closes the
//! pipe that the child waits at.

use crate::{
    cgroup, clock, durable,
    failpoint::{self, Step},
    identity::{self, FileId, Process, Verdict},
    lease,
    logs::Logs,
    mutant, oom,
    record::{self, Directory, LEASED_FORMAT, RECORD_FORMAT, Record, Spec, Stage, Token},
    sys,
};
use nix::fcntl::{Flock, FlockArg, OFlag};
use std::{
    ffi::{CString, OsStr},
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::DirBuilderExt as _, fs::OpenOptionsExt as _},
    },
    path::Path,
};

/// Why nothing was started.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Another shim keeps this instance.
    #[error("another shim holds {0}")]
    Locked(String),
    /// The instance was taken over under a higher token.
    #[error("token {given} is lower than the recorded {recorded}")]
    LowerToken {
        /// Of the spec.
        given: Token,
        /// Of the record.
        recorded: Token,
    },
    /// The recorded process lives.
    #[error("pid {pid} runs already under token {token}")]
    Running {
        /// The process.
        pid: i32,
        /// Its token.
        token: Token,
    },
    /// It can't be told whether the recorded process lives.
    #[error("it can't be told whether the recorded pid {pid} still runs: {why}")]
    Uncertain {
        /// The process.
        pid: i32,
        /// Why.
        why: String,
    },
    /// It is too late.
    #[error("the start deadline has passed")]
    Late,
    /// Starts are halted.
    #[error("starts are halted by {0}")]
    Halted(String),
    /// The spec can't be used.
    #[error("spec: {0}")]
    Spec(String),
    /// Its lease leaves no time to run.
    #[error("the lease that it is to end with {0}")]
    Lease(String),
    /// The operating system refused.
    #[error("{what}: {error}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        error: String,
    },
}

impl Refusal {
    /// The shim's exit code.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Locked(_) => 10,
            Self::LowerToken { .. } => 11,
            Self::Running { .. } => 12,
            Self::Uncertain { .. } => 13,
            Self::Late => 14,
            Self::Halted(_) => 15,
            Self::Spec(_) => 16,
            Self::System { .. } => 17,
            Self::Lease(_) => 18,
        }
    }
}

/// A process that was released, and what the shim keeps of it.
#[derive(Debug)]
pub struct Started {
    /// As recorded.
    pub record: Record,
    /// Why the program could not be executed, if so.
    pub exec_error: Option<String>,
    /// Read end of what it prints.
    pub output: OwnedFd,
    /// Where that goes.
    pub logs: Logs,
    /// What was known before it began, to tell whether the kernel has killed it for memory.
    pub oom: oom::Watch,
    /// Of one that ends with its lease.
    pub lease: Option<lease::Watch>,
    /// Held for as long as the shim lives.
    pub lock: Flock<File>,
}

fn system<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Refusal {
    move |error| Refusal::System { what, error: error.to_string() }
}

/// Starts what the directory's spec says. `tell` hears "held <pid>" and "released <pid>".
pub fn start(directory: &Directory, tell: &mut dyn FnMut(&str)) -> Result<Started, Refusal> {
    let lock = lock(directory)?;
    failpoint::at(Step::StartLocked);
    // Read under the lock: whatever was written before it was taken is seen.
    let spec: Spec = record::read(&directory.spec()).map_err(|e| Refusal::Spec(e.to_string()))?;
    let format = failpoint::format();
    if spec.format > format {
        return Err(Refusal::Spec(format!("its format is {}, this shim reads up to {format}", spec.format)));
    }
    yield_to_record(directory, &spec)?;
    let lease = lease(directory, &spec)?;
    may_start(&spec, lease.as_ref())?;
    let executable = fs::canonicalize(&spec.program)
        .map_err(|e| Refusal::Spec(format!("program {}: {e}", spec.program.display())))?;
    clear(directory, &spec)?;

    let (output, log_end) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(system("pipe for the log"))?;
    let held = fork(directory, &spec, &executable, log_end)?;
    failpoint::at(Step::StartForked);
    let facts = |e: io::Error| Refusal::System { what: "facts of the held process", error: e.to_string() };
    // While it is held: whatever it starts is in there too.
    let base = spec.cgroup_base.as_deref().filter(|_| format >= 2);
    let cgroup = match base.map(|base| cgroup::place(base, &spec.instance, spec.token, held.pid)) {
        None => None,
        Some(Ok(cgroup)) => Some(cgroup),
        Some(Err(error)) => {
            tell(&format!("note it runs without a cgroup of its own: {error}"));
            None
        }
    };
    if let Err(error) = oom::unprotect(held.pid) {
        tell(&format!("note the kernel spares it as it does its keeper when memory is short: {error}"));
    }
    let oom = oom::watch(held.pid, cgroup.as_ref().map(|own| own.path.as_path()));
    let file = if format >= 2 { FileId::of(&executable).ok() } else { None };
    let mut record = Record {
        format: if spec.ends_with_lease { LEASED_FORMAT } else { format.min(RECORD_FORMAT) },
        instance: spec.instance.clone(),
        token: spec.token,
        stage: Stage::Held,
        process: Process {
            boot_id: identity::boot_id().map_err(facts)?,
            pid: held.pid,
            start_ticks: identity::stat(held.pid).map_err(facts)?.start_ticks,
            executable,
            file,
        },
        shim: std::env::current_exe().map_err(facts)?,
        arguments: spec.arguments.clone(),
        socket: spec.socket.clone(),
        started_at_ms: clock::unix_ms(),
        cgroup,
    };
    durable::write(&directory.record(), &record).map_err(system("record of the held process"))?;
    failpoint::at(Step::StartRecorded);
    tell(&format!("held {}", held.pid));

    not_raised(directory, &spec)?;
    may_start(&spec, lease.as_ref())?;
    failpoint::at(Step::StartChecked);
    nix::unistd::write(held.release.as_fd(), b"r").map_err(system("release"))?;
    failpoint::at(Step::StartReleased);
    let exec_error = exec_error(held.failure);
    if exec_error.is_none() {
        record.stage = Stage::Released;
        // From here on the process runs and must be kept, whatever happens to this second record: the first one names it.
        if let Err(error) = confirm(directory, &mut record) {
            tell(&format!("note {error}"));
        }
        failpoint::at(Step::StartConfirmed);
        tell(&format!("released {}", held.pid));
    }
    let logs = Logs::new(&directory.log(), spec.log_bytes_max, spec.log_files_max);
    Ok(Started { record, exec_error, output, logs, oom, lease, lock })
}

/// Writes the record of a process that runs. An agent that has taken the process back may have raised the token since,
/// and this must not lower it: whoever raises does so in the spec first, so that a raise that comes before the last look at
/// the spec is seen here, and one that comes after it finds what is written here.
fn confirm(directory: &Directory, record: &mut Record) -> Result<(), durable::Error> {
    loop {
        // The record of the held process is on the disk: should this one not get there, that names the same process.
        durable::place(&directory.record(), record)?;
        match record::read::<Spec>(&directory.spec()) {
            Ok(spec) if spec.token > record.token => record.token = spec.token,
            _ => return Ok(()),
        }
    }
}

/// An agent that finds no record may raise the token in the spec: what was to start under the old one starts no more.
fn not_raised(directory: &Directory, spec: &Spec) -> Result<(), Refusal> {
    let now: Spec = record::read(&directory.spec()).map_err(|e| Refusal::Spec(e.to_string()))?;
    if now.token > spec.token && !mutant::on(mutant::name::SHIM_IGNORES_TOKENS) {
        return Err(Refusal::LowerToken { given: spec.token, recorded: now.token });
    }
    Ok(())
}

/// Takes the lock of an instance's directory, which a shim holds from before its first look until its end.
pub fn lock(directory: &Directory) -> Result<Flock<File>, Refusal> {
    let path = directory.lock();
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(system("lock file"))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        nix::errno::Errno::EWOULDBLOCK => Refusal::Locked(path.display().to_string()),
        error => system("lock")(error),
    })
}

/// A free lock proves nothing: the shim may have died while its server lives.
fn yield_to_record(directory: &Directory, spec: &Spec) -> Result<(), Refusal> {
    let record: Record = match record::read(&directory.record()) {
        Ok(record) => record,
        Err(durable::Error::Missing(_)) => return Ok(()),
        Err(error) => return Err(system("record of an earlier run")(error)),
    };
    if record.token > spec.token && !mutant::on(mutant::name::SHIM_IGNORES_TOKENS) {
        return Err(Refusal::LowerToken { given: spec.token, recorded: record.token });
    }
    let pid = record.process.pid;
    let held_as = (record.stage == Stage::Held).then_some(record.shim.as_path());
    match identity::verify(&record.process, held_as) {
        Verdict::Gone | Verdict::Other(_) => Ok(()),
        Verdict::Same => Err(Refusal::Running { pid, token: record.token }),
        Verdict::Unknown(why) => Err(Refusal::Uncertain { pid, why }),
    }
}

/// What is to end with its lease is not started without the file that says when that is.
fn lease(directory: &Directory, spec: &Spec) -> Result<Option<lease::Watch>, Refusal> {
    if !spec.ends_with_lease {
        return Ok(None);
    }
    let path = directory.lease();
    let watch = lease::Watch::begin(&path);
    watch.map(Some).map_err(|error| Refusal::Lease(format!("is not known ({}: {error})", path.display())))
}

fn may_start(spec: &Spec, lease: Option<&lease::Watch>) -> Result<(), Refusal> {
    if lease.is_some_and(|lease| !lease.allows_start()) {
        return Err(Refusal::Lease("is about to end".to_owned()));
    }
    let boot = identity::boot_id().map_err(system("boot id"))?;
    if boot != spec.boot_id || clock::boottime_ns() >= spec.start_deadline_ns {
        return Err(Refusal::Late);
    }
    match spec.halt_file.try_exists() {
        Ok(false) => Ok(()),
        Ok(true) => Err(Refusal::Halted(spec.halt_file.display().to_string())),
        Err(error) => Err(system("halt file")(error)),
    }
}

/// Removes what an earlier run left: its end, and the socket that nobody listens on any more.
fn clear(directory: &Directory, spec: &Spec) -> Result<(), Refusal> {
    for path in [directory.exit(), spec.socket.clone()] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(system("removal of an earlier run's files")(error));
            }
            _ => {}
        }
    }
    let made = DirBuilder::new().recursive(true).mode(0o700).create(directory.log());
    made.map_err(system("log directory"))
}

fn fork(directory: &Directory, spec: &Spec, executable: &Path, log: OwnedFd) -> Result<sys::Held, Refusal> {
    let c_string =
        |s: &OsStr| CString::new(s.as_bytes()).map_err(|_| Refusal::Spec(format!("{s:?} holds a NUL character")));
    let path = c_string(executable.as_os_str())?;
    let mut arguments = vec![c_string(spec.program.as_os_str())?];
    for argument in &spec.arguments {
        arguments.push(c_string(OsStr::new(argument))?);
    }
    let environment = spec
        .environment
        .iter()
        .map(|(name, value)| c_string(OsStr::new(&format!("{name}={value}"))))
        .collect::<Result<Vec<_>, _>>()?;
    let home = c_string(directory.path().as_os_str())?;
    let null = File::open("/dev/null").map_err(system("/dev/null"))?;
    let program = sys::Program { path: &path, arguments: &arguments, environment: &environment, directory: &home };
    sys::fork_held(&program, null.as_fd(), log).map_err(system("fork"))
}

/// Waits until the child has executed its program (the pipe closes) or says that it could not.
fn exec_error(failure: OwnedFd) -> Option<String> {
    let mut bytes = Vec::new();
    let read = File::from(failure).take(4).read_to_end(&mut bytes);
    match (read, <[u8; 4]>::try_from(bytes.as_slice())) {
        (Ok(_), Ok(number)) => Some(io::Error::from_raw_os_error(i32::from_ne_bytes(number)).to_string()),
        _ => None,
    }
}
