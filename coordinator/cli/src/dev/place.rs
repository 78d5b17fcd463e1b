//! The folders of one `drover dev`, and their removal.
//!
//! `data` holds what is written (etcd's data, state folders, logs, the model); `run` holds the sockets. A socket's
//! path has 108 bytes at most, so `run` is always a short folder of its own below /tmp.

use crate::failure::Failure;
use std::{
    fs::{self, File, TryLockError},
    io::Write as _,
    path::{Path, PathBuf},
};

/// Folders of one fleet.
#[derive(Debug)]
pub struct Place {
    /// The short temporary folder.
    scratch: PathBuf,
    /// Where everything but sockets lies.
    pub data: PathBuf,
    /// `data` was named by the user.
    given: bool,
    /// Two fleets in one folder would destroy each other: held as long as this one lives.
    _lock: File,
}

impl Place {
    /// Makes the folders; `data` is a part of the temporary folder unless it is given.
    pub fn make(data: Option<&Path>) -> Result<Self, Failure> {
        let folder = std::env::temp_dir();
        let scratch = nix::unistd::mkdtemp(&folder.join("drover-dev-XXXXXX"))
            .map_err(|e| Failure::Answered(format!("no folder can be made in {}: {e}", folder.display())))?;
        let made = Self::make_in(scratch.clone(), data);
        if made.is_err() {
            // Made a moment ago and all but empty.
            let _ = fs::remove_dir_all(scratch);
        }
        made
    }

    fn make_in(scratch: PathBuf, given: Option<&Path>) -> Result<Self, Failure> {
        let data = given.map_or_else(|| scratch.join("data"), Path::to_owned);
        let failed = |e: &dyn std::fmt::Display| Failure::Input(format!("data folder {}: {e}", data.display()));
        fs::create_dir_all(&data).map_err(|e| failed(&e))?;
        // Children run with paths from here; a relative one would depend on their folder.
        let data = data.canonicalize().map_err(|e| failed(&e))?;
        for folder in ["logs", "config", "models", "ready"] {
            fs::create_dir_all(data.join(folder)).map_err(|e| failed(&e))?;
        }
        fs::create_dir_all(scratch.join("run")).map_err(|e| failed(&e))?;
        let lock = File::options().create(true).append(true).open(data.join("lock")).map_err(|e| failed(&e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(failed(&"another `drover dev` uses it")),
            Err(TryLockError::Error(e)) => return Err(failed(&e)),
        }
        Ok(Self { scratch, data, given: given.is_some(), _lock: lock })
    }

    /// Log file of a program.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.data.join("logs").join(format!("{name}.log"))
    }

    /// Folder for the sockets of a node.
    #[must_use]
    pub fn runtime(&self, node: &str) -> PathBuf {
        self.scratch.join("run").join(node)
    }

    /// Ready file of a program; one that an earlier fleet left is removed.
    pub fn ready_file(&self, name: &str) -> PathBuf {
        let path = self.data.join("ready").join(format!("{name}.json"));
        // It is not there the first time.
        let _ = fs::remove_file(&path);
        path
    }

    /// Writes a program's configuration file.
    pub fn config(&self, name: &str, text: &str) -> Result<PathBuf, Failure> {
        let path = self.data.join("config").join(format!("{name}.toml"));
        let written = File::create(&path).and_then(|mut file| file.write_all(text.as_bytes()));
        written.map_err(|e| Failure::Answered(format!("{}: {e}", path.display())))?;
        Ok(path)
    }

    /// Programs of this fleet that still run, by what their command lines say: pid and command line.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        const OURS: [&str; 5] = ["etcd", "drover-coordinator", "drover-agent", "drover-shim", "llama-server"];
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(pid) = name.to_str().filter(|n| n.bytes().all(|b| b.is_ascii_digit())) else { continue };
            let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words);
            let mut words = words.split('\0');
            let program = words.next().and_then(|w| w.rsplit('/').next()).unwrap_or_default().to_owned();
            let below = [&self.scratch, &self.data].map(|p| p.display().to_string());
            if OURS.contains(&program.as_str()) && words.any(|w| below.iter().any(|b| w.contains(b.as_str()))) {
                found.push(format!("{program} (pid {pid})"));
            }
        }
        found.sort_unstable();
        found
    }

    /// Removes what this fleet alone used: all of the temporary folder, or, when the data are kept, its sockets.
    /// Returns the folder that is left, if any.
    pub fn remove(&self, keep: bool) -> std::io::Result<Option<&Path>> {
        let left = keep && !self.given;
        fs::remove_dir_all(if left { self.scratch.join("run") } else { self.scratch.clone() })?;
        Ok((keep || self.given).then_some(self.data.as_path()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_folder_goes_and_a_given_one_stays() {
        let place = Place::make(None).unwrap();
        // Behind it stand '/', an instance's id of up to 55 bytes and ".sock": a socket's path has 107 bytes at most.
        assert!(place.runtime("node-1").as_os_str().len() <= 46, "{:?}", place.runtime("node-1"));
        let scratch = place.scratch.clone();
        assert_eq!(place.remove(false).unwrap(), None);
        assert!(!scratch.exists());

        let dir = tempfile::tempdir().unwrap();
        let place = Place::make(Some(&dir.path().join("fleet"))).unwrap();
        assert!(place.remove(false).unwrap().is_some_and(Path::is_dir));
        assert!(!place.scratch.exists());

        let place = Place::make(None).unwrap();
        assert_eq!(place.remove(true).unwrap(), Some(place.data.as_path()));
        assert!(place.data.is_dir() && !place.scratch.join("run").exists());
        fs::remove_dir_all(&place.scratch).unwrap();
    }

    #[test]
    fn a_folder_serves_one_fleet_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = Place::make(Some(dir.path())).unwrap();
        let failure = Place::make(Some(dir.path())).unwrap_err();
        assert!(failure.message().unwrap().contains("another `drover dev` uses it"), "{failure:?}");
        first.remove(false).unwrap();
        drop(first);
        Place::make(Some(dir.path())).unwrap().remove(false).unwrap();
    }

    #[test]
    fn what_runs_with_a_path_of_the_fleet_is_found() {
        use std::os::unix::process::CommandExt as _;
        let place = Place::make(None).unwrap();
        #[allow(clippy::disallowed_methods, reason = "a test")]
        let mut command = std::process::Command::new("/bin/sh");
        command.arg0("llama-server").args(["-c", "read line"]).arg(place.runtime("node-1"));
        let mut child = command.stdin(std::process::Stdio::piped()).spawn().unwrap();
        // A process has its command line a moment after its start.
        let began = tokio::time::Instant::now();
        while place.leftovers().is_empty() && began.elapsed().as_secs() < 10 {
            std::thread::yield_now();
        }
        assert_eq!(place.leftovers(), [format!("llama-server (pid {})", child.id())]);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(place.leftovers(), Vec::<String>::new());
        place.remove(false).unwrap();
    }
}
