//! After the start: drain the log, wait for the end, make it durable. And end what is to end with its lease.

use crate::{
    clock, durable,
    failpoint::{self, Step},
    identity,
    lease::Step as LeaseStep,
    logs,
    record::{self, Directory, Exit, Record},
    start::Started,
    sys,
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{Signal, kill, killpg},
        wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid},
    },
    unistd::Pid,
};
use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::fd::{AsFd as _, BorrowedFd},
};

/// How often orphans of the server that have ended are collected, in milliseconds.
const SWEEP_MS: u16 = 30_000;
/// How often a refused record of the end is tried again, and with what pause in milliseconds.
const EXIT_ATTEMPTS: u32 = 120;
const EXIT_PAUSE_MS: u16 = 500;
/// How often the server's descendants are looked for until none is left, and with what pause in milliseconds: one in the
/// middle of a system call ends when it leaves that.
const TREE_ATTEMPTS: u32 = 500;
const TREE_PAUSE_MS: u16 = 10;
const CGROUP_PAUSE_MS: u16 = 2;
/// What stands in the log of a server that is asked to end.
const LEASE_LOST: &[u8] = b"drover-shim: the lease was not renewed in time: SIGTERM (on_lease_lost = \"stop\")\n";

/// Keeps a started process until it has ended and its end is on disk.
pub fn keep(directory: &Directory, started: Started) -> io::Result<()> {
    let Started { record, exec_error, output, mut logs, mut oom, mut lease, lock } = started;
    let pid = Pid::from_raw(record.process.pid);
    let process = sys::pidfd_open(record.process.pid)?;
    fcntl(&output, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut output = File::from(output);
    let mut output_open = true;
    logs.write(format!("{}pid {pid}, token {}\n", logs::RUN_BEGINS, record.token).as_bytes());
    if let Some(error) = &exec_error {
        let program = record.process.executable.display();
        logs.write(format!("drover-shim: {program} could not be executed: {error}\n").as_bytes());
    }
    loop {
        let ended = {
            let mut watched = vec![PollFd::new(process.as_fd(), PollFlags::POLLIN)];
            if output_open {
                watched.push(PollFd::new(output.as_fd(), PollFlags::POLLIN));
            }
            if let Some(lease) = &lease {
                watched.push(PollFd::new(lease.as_fd(), PollFlags::POLLIN));
            }
            match poll(&mut watched, PollTimeout::from(SWEEP_MS)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            watched[0].any().unwrap_or(false)
        };
        if output_open {
            output_open = drain(&mut output, &mut |bytes| logs.write(bytes));
        }
        if ended {
            break;
        }
        if let Some(lease) = &mut lease {
            match lease.look() {
                LeaseStep::Wait => {}
                LeaseStep::Terminate => {
                    logs.write(LEASE_LOST);
                    let _ = sys::pidfd_signal(process.as_fd(), Signal::SIGTERM);
                }
                LeaseStep::Kill => kill_tree(process.as_fd(), &record),
            }
        }
        collect_orphans(pid);
    }
    failpoint::at(Step::StopSeen);
    oom.ended();
    // The leader is a zombie until it is waited for, so its pid, which is also the group's id, can't be anybody else's.
    let _ = killpg(pid, Signal::SIGKILL);
    end_cgroup(&record);
    end_descendants(pid);
    failpoint::at(Step::StopTreeEnded);
    if output_open {
        drain(&mut output, &mut |bytes| logs.write(bytes));
    }
    let (code, signal) = match waitpid(pid, None) {
        Ok(WaitStatus::Exited(_, code)) => (Some(code), None),
        Ok(WaitStatus::Signaled(_, signal, _)) => (None, Some(signal as i32)),
        _ => (None, None),
    };
    let known = record.format >= 2 && (code.is_some() || signal.is_some());
    let oom_killed = if known { oom.killed(pid.as_raw(), signal) } else { None };
    // The agent may have raised the token since.
    let token = record::read::<Record>(&directory.record()).map_or(record.token, |r| r.token.max(record.token));
    let exit = Exit {
        format: record.format,
        oom_killed,
        process: record.process,
        token,
        code,
        signal,
        exec_error,
        ended_at_ms: clock::unix_ms(),
        log_lines_dropped: logs.dropped_lines(),
        lease_lost: lease.is_some_and(|lease| lease.has_ended_it()),
    };
    let written = write_exit(directory, &exit);
    failpoint::at(Step::StopExitWritten);
    collect_orphans(pid);
    drop(lock);
    written
}

/// Reads all that is there. Returns false when nobody is left who could write.
fn drain(output: &mut File, write: &mut dyn FnMut(&[u8])) -> bool {
    let mut buffer = [0_u8; 16 << 10];
    loop {
        match output.read(&mut buffer) {
            Ok(0) => return false,
            Ok(n) => write(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

/// Processes that the server left behind become children of the shim; their ends are collected here.
fn collect_orphans(leader: Pid) {
    let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    while let Ok(status) = waitid(Id::All, look) {
        match status.pid() {
            Some(pid) if pid != leader => {
                let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
            }
            _ => return,
        }
    }
}

/// Ends the server, which is this process's child and not collected yet, so that the handle can name nothing else, and at
/// the same moment what it has started. What is left of that is looked for when it has ended, as after every end.
fn kill_tree(process: BorrowedFd<'_>, record: &Record) {
    let cgroup = record.cgroup.as_ref().and_then(|cgroup| cgroup.open().ok().flatten());
    let _ = cgroup.map(|cgroup| cgroup.kill());
    let _ = sys::pidfd_signal(process, Signal::SIGKILL);
}

/// Ends all that the server has left in its cgroup.
fn end_cgroup(record: &Record) {
    let Some(cgroup) = &record.cgroup else { return };
    for _ in 0..TREE_ATTEMPTS {
        // What has ended and is not collected yet counts as ended.
        if cgroup.end().unwrap_or(true) {
            return;
        }
        let _ = poll(&mut [], PollTimeout::from(CGROUP_PAUSE_MS));
    }
}

/// Ends what the server has started and what left its group: once their parents have ended, all of them are children of
/// the shim. A child's pid is nobody else's until it is collected, and nobody but this collects it.
fn end_descendants(leader: Pid) {
    let own = Pid::this().as_raw();
    for _ in 0..TREE_ATTEMPTS {
        let Ok(entries) = fs::read_dir("/proc") else { return };
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
        let children: Vec<Pid> = pids
            .filter(|&pid| pid != leader.as_raw() && identity::stat(pid).is_ok_and(|stat| stat.parent == own))
            .map(Pid::from_raw)
            .collect();
        if children.is_empty() {
            return;
        }
        for child in children {
            let _ = kill(child, Signal::SIGKILL);
            let _ = waitpid(child, Some(WaitPidFlag::WNOHANG));
        }
        let _ = poll(&mut [], PollTimeout::from(TREE_PAUSE_MS));
    }
}

/// A disk that is full now may have room in a moment.
fn write_exit(directory: &Directory, exit: &Exit) -> io::Result<()> {
    let mut last = None;
    for _ in 0..EXIT_ATTEMPTS {
        match durable::write(&directory.exit(), exit) {
            Ok(()) => return Ok(()),
            // The directory was removed: the instance was given up, and nobody wants to know.
            Err(_) if !directory.path().exists() => return Ok(()),
            Err(error) => last = Some(error),
        }
        let _ = poll(&mut [], PollTimeout::from(EXIT_PAUSE_MS));
    }
    Err(io::Error::other(last.map_or_else(String::new, |e| e.to_string())))
}

/// Makes this process one that outlives its parent: a session of its own, nothing inherited, reaper of its descendants.
pub fn detach() -> io::Result<()> {
    sys::close_from(3);
    sys::ignore_signals();
    // Fails only where we lead a group already, and then we are in a session of our own or were started by hand.
    let _ = nix::unistd::setsid();
    nix::sys::prctl::set_child_subreaper(true)?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    let _ = identity::boot_id()?;
    Ok(())
}

/// Lets go of the standard descriptors, so that who started this process sees the end of its output.
pub fn let_go_of_output() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}
