//! A process and all that it has started, to be ended together.
//!
//! Found by parents while these live, and by the session where the process leads one. Each member is a pidfd that was
//! opened first and verified then, as in [`super::processes`]. Must never: touch a process of a session that the root does
//! not lead; that is its starter's shell.

use super::processes::{Living, leads};
use drover_shim::{
    identity::{self, Stat},
    sys,
};
use nix::sys::signal::Signal;
use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsFd as _, OwnedFd},
};
use tokio::io::{Interest, unix::AsyncFd};

/// How often the host is searched for what was forked meanwhile. Each time all that was found before is stopped, so only
/// a fork in that very moment needs another one.
const ROUNDS: usize = 8;

/// What a process has started, without itself.
#[derive(Debug)]
pub struct Tree {
    root: (i32, u64),
    /// By pid.
    members: BTreeMap<i32, Member>,
}

#[derive(Debug)]
struct Member {
    start_ticks: u64,
    handle: AsyncFd<OwnedFd>,
}

impl Tree {
    /// What a process has started so far. Reads all of /proc: not for the runtime's own threads, but within the runtime.
    ///
    /// # Errors
    /// When /proc can't be listed.
    pub fn below(root: &Living) -> io::Result<Self> {
        let mut tree = Self { root: (root.pid(), root.start_ticks()), members: BTreeMap::new() };
        tree.grow(false)?;
        Ok(tree)
    }

    /// Ids of those that live.
    pub fn living(&self) -> Vec<i32> {
        let lives = |(pid, member): (&i32, &Member)| {
            let same = identity::stat(*pid).is_ok_and(|s| s.start_ticks == member.start_ticks && !ended(&s));
            same.then_some(*pid)
        };
        self.members.iter().filter_map(lives).collect()
    }

    /// Waits until all have ended.
    pub async fn ended(&self) {
        for member in self.members.values() {
            let _ = member.handle.readable().await.map(drop);
        }
    }

    /// Asks them to end.
    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Ends the root and all below it: everything is stopped before anything is ended, so that nothing can fork away or
    /// lose the parent that it is known by. `root` is signalled through its own handle; one that has ended is no obstacle.
    ///
    /// # Errors
    /// When the root can't be signalled, or /proc can't be listed; then nothing stays stopped.
    pub fn kill(&mut self, root: &Living) -> io::Result<()> {
        root.signal(Signal::SIGSTOP)?;
        self.signal(Signal::SIGSTOP);
        let mut found = Ok(true);
        for _ in 0..ROUNDS {
            found = self.grow(true);
            if !matches!(found, Ok(true)) {
                break;
            }
        }
        self.signal(Signal::SIGKILL);
        root.signal(Signal::SIGKILL).and(found.map(drop))
    }

    /// Adds what is new; with `stop` it is stopped as it is found. False when nothing was.
    fn grow(&mut self, stop: bool) -> io::Result<bool> {
        let all = everything()?;
        let before = self.members.len();
        // Children of children: until a pass finds none.
        loop {
            let new: Vec<i32> =
                all.iter().filter(|(pid, stat)| self.belongs(**pid, stat)).map(|(pid, _)| *pid).collect();
            let mut added = false;
            for pid in new {
                let Some(member) = self.open(pid, &all) else { continue };
                if stop {
                    signal(pid, &member, Signal::SIGSTOP);
                }
                self.members.insert(pid, member);
                added = true;
            }
            if !added {
                return Ok(self.members.len() > before);
            }
        }
    }

    fn belongs(&self, pid: i32, stat: &Stat) -> bool {
        if pid == self.root.0 || self.members.contains_key(&pid) || ended(stat) || stat.start_ticks < self.root.1 {
            return false;
        }
        // A session's id is its leader's pid, and stays taken for as long as the session has a member.
        stat.session == self.root.0 || stat.parent == self.root.0 || self.members.contains_key(&stat.parent)
    }

    /// Opens its handle, and looks again then: only now is it known whom it names.
    fn open(&self, pid: i32, all: &BTreeMap<i32, Stat>) -> Option<Member> {
        let handle = sys::pidfd_open(pid).ok()?;
        let seen = all.get(&pid)?;
        let now = identity::stat(pid).ok()?;
        let session = now.session == self.root.0 && leads(self.root.0, self.root.1);
        let parent_start = if now.parent == self.root.0 {
            Some(self.root.1)
        } else {
            self.members.get(&now.parent).map(|m| m.start_ticks)
        };
        // Its parent's pid may have changed hands since the tree was found.
        let child = parent_start.is_some() && identity::stat(now.parent).ok().map(|s| s.start_ticks) == parent_start;
        if now.start_ticks != seen.start_ticks || !(session || child) {
            return None;
        }
        #[allow(
            deprecated,
            reason = "unsound only for types that may close their descriptor early: an OwnedFd does not"
        )]
        let handle = AsyncFd::with_interest(handle, Interest::READABLE).ok()?;
        Some(Member { start_ticks: now.start_ticks, handle })
    }

    fn signal(&self, which: Signal) {
        for (pid, member) in &self.members {
            signal(*pid, member, which);
        }
    }
}

fn signal(pid: i32, member: &Member, which: Signal) {
    if let Err(error) = sys::pidfd_signal(member.handle.get_ref().as_fd(), which)
        && error.raw_os_error() != Some(libc::ESRCH)
    {
        tracing::warn!(pid, %error, "what a server has started can't be sent {which}");
    }
}

fn ended(stat: &Stat) -> bool {
    matches!(stat.state, 'Z' | 'X')
}

fn everything() -> io::Result<BTreeMap<i32, Stat>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        all.extend(identity::stat(pid).ok().map(|stat| (pid, stat)));
    }
    Ok(all)
}
