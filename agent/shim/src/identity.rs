//! Who a process is: pids are used again, so a pid alone names nobody.
//!
//! A process is boot id, pid, start time and executable together. [`verify`] compares; it never signals. What /proc does
//! not show is not gone: it may be hidden from us. And a pid that another program executes since the very same tick is no
//! pid that was used again: its file was renamed, or it is seen through another mount; only its file can tell then.

use nix::{errno::Errno, libc, sys::signal::kill, unistd::Pid};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// A file, whatever it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// Number of its device.
    pub device: u64,
    /// Number of its inode.
    pub inode: u64,
}

impl FileId {
    /// The file that a path leads to.
    pub fn of(path: &Path) -> io::Result<Self> {
        let meta = fs::metadata(path)?;
        Ok(Self { device: meta.dev(), inode: meta.ino() })
    }
}

/// Identity of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Boot of the kernel that it runs under.
    pub boot_id: String,
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot: field 22 of /proc/<pid>/stat.
    pub start_ticks: u64,
    /// Its executable.
    pub executable: PathBuf,
    /// The executable's file, which keeps its number when it is renamed; unknown in records of format 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<FileId>,
}

impl Process {
    /// Whether both name the same process: boot, pid and start time do, whatever it executes.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        (&self.boot_id, self.pid, self.start_ticks) == (&other.boot_id, other.pid, other.start_ticks)
    }
}

/// What a look at the host says about a recorded process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It lives, and all parts match.
    Same,
    /// It has ended (a zombie has ended too).
    Gone,
    /// Its pid belongs to somebody else; says which part differs.
    Other(String),
    /// It can't be told; says why. Such a process is not touched.
    Unknown(String),
}

/// What the kernel says of a process in /proc/<pid>/stat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// State: 'R', 'S', 'D', 'T', 'Z', …
    pub state: char,
    /// Process id of its parent.
    pub parent: i32,
    /// Session id.
    pub session: i32,
    /// Processor time used in user and kernel mode, in clock ticks.
    pub cpu_ticks: u64,
    /// Start time, in clock ticks since boot.
    pub start_ticks: u64,
}

/// Id of this boot.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Reads /proc/<pid>/stat.
pub fn stat(pid: i32) -> io::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&text).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has an unknown form: {text}")))
}

/// The program's name stands in parentheses and may hold spaces and parentheses itself: fields are counted after the last.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, rest) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(4 - 3)?.parse().ok()?,
        session: fields.get(6 - 3)?.parse().ok()?,
        cpu_ticks: number(14)?.saturating_add(number(15)?),
        start_ticks: number(22)?,
    })
}

/// Executable of a process; of one whose file was replaced, the path that it was started from.
pub fn executable(pid: i32) -> io::Result<PathBuf> {
    let path = fs::read_link(place(pid, "exe"))?;
    Ok(match path.to_string_lossy().strip_suffix(" (deleted)") {
        Some(original) => PathBuf::from(original),
        None => path,
    })
}

/// File that a process executes, whatever it is called by now.
pub fn executable_file(pid: i32) -> io::Result<FileId> {
    FileId::of(&place(pid, "exe"))
}

/// Compares a recorded process with what runs under its pid now. `held_as`: executable that it shows while it is held.
#[must_use]
pub fn verify(process: &Process, held_as: Option<&Path>) -> Verdict {
    match boot_id() {
        Err(error) => return Verdict::Unknown(format!("the boot id can't be read: {error}")),
        Ok(boot) if boot != process.boot_id => return Verdict::Gone,
        Ok(_) => {}
    }
    let pid = process.pid;
    let stat = match stat(pid) {
        Ok(stat) => stat,
        Err(error) => return unseen(pid, "stat", &error),
    };
    if stat.start_ticks != process.start_ticks {
        return Verdict::Other(format!(
            "pid {pid} started at tick {}, the recorded one at {}",
            stat.start_ticks, process.start_ticks
        ));
    }
    if matches!(stat.state, 'Z' | 'X') {
        return Verdict::Gone;
    }
    let found = match executable(pid) {
        Ok(found) => found,
        Err(error) => return unseen(pid, "exe", &error),
    };
    let same_path = found == process.executable || held_as.is_some_and(|held| held == found);
    let same_file = || process.file.is_some() && executable_file(pid).ok() == process.file;
    if same_path || same_file() {
        return Verdict::Same;
    }
    Verdict::Unknown(format!(
        "pid {pid} started when the recorded one did, but executes {}, not {}",
        found.display(),
        process.executable.display()
    ))
}

/// What it means that /proc does not show a process.
fn unseen(pid: i32, file: &str, error: &io::Error) -> Verdict {
    let absent = error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH);
    // Signal 0 is never delivered: it only asks whether there is such a process.
    if absent && kill(Pid::from_raw(pid), None) == Err(Errno::ESRCH) {
        return Verdict::Gone;
    }
    Verdict::Unknown(format!("{} can't be read though pid {pid} lives: {error}", place(pid, file).display()))
}

fn place(pid: i32, file: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{file}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn myself() -> Process {
        let pid = i32::try_from(std::process::id()).unwrap();
        Process {
            boot_id: boot_id().unwrap(),
            pid,
            start_ticks: stat(pid).unwrap().start_ticks,
            executable: executable(pid).unwrap(),
            file: None,
        }
    }

    #[test]
    fn a_program_name_with_spaces_and_parentheses_shifts_no_field() {
        let text = "77 (a) b (c) S 1 2 55 0 -1 0 0 0 0 0 7 8 0 0 20 0 1 0 4242 0 0";
        let expected = Stat { state: 'S', parent: 1, session: 55, cpu_ticks: 15, start_ticks: 4242 };
        assert_eq!(parse_stat(text), Some(expected));
        assert_eq!(parse_stat("77 (x"), None);
    }

    #[test]
    fn each_part_of_the_identity_counts() {
        assert_eq!(verify(&myself(), None), Verdict::Same);
        assert_eq!(verify(&Process { boot_id: "another".to_owned(), ..myself() }, None), Verdict::Gone);
        assert!(matches!(verify(&Process { start_ticks: 1, ..myself() }, None), Verdict::Other(_)));
        let elsewhere = Process { executable: "/bin/true".into(), ..myself() };
        assert!(matches!(verify(&elsewhere, None), Verdict::Unknown(_)));
        assert_eq!(verify(&elsewhere, Some(&myself().executable)), Verdict::Same);
        // Its file knows better than its path.
        let file = Some(FileId::of(&myself().executable).unwrap());
        assert_eq!(verify(&Process { file, ..elsewhere.clone() }, None), Verdict::Same);
        let file = Some(FileId::of(Path::new("/proc/self/stat")).unwrap());
        assert!(matches!(verify(&Process { file, ..elsewhere }, None), Verdict::Unknown(_)));
        assert_eq!(verify(&Process { pid: i32::MAX, ..myself() }, None), Verdict::Gone);
    }
}
