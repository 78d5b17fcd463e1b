//! A cgroup (version 2) of its own for each run: it holds the server and whatever that starts, wherever it goes, and
//! nothing else, so that all of it can be ended even when the shim is dead.
//!
//! As with a process, a path alone names nothing: the directory may have been removed and made again. It is path and id
//! together (the inode number of the directory, which the kernel gives out once in a boot). It is opened first, verified
//! then, and ended through the handle. Must never: look for a cgroup that no record names in order to end it.

use crate::{membership, record::Token};
use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    libc,
    sys::{stat::Mode, statfs},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
};

/// How often a directory is made that somebody removes, or whose name is taken, before its process is put into it.
const ATTEMPTS: u32 = 8;

/// A cgroup, as it is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// Its directory.
    pub path: PathBuf,
    /// Inode number of the directory. Of this boot only.
    pub id: u64,
}

/// A cgroup whose identity was verified: it names this one, whatever becomes of its path.
#[derive(Debug)]
pub struct Handle(OwnedFd);

/// Start of the name of an instance's cgroups.
fn prefix(instance: &str) -> String {
    format!("{instance}@")
}

/// Makes a cgroup for a run below `base` and puts a process into it. The process must not have started anything yet.
///
/// # Errors
/// When the host does not offer it; then the process is where it was.
pub fn place(base: &Path, instance: &str, token: Token, pid: i32) -> io::Result<Cgroup> {
    let mut last = io::Error::other("no attempt was made");
    for n in 0..ATTEMPTS {
        // One that could not be removed yet, since something in it waits for the kernel, keeps its name.
        let number = if n == 0 { String::new() } else { format!(".{n}") };
        let path = base.join(format!("{}{token}{number}", prefix(instance)));
        // Of an earlier run; the kernel removes only what is empty.
        let _ = fs::remove_dir(&path);
        let placed = fs::create_dir_all(base).and_then(|()| fs::create_dir(&path)).and_then(|()| {
            let id = fs::metadata(&path)?.ino();
            let cgroup = Cgroup { path: path.clone(), id };
            let Some(handle) = cgroup.open()? else { return Err(io::Error::other("it is no cgroup of version 2")) };
            handle.write("cgroup.procs", &pid.to_string())?;
            Ok(cgroup)
        });
        match placed {
            Ok(cgroup) => return Ok(cgroup),
            Err(error) => {
                let _ = fs::remove_dir(&path);
                // Whoever cleans up removes empty ones, this one too until the process is in it.
                let again = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::AlreadyExists);
                last = io::Error::new(error.kind(), format!("{}: {error}", path.display()));
                if !again && error.raw_os_error() != Some(libc::ENODEV) {
                    break;
                }
            }
        }
    }
    clear_base(Some(base));
    Err(last)
}

impl Cgroup {
    /// The cgroup that a process is in, below `base`, if that is one of this instance.
    #[must_use]
    pub fn of(pid: i32, base: &Path, instance: &str) -> Option<Self> {
        let path = membership::of(pid).unified?;
        let name = path.file_name()?.to_str()?;
        if path.parent() != Some(base) || !name.starts_with(&prefix(instance)) {
            return None;
        }
        let id = fs::metadata(&path).ok()?.ino();
        Some(Self { path, id })
    }

    /// Whether its name is one that a run of this instance got, under this token or a lower one: tokens are raised later.
    #[must_use]
    pub fn belongs_to(&self, instance: &str, token: Token) -> bool {
        let name = self.path.file_name().and_then(|name| name.to_str());
        let named = name.and_then(|name| name.strip_prefix(&prefix(instance))).and_then(|rest| {
            let mut numbers = rest.split('.');
            let generation = numbers.next()?.parse().ok()?;
            Some(Token { generation, revision: numbers.next()?.parse().ok()? })
        });
        named.is_some_and(|named| named <= token)
    }

