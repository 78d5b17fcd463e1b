//! One agent for each state directory: an exclusive lock on a file in it, held for as long as the agent lives. And who
//! holds such a lock, told without taking it.

use crate::clock;
use anyhow::{Context as _, bail};
use drover_shim::identity;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            fs::{MetadataExt as _, OpenOptionsExt as _},
            net::{SocketAddr, UnixListener},
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

/// Held by the one agent of a state directory.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "the lock lasts as long as the file is open")] Flock<File>);

/// The file that is locked.
#[must_use]
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("lock")
}

/// Takes the lock; waits for at most `patience` for an agent that is about to end.
pub async fn take(state_dir: &Path, patience: Duration) -> anyhow::Result<Lock> {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        let path = path(state_dir);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .with_context(|| {
                let (folder, path) = (state_dir.display(), path.display());
                format!("state_dir = {folder}: the agent needs a folder that it can write to, and can't open {path}")
            })?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                // Only for the message below: on a full disk what runs must be taken back all the same.
                let _ = file.set_len(0).and_then(|()| file.write_all(std::process::id().to_string().as_bytes()));
                return Ok(Lock(file));
            }
            Err((mut file, Errno::EWOULDBLOCK)) => {
                if tokio::time::Instant::now() >= deadline {
                    // Who has taken it has written its pid down; on a full disk it could not.
                    let mut pid = String::new();
                    let _ = file.rewind().and_then(|()| file.read_to_string(&mut pid));
                    let holder = pid.trim().parse().map_or_else(|_| held_by(&path), described);
                    bail!(
                        "state_dir = {}: another agent uses it ({holder}), and has not ended within {} s: end that one, or give \
                         this one a state_dir of its own",
                        state_dir.display(),
                        patience.as_secs()
                    );
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err((_, error)) => bail!("{}: {error}", path.display()),
        }
    }
}

/// Takes a session for this process: the name of an abstract socket, which the kernel gives to one process of the host (of
/// its network namespace) at a time, wherever its state folder lies. `None` when another process has it; `Some(None)` where
/// there are no such names.
#[must_use]
pub fn session(id: &str) -> Option<Option<UnixListener>> {
    let name = SocketAddr::from_abstract_name(format!("drover-session-{id}"));
    match name.and_then(|name| UnixListener::bind_addr(&name)) {
        Ok(held) => Some(Some(held)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
        Err(error) => {
            tracing::warn!(%error, "whether another agent of this host has this session can't be told");
            Some(None)
        }
    }
}

/// Who holds an exclusive lock on a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// Nobody; nor is the file there, perhaps.
    Nobody,
    /// This process.
    Process(i32),
    /// It can't be told; says why.
    Unknown(String),
}

/// Who holds the lock on a file, and for how long that process has run, for people.
#[must_use]
pub fn held_by(path: &Path) -> String {
    match holder(path) {
        Holder::Process(pid) => described(pid),
        Holder::Nobody => "it has just let go".to_owned(),
        Holder::Unknown(why) => format!("which process can't be told: {why}"),
    }
}

fn described(pid: i32) -> String {
    // The kernel counts it in hundredths of a second.
    let started = identity::stat(pid).map(|stat| Duration::from_millis(stat.start_ticks.saturating_mul(10)));
    match started {
        Ok(started) => format!("pid {pid}, started {} s ago", clock::boottime().saturating_sub(started).as_secs()),
        Err(_) => format!("pid {pid}"),
    }
}

/// Finds out who holds the lock on a file. Takes no lock, not for a moment: the kernel's list is read.
#[must_use]
pub fn holder(path: &Path) -> Holder {
    let file = match fs::metadata(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Holder::Nobody,
        Err(error) => return Holder::Unknown(format!("{}: {error}", path.display())),
    };
    let locks = match fs::read_to_string("/proc/locks") {
        Ok(locks) => locks,
        Err(error) => return Holder::Unknown(format!("/proc/locks: {error}")),
    };
    let mut hidden = Holder::Nobody;
    for pid in locks.lines().filter_map(|line| flock_of(line, file.ino())) {
        // The device of the list is not always the one that files show: what the process has open decides.
        match has_open(pid, &file) {
            Ok(true) => return Holder::Process(pid),
            Ok(false) => {}
            Err(error) => hidden = Holder::Unknown(format!("the open files of pid {pid}: {error}")),
        }
    }
    hidden
}

/// The process of a line of /proc/locks about an exclusive lock of the whole file with this inode:
/// `1: FLOCK  ADVISORY  WRITE 4711 fe:00:753934 0 EOF`.
fn flock_of(line: &str, inode: u64) -> Option<i32> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let [_, "FLOCK", _, "WRITE", pid, place, ..] = words[..] else { return None };
    let found: u64 = place.rsplit_once(':')?.1.parse().ok()?;
    if found == inode { pid.parse().ok() } else { None }
}

fn has_open(pid: i32, file: &fs::Metadata) -> io::Result<bool> {
    let entries = match fs::read_dir(format!("/proc/{pid}/fd")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    let same = |open: fs::Metadata| open.ino() == file.ino() && open.dev() == file.dev();
    Ok(entries.flatten().any(|entry| fs::metadata(entry.path()).is_ok_and(same)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_holds_a_lock_is_told_without_taking_it() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("lock");
        assert_eq!(holder(&path), Holder::Nobody);
        let lock = take(place.path(), Duration::ZERO).await.unwrap();
        assert_eq!(holder(&path), Holder::Process(std::process::id().cast_signed()));
        assert!(held_by(&path).starts_with(&format!("pid {}, started ", std::process::id())), "{}", held_by(&path));
        drop(lock);
        assert_eq!(holder(&path), Holder::Nobody);
        let shared = "2: FLOCK  ADVISORY  READ 28337 fe:00:7 0 EOF";
        assert_eq!((flock_of(shared, 7), flock_of(&shared.replace("READ", "WRITE"), 7)), (None, Some(28337)));
        assert_eq!(flock_of("3: -> FLOCK  ADVISORY  WRITE 5 fe:00:7 0 EOF", 7), None, "one who waits for it");
    }

    #[tokio::test]
    async fn a_second_agent_is_refused_and_told_the_first_one_s_pid() {
        let place = tempfile::tempdir().unwrap();
        let first = take(place.path(), Duration::ZERO).await.unwrap();
        let error = take(place.path(), Duration::ZERO).await.unwrap_err().to_string();
        let (holder, way_out) = (format!("(pid {}, started ", std::process::id()), "end that one");
        assert!(error.contains(&holder) && error.contains(" s ago)") && error.contains(way_out), "{error}");
        drop(first);
        take(place.path(), Duration::ZERO).await.unwrap();
    }
}
