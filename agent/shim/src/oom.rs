//! Whether the kernel has ended a process because memory was short (OOM). Known, known not, or not known: never guessed.
//!
//! The kernel counts such ends for each memory cgroup, before it sends the SIGKILL, and names the process in its log. A
//! count that has not risen says no. One that has says yes where nothing but the run is counted; where others are counted
//! too it takes the log, which can't be read everywhere, and names processes as the first pid namespace knows them.

use crate::membership;
use nix::{
    fcntl::OFlag,
    libc,
    poll::{PollTimeout, poll},
    sys::signal::Signal,
};
use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

/// Inode number of the first pid namespace: PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h.
const FIRST_PID_NAMESPACE: u64 = 0xEFFF_FFFC;
/// How often the kernel's log is looked at, and with what pause in milliseconds: it is written after the signal is sent.
const LOG_ATTEMPTS: u32 = 10;
const LOG_PAUSE_MS: u16 = 10;

/// What was seen before a run and at its end.
#[derive(Debug)]
pub struct Watch {
    counter: Option<Counter>,
    /// The kernel's log, from here on.
    log: Option<File>,
}

/// Counts processes that the kernel has ended for memory.
#[derive(Debug)]
struct Counter {
    /// A file of lines, one of which is "oom_kill <count>".
    file: PathBuf,
    /// Whether only the run is counted there.
    own: bool,
    before: u64,
    /// As it was at the end: afterwards the cgroup is removed.
    after: Option<u64>,
}

/// Looks at a process before it executes its program. `own`: directory of the cgroup that only this run is in.
#[must_use]
pub fn watch(pid: i32, own: Option<&Path>) -> Watch {
    let counter = counter(&membership::of(pid), own);
    let first = fs::metadata("/proc/self/ns/pid").is_ok_and(|meta| meta.ino() == FIRST_PID_NAMESPACE);
    let log = first.then(|| {
        let mut log = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open("/dev/kmsg").ok()?;
        log.seek(SeekFrom::End(0)).ok()?;
        Some(log)
    });
    Watch { counter, log: log.flatten() }
}

/// Takes from a process the protection that it has from its keeper, if any: when memory is short the kernel is to end a
/// server before the agent and the shims. What makes a process more likely to be ended is left as it is.
/// Values: https://man7.org/linux/man-pages/man5/proc_pid_oom_score_adj.5.html
///
/// # Errors
/// The value can't be read or set.
pub fn unprotect(pid: i32) -> io::Result<()> {
    lift(Path::new(&format!("/proc/{pid}/oom_score_adj")))
}

#[allow(clippy::disallowed_methods, reason = "no file on a disk: the kernel takes the value whole or not at all")]
fn lift(adjustment: &Path) -> io::Result<()> {
    let protected = fs::read_to_string(adjustment)?.trim_start().starts_with('-');
    if protected { fs::write(adjustment, "0") } else { Ok(()) }
}

fn counter(of: &membership::Membership, own: Option<&Path>) -> Option<Counter> {
    let unified = of.unified.as_deref().into_iter().flat_map(Path::ancestors).map(|path| path.join("memory.events"));
    let memory = of.memory.iter().map(|path| path.join("memory.oom_control"));
    // A memory controller is of one version or the other; in version 2 the nearest cgroup that has it counts.
    unified.chain(memory).find_map(|file| {
        let before = count(&file)?;
        Some(Counter { own: own.is_some() && file.parent() == own, file, before, after: None })
    })
}

fn count(file: &Path) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

impl Watch {
    /// The process has ended: what is counted is looked at, before its cgroup is removed.
    pub fn ended(&mut self) {
        if let Some(counter) = &mut self.counter {
            counter.after = count(&counter.file);
        }
    }

    /// Whether the kernel has ended the process for memory, which has ended by `signal`. `None` when it can't be told.
    #[must_use]
    pub fn killed(mut self, pid: i32, signal: Option<i32>) -> Option<bool> {
        if signal != Some(Signal::SIGKILL as i32) {
            // It sends no other.
            return Some(false);
        }
        let risen = |c: &Counter| (c.own, c.after.map(|after| after.saturating_sub(c.before)));
        match self.counter.as_ref().map(risen) {
            Some((_, Some(0))) => Some(false),
            Some((true, Some(_))) => Some(true),
            _ => self.log_names(pid).then_some(true),
        }
    }

