//! Processes: who they are, and signals to exactly them.
//!
//! A process is touched only through a [`Living`], which is made by opening a pidfd first and verifying the identity then:
//! from that on the handle names this process, whatever becomes of its pid.

use super::cgroup;
use drover_shim::{
    failpoint::{self, Step},
    identity::{self, Process, Verdict},
    record::{Record, Stage},
    sys,
};
use nix::sys::signal::Signal;
use std::{
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};
use tokio::io::{Interest, unix::AsyncFd};

pub use drover_shim::identity::boot_id;

/// A process whose whole identity matched its record.
#[derive(Debug)]
pub struct Living {
    handle: AsyncFd<OwnedFd>,
    pid: i32,
    start_ticks: u64,
    /// Names the cgroup that holds it and what it starts; `None` when it was found without a record.
    record: Option<Box<Record>>,
}

/// What a process has done since its start. One that waits for a slow disk uses no processor meanwhile, but reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Processor time, in clock ticks.
    pub cpu_ticks: u64,
    /// Bytes read by system calls, and bytes fetched from disks, which are those of mapped files too.
    pub read: (u64, u64),
}

/// What became of a recorded process.
#[derive(Debug)]
pub enum Found {
    /// It lives.
    Living(Living),
    /// It has ended.
    Gone,
    /// Its pid belongs to another process now, which is none of our business; says what differs.
    Other(String),
    /// It can't be told; nothing is to be done to it. Says why.
    Unknown(String),
}

/// Looks for the process of a record.
#[must_use]
pub fn find(record: &Record) -> Found {
    let held_as = (record.stage == Stage::Held).then_some(record.shim.as_path());
    match find_process(&record.process, held_as) {
        Found::Living(living) => Found::Living(Living { record: Some(Box::new(record.clone())), ..living }),
        other => other,
    }
}

/// Looks for a process of this identity. `held_as`: executable that it shows while it is held.
#[must_use]
pub fn find_process(process: &Process, held_as: Option<&Path>) -> Found {
    let pid = process.pid;
    // The handle first: a pid verified before could change hands before the handle is opened.
    let handle = match sys::pidfd_open(pid) {
        Ok(handle) => handle,
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Found::Gone,
        Err(error) => return Found::Unknown(format!("no handle of pid {pid}: {error}")),
    };
    failpoint::at(Step::AdoptOpened);
    match identity::verify(process, held_as) {
        Verdict::Gone => Found::Gone,
        Verdict::Other(what) => Found::Other(what),
        Verdict::Unknown(why) => Found::Unknown(why),
        Verdict::Same => match watch(handle) {
            Ok(handle) => Found::Living(Living { handle, pid, start_ticks: process.start_ticks, record: None }),
            Err(error) => Found::Unknown(format!("the handle of pid {pid} can't be watched: {error}")),
        },
    }
}

#[allow(deprecated, reason = "unsound only for types that may close their descriptor early: an OwnedFd does not")]
fn watch(handle: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(handle, Interest::READABLE)
}

impl Living {
    /// Its process id, for people.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its start time, in clock ticks since boot.
    #[must_use]
    pub fn start_ticks(&self) -> u64 {
        self.start_ticks
    }

    /// Waits until it has ended. Seen within milliseconds, also when it is not a child of ours.
    pub async fn ended(&self) {
        if let Err(error) = self.handle.readable().await.map(drop) {
            tracing::warn!(pid = self.pid, %error, "the process can't be watched any more: it counts as ended");
        }
    }

    /// What it has done so far; `None` when it can't be read.
    #[must_use]
    pub fn work(&self) -> Option<Work> {
        let read = read_bytes(self.pid).unwrap_or_default();
        // The pid is known to be its own while its start time is.
        let stat = identity::stat(self.pid).ok().filter(|s| s.start_ticks == self.start_ticks)?;
        Some(Work { cpu_ticks: stat.cpu_ticks, read })
    }

    /// Asks it to end.
    pub fn terminate(&self) -> io::Result<()> {
        self.signal(Signal::SIGTERM)
    }

    /// Ends it and what it has started: its cgroup, where it has one of its own, and its session.
    pub fn kill_tree(&self) -> io::Result<()> {
        if let Some(error) = self.record.as_deref().and_then(|record| cgroup::kill(record).err()) {
            tracing::warn!(pid = self.pid, %error, "its cgroup can't be ended: its session is");
        }
        // Its session's id is its pid, and stays taken for as long as the session has a member.
        let members = session_members(self.pid, self.start_ticks).unwrap_or_else(|error| {
            tracing::warn!(pid = self.pid, %error, "its session can't be looked through: it is ended alone");
            Vec::new()
        });
        let result = self.signal(Signal::SIGKILL);
        for member in members {
            if let Err(error) = sys::pidfd_signal(member.as_fd(), Signal::SIGKILL)
                && error.raw_os_error() != Some(libc::ESRCH)
            {
                tracing::warn!(session = self.pid, %error, "a member of the session can't be ended");
            }
        }
        result
    }

    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        match sys::pidfd_signal(self.handle.get_ref().as_fd(), signal) {
            // It has ended already, which is what was asked for.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result,
        }
    }
}

/// `rchar` and `read_bytes` of /proc/<pid>/io (proc_pid_io(5)); nothing where they may not be read.
fn read_bytes(pid: i32) -> Option<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok();
    Some((field("rchar:")?, field("read_bytes:")?))
}

/// Whether a session is that of the leader which began then: its id stays taken for as long as it has a member, so that
/// another process of this id leads another session.
pub(super) fn leads(session: i32, leader_start: u64) -> bool {
    identity::stat(session).map_or(true, |leader| leader.start_ticks == leader_start)
}

/// Handles of the processes of a session but its leader. A session's members are no older than its leader.
fn session_members(session: i32, leader_start: u64) -> io::Result<Vec<OwnedFd>> {
    let mut members = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let belongs = || {
            pid != session && identity::stat(pid).is_ok_and(|s| s.session == session && s.start_ticks >= leader_start)
        };
        if !belongs() {
            continue;
        }
        if let Ok(handle) = sys::pidfd_open(pid) {
            // Again after the handle is open: only now is it known whom it names.
            if belongs() && leads(session, leader_start) {
                members.push(handle);
            }
        }
    }
    Ok(members)
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "starts programs to look at")]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn the_session_of_another_leader_with_the_same_pid_is_not_ours() {
        use io::BufRead as _;
        let mut command = Command::new("setsid");
        let script = "sleep 600 & echo started; wait";
        let mut leader = command.args(["sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        io::BufReader::new(leader.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        let pid = i32::try_from(leader.id()).unwrap();
        let start = identity::stat(pid).unwrap().start_ticks;
        let members = session_members(pid, start).unwrap();
        // The one that was recorded began earlier, and its pid was used again.
        let of_another = session_members(pid, start - 1).unwrap();
        leader.kill().unwrap();
        leader.wait().unwrap();
        for member in &members {
            sys::pidfd_signal(member.as_fd(), Signal::SIGKILL).unwrap();
        }
        assert_eq!((members.len(), of_another.len()), (1, 0));
    }
}
