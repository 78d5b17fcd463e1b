//! Where this agent's instances get cgroups of their own, and the end of what an ended run has left in one.
//!
//! `<root>/drover/<agent>/<instance>@<token>`: below the agent's own cgroup, which systemd delegates to it (`Delegate=yes`),
//! or below one that the configuration names. The shim makes it and puts the held process into it; the record names it.
//! Room for limits: the files of a controller would be written there. Must never: end a cgroup that no record names.

use anyhow::{Context as _, bail, ensure};
use drover_shim::{
    cgroup::{self, Cgroup},
    identity, membership,
    record::Record,
};
use nix::unistd::{AccessFlags, access};
use sha2::{Digest as _, Sha256};
use std::{
    fs, io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::Instant;

/// How long what is left of a run may take to end once it is killed, and how often it is looked at.
const END_DEADLINE: Duration = Duration::from_secs(5);
const END_POLL: Duration = Duration::from_millis(5);

/// Below which cgroup the instances get theirs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Root {
    /// The agent's own.
    #[default]
    Own,
    /// This one.
    At(PathBuf),
    /// They get none.
    Off,
}

impl Root {
    /// Reads the configuration's `cgroup_root`.
    ///
    /// # Errors
    /// When it is neither a word that is known nor an absolute path.
    pub fn parse(given: Option<&str>) -> anyhow::Result<Self> {
        match given {
            None | Some("own") => Ok(Self::Own),
            Some("off") => Ok(Self::Off),
            Some(path) if path.starts_with('/') => Ok(Self::At(path.into())),
            Some(other) => {
                bail!("cgroup_root = {other}: expected own, off, or the path of a cgroup that this agent may write to")
            }
        }
    }

    /// Folder for the cgroups of the agent of this state directory; it is made when the first one needs it. `None` when
    /// they are switched off.
    ///
    /// # Errors
    /// When the host does not offer them; says why.
    pub fn base(&self, state_dir: &Path) -> anyhow::Result<Option<PathBuf>> {
        let root = match self {
            Self::Off => return Ok(None),
            Self::At(path) => path.clone(),
            Self::Own => {
                let own = membership::of(i32::try_from(std::process::id())?).unified;
                own.context("no cgroup of version 2 that this agent is in is mounted here")?
            }
        };
        // Several agents of a host may share a root.
        let hash = Sha256::digest(state_dir.as_os_str().as_bytes());
        let agent: String = hash[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        let base = root.join("drover").join(agent);
        let usable = usable(&base);
        cgroup::clear_base(Some(&base));
        usable.map(|()| Some(base))
    }
}

fn usable(base: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(base).with_context(|| format!("{} can't be made", base.display()))?;
    for name in ["cgroup.procs", "cgroup.kill"] {
        let file = base.join(name);
        access(&file, AccessFlags::W_OK).with_context(|| format!("{} can't be written", file.display()))?;
    }
    let kind = fs::read_to_string(base.join("cgroup.type")).with_context(|| base.display().to_string())?;
    ensure!(kind.trim() == "domain", "{} can hold no processes: it is of type \"{}\"", base.display(), kind.trim());
    Ok(())
}

/// The cgroup of a recorded run, if it is one that this run got, in this boot.
fn of(record: &Record) -> Option<&Cgroup> {
    let this_boot = || identity::boot_id().is_ok_and(|boot| boot == record.process.boot_id);
    record.cgroup.as_ref().filter(|cgroup| cgroup.belongs_to(&record.instance, record.token) && this_boot())
}

/// Ends all that is in the cgroup of a recorded run.
///
/// # Errors
/// When the kernel refuses it.
pub fn kill(record: &Record) -> io::Result<()> {
    match of(record).map(Cgroup::open).transpose()?.flatten() {
        Some(handle) => handle.kill(),
        None => Ok(()),
    }
}

/// Looks once at what an ended run has left: tells it to end, or removes its cgroup. Returns whether nothing is left.
#[must_use]
pub fn is_ended(record: &Record) -> bool {
    let Some(cgroup) = of(record) else { return true };
    cgroup.end().unwrap_or_else(|error| {
        tracing::warn!(instance = record.instance, cgroup = %cgroup.path.display(), %error, "it can't be ended");
        true
    })
}

/// Ends what an ended run has left, and waits for it.
///
/// # Errors
/// When something is still there; names it.
pub async fn end(record: &Record) -> Result<(), String> {
    let deadline = Instant::now() + END_DEADLINE;
    while !is_ended(record) {
        if Instant::now() >= deadline {
            let left = of(record).and_then(|cgroup| cgroup.open().ok()??.pids().ok()).unwrap_or_default();
            return Err(format!(
                "what its server had started has not ended {} s after SIGKILL: pids {left:?}",
                END_DEADLINE.as_secs()
            ));
        }
        tokio::time::sleep(END_POLL).await;
    }
    Ok(())
}

/// Removes the cgroups of an agent that are empty. Returns those that are not and that are not among `recorded`, with their
/// processes: nobody knows whose they are.
#[must_use]
pub fn tidy(base: &Path, recorded: &[Cgroup]) -> Vec<(PathBuf, Vec<i32>)> {
    let mut unnamed = Vec::new();
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let path = entry.path();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) || fs::remove_dir(&path).is_ok() {
            continue;
        }
        if recorded.iter().all(|cgroup| cgroup.path != path) {
            let text = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
            unnamed.push((path, text.lines().filter_map(|line| line.parse().ok()).collect()));
        }
    }
    cgroup::clear_base(Some(base));
    unnamed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_a_word_or_a_path() {
        assert_eq!(Root::parse(None).unwrap(), Root::Own);
        assert_eq!(Root::parse(Some("off")).unwrap().base(Path::new("/s")).unwrap(), None);
        assert_eq!(Root::parse(Some("/sys/fs/cgroup/a")).unwrap(), Root::At("/sys/fs/cgroup/a".into()));
        let error = Root::parse(Some("on")).unwrap_err().to_string();
        assert!(error.contains("cgroup_root = on") && error.contains("off"), "{error}");
    }

    #[test]
    fn a_folder_that_is_no_cgroup_is_not_used_and_says_why() {
        let place = tempfile::tempdir().unwrap();
        let error = Root::At(place.path().to_owned()).base(Path::new("/s")).unwrap_err();
        assert!(format!("{error:#}").contains("cgroup.procs can't be written"), "{error:#}");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }
}