    fn log_names(&mut self, pid: i32) -> bool {
        let Some(log) = &mut self.log else { return false };
        let mut record = [0_u8; 8 << 10];
        for _ in 0..LOG_ATTEMPTS {
            loop {
                match log.read(&mut record) {
                    Ok(0) => break,
                    Ok(n) if names(&String::from_utf8_lossy(&record[..n]), pid) => return true,
                    Ok(_) => {}
                    // What was read next has been overwritten meanwhile: it goes on with the oldest that is left.
                    Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                    Err(_) => break,
                }
            }
            let _ = poll(&mut [], PollTimeout::from(LOG_PAUSE_MS));
        }
        false
    }
}

/// Whether a record of the kernel's log says that it has ended this process for memory (mm/oom_kill.c).
fn names(record: &str, pid: i32) -> bool {
    // Whoever writes to /dev/kmsg can't pretend to be the kernel: facility 0 is refused to them.
    let facility = record.split(',').next().and_then(|n| n.parse::<u32>().ok()).map(|n| n >> 3);
    facility == Some(0) && record.contains(&format!("ut of memory: Killed process {pid} ("))
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "makes up a hierarchy of cgroups, which no crash outlives")]
mod tests {
    use super::*;
    use membership::Membership;

    fn write(place: &Path, name: &str, text: &str) {
        fs::create_dir_all(place).unwrap();
        fs::write(place.join(name), text).unwrap();
    }

    #[test]
    fn only_a_protection_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("oom_score_adj");
        for (before, after) in [("-500\n", "0"), ("-1\n", "0"), ("0\n", "0\n"), ("300\n", "300\n")] {
            fs::write(&file, before).unwrap();
            lift(&file).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), after, "{before}");
        }
        assert!(lift(&folder.path().join("absent")).is_err());
    }

    fn kill(counter: Option<Counter>) -> Option<bool> {
        let mut watch = Watch { counter, log: None };
        watch.ended();
        watch.killed(7, Some(9))
    }

    #[test]
    fn a_count_of_its_own_says_yes_or_no_and_a_shared_one_only_no() {
        let root = tempfile::tempdir().unwrap();
        let (unit, own) = (root.path().join("unit"), root.path().join("unit/own"));
        write(&unit, "memory.events", "oom 1\noom_kill 3\noom_group_kill 0\n");
        write(&own, "memory.events", "oom 0\noom_kill 0\n");
        let of = Membership { unified: Some(own.clone()), memory: None };
        let look = || counter(&of, Some(&own));
        assert_eq!(kill(look()), Some(false));
        let before = look();
        write(&own, "memory.events", "oom 1\noom_kill 1\n");
        assert_eq!(kill(before), Some(true));
        fs::remove_file(own.join("memory.events")).unwrap();
        // Without a count of its own the nearest one above, where others are counted too.
        assert_eq!(kill(look()), Some(false));
        let before = look();
        write(&unit, "memory.events", "oom_kill 4\n");
        assert_eq!(kill(before), None);
    }

    #[test]
    fn without_a_count_nothing_is_known_of_a_sigkill_and_all_of_any_other_end() {
        assert_eq!(kill(counter(&Membership::default(), None)), None);
        let gone = Counter { file: "/none".into(), own: true, before: 0, after: None };
        assert_eq!(kill(Some(gone)), None);
        for signal in [None, Some(15), Some(11)] {
            assert_eq!(Watch { counter: None, log: None }.killed(7, signal), Some(false));
        }
    }

    #[test]
    fn the_log_of_the_kernel_names_the_process_and_nobody_else_can() {
        let line = |facility: u32, text: &str| format!("{},1234,99,-;{text}\n", facility << 3 | 3);
        let local = "Memory cgroup out of memory: Killed process 71 (llama-server) total-vm:1kB";
        assert!(names(&line(0, local), 71));
        assert!(names(&line(0, "Out of memory: Killed process 71 (x) total-vm:1kB"), 71));
        assert!(!names(&line(0, local), 7));
        assert!(!names(&line(1, local), 71));
        assert!(!names("no record", 71));
    }
}