    /// Opens it and verifies that it is the recorded one; `None` when that one is gone. Only right in the boot that it was
    /// recorded in.
    pub fn open(&self) -> io::Result<Option<Handle>> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let directory = match nix::fcntl::open(&self.path, flags, Mode::empty()) {
            Ok(directory) => directory,
            Err(Errno::ENOENT | Errno::ENODEV | Errno::ENOTDIR) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let kind = statfs::fstatfs(&directory)?.filesystem_type();
        let id = nix::sys::stat::fstat(&directory)?.st_ino;
        Ok((kind == statfs::CGROUP2_SUPER_MAGIC && id == self.id).then_some(Handle(directory)))
    }

    /// Ends everything in it, or removes it when it is empty; returns whether it is gone. To be asked again until it is:
    /// what is told to end takes a moment, and longer where it waits for the kernel.
    pub fn end(&self) -> io::Result<bool> {
        let Some(handle) = self.open()? else { return Ok(true) };
        let ended = handle.is_populated().and_then(|is| if is { handle.kill().map(|()| false) } else { Ok(true) });
        match ended {
            Ok(empty) => Ok(empty && self.remove()),
            // Somebody else has removed it in this moment.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENOENT)) => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Removes it, with what is below it and with the folders above that are left empty by that. The kernel removes no
    /// cgroup that has a process.
    fn remove(&self) -> bool {
        remove_below(&self.path);
        let removed = match fs::remove_dir(&self.path) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if removed {
            clear_base(self.path.parent());
        }
        removed
    }
}

/// Removes the folder of an agent's cgroups, and the one of all agents, if they are empty.
pub fn clear_base(base: Option<&Path>) {
    for folder in [base, base.and_then(Path::parent)].into_iter().flatten() {
        let _ = fs::remove_dir(folder);
    }
}

/// A server may have made cgroups of its own.
fn remove_below(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_below(&entry.path());
            let _ = fs::remove_dir(entry.path());
        }
    }
}

impl Handle {
    /// Ends every process in it and below it, at once: none of them can start another that escapes.
    pub fn kill(&self) -> io::Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Whether a living process is in it or below it.
    pub fn is_populated(&self) -> io::Result<bool> {
        let text = self.read("cgroup.events")?;
        Ok(!text.lines().any(|line| line == "populated 0"))
    }

    /// Its processes, those below it left out.
    pub fn pids(&self) -> io::Result<Vec<i32>> {
        Ok(self.read("cgroup.procs")?.lines().filter_map(|line| line.parse().ok()).collect())
    }

    fn write(&self, name: &str, value: &str) -> io::Result<()> {
        let file = openat(self.0.as_fd(), name, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        File::from(file).write_all(value.as_bytes())
    }

    fn read(&self, name: &str) -> io::Result<String> {
        let file = openat(self.0.as_fd(), name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        let mut text = String::new();
        File::from(file).read_to_string(&mut text)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_whose_it_is() {
        let token = Token { generation: 2, revision: 7 };
        let belongs = |name: &str| Cgroup { path: Path::new("/c").join(name), id: 1 }.belongs_to("tiny-234567", token);
        assert!(belongs("tiny-234567@2.7") && belongs("tiny-234567@2.7.3") && belongs("tiny-234567@1.900"));
        assert!(!belongs("tiny-234567@2.8") && !belongs("tiny-234567@3.1"));
        assert!(!belongs("tiny-234568@2.7") && !belongs("tiny-234567") && !belongs("tiny-234567@") && !belongs(".."));
    }

    #[test]
    fn what_is_no_cgroup_of_version_2_is_never_opened_as_one() {
        let place = tempfile::tempdir().unwrap();
        let id = fs::metadata(place.path()).unwrap().ino();
        let cgroup = Cgroup { path: place.path().to_owned(), id };
        assert!(cgroup.open().unwrap().is_none());
        assert!(cgroup.end().unwrap() && place.path().exists());
    }
}
