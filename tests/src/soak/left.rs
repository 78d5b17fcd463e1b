//! What a fleet has in its store, on disk and in memory: at first, and when all churn is over.

use drover_tests::{
    cluster::Cluster,
    measure::{self, Kind},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// Growth of a folder that is no leftover, in bytes: small files are rewritten.
const SLACK_BYTES: u64 = 64 << 10;
/// The same for each program with a spool: its last segment is freed as a whole, at 4 MiB.
const SLACK_SPOOL_BYTES: u64 = 5 << 20;
const STATE: &str = "state of the agents";
const SPOOLS: &str = "spools";

/// A look at a fleet.
#[derive(Debug, Clone)]
pub struct Left {
    /// Keys of the store.
    pub keys: usize,
    /// What they are about: "instances/<id>", "runs/<id>", "events/instance/<id>".
    objects: BTreeSet<String>,
    /// Processes, by kind.
    processes: BTreeMap<Kind, usize>,
    /// Files and bytes by what they are for; logs are left out, which are bounded and belong to servers that run.
    pub folders: BTreeMap<&'static str, Folder>,
    /// Programs that have a spool.
    spools: u64,
    /// Size of etcd's database, in bytes; it keeps the history, so this is for information.
    pub etcd_bytes: u64,
}

/// What is in a folder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Folder {
    /// Files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Folder {
    fn add(&mut self, other: Self) {
        self.files += other.files;
        self.bytes += other.bytes;
    }
}

impl Left {
    /// Now.
    pub fn of(cluster: &Cluster) -> anyhow::Result<Self> {
        let keys = cluster.etcd.keys()?;
        let mut processes = BTreeMap::new();
        for program in measure::programs(cluster) {
            *processes.entry(program.kind).or_default() += 1;
        }
        // Of all agents together: an instance may have moved from one to the other.
        let agents = cluster.agents.iter().map(|agent| cluster.folder().join(format!("agent-{}", agent.node)));
        let coordinators = (0..cluster.coordinators.len()).map(|n| cluster.folder().join(format!("coordinator-{n}")));
        let (mut state, mut spools) = (Folder::default(), Folder::default());
        for place in agents.clone() {
            let log = |path: &Path| path.ends_with("log") || path.extension().is_some_and(|end| end == "log");
            state.add(folder(&place, &|path| !path.ends_with("spool") && !log(path)));
        }
        let spool = agents.map(|place| place.join("spool")).chain(coordinators.map(|place| place.join("spans")));
        let spool: Vec<_> = spool.collect();
        spool.iter().for_each(|place| spools.add(folder(place, &|_| true)));
        Ok(Self {
            keys: keys.len(),
            objects: keys.iter().map(|key| object(key)).collect(),
            processes,
            folders: BTreeMap::from([(STATE, state), (SPOOLS, spools)]),
            spools: spool.len() as u64,
            etcd_bytes: folder(&cluster.etcd.folder().join("data/member/snap"), &|_| true).bytes,
        })
    }

    /// What there is now that was not there before.
    pub fn beyond(&self, base: &Self) -> Vec<String> {
        // The fleet's own ring begins with the first event about something that is gone.
        let new = self.objects.difference(&base.objects).filter(|object| *object != "events/fleet");
        let mut beyond: Vec<String> = new.map(|object| format!("keys of {object} in the store")).collect();
        for (kind, number) in &self.processes {
            let before = base.processes.get(kind).copied().unwrap_or(0);
            if *number > before {
                beyond.push(format!("{number} processes of the kind {kind:?}, {before} before").to_lowercase());
            }
        }
        for (name, now) in &self.folders {
            let before = base.folders.get(name).copied().unwrap_or_default();
            let spool = *name == SPOOLS;
            let slack = if spool { self.spools * SLACK_SPOOL_BYTES } else { SLACK_BYTES };
            if now.bytes > before.bytes + slack || (!spool && now.files > before.files) {
                let (files, bytes) = (now.files, now.bytes);
                beyond.push(format!(
                    "{name}: {files} files of {bytes} bytes, before {} of {}",
                    before.files, before.bytes
                ));
            }
        }
        beyond
    }
}

/// What is there once nothing is beyond the base any more; or when that has taken too long.
pub async fn settled(cluster: &Cluster, base: &Left, within: Duration) -> anyhow::Result<Left> {
    let deadline = Instant::now() + within;
    loop {
        let now = Left::of(cluster)?;
        if now.beyond(base).is_empty() || Instant::now() >= deadline {
            return Ok(now);
        }
        sleep(Duration::from_secs(1)).await;
    }
}

/// All keys below /drover/.
/// What a key is about: without the slot of a ring, the token of a run, the number of a revision.
fn object(key: &str) -> String {
    match key.split_once('/') {
        Some(("events" | "runs" | "revisions" | "commands" | "answers", _)) => {
            key.rsplit_once('/').map_or(key, |(object, _)| object).to_owned()
        }
        _ => key.to_owned(),
    }
}

/// Files below a folder, but for entries that are to be left out.
fn folder(place: &Path, counts: &impl Fn(&Path) -> bool) -> Folder {
    let mut sum = Folder::default();
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        let path = entry.path();
        // What goes while it is looked at is not there.
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if !counts(&path) {
            continue;
        }
        if metadata.is_dir() {
            sum.add(folder(&path, counts));
        } else {
            sum.add(Folder { files: 1, bytes: metadata.len() });
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(keys: &[&str], bytes: u64) -> Left {
        Left {
            keys: keys.len(),
            objects: keys.iter().map(|key| object(key)).collect(),
            processes: BTreeMap::from([(Kind::Shim, 4)]),
            folders: BTreeMap::from([(STATE, Folder { files: 3, bytes })]),
            spools: 4,
            etcd_bytes: 0,
        }
    }

    #[test]
    fn what_is_new_is_named_and_what_moved_in_its_place_is_not() {
        let base = look(&["schema", "runs/hi-2/1.5", "events/node/a/0001"], 1000);
        let moved =
            look(&["schema", "runs/hi-2/1.9", "events/node/a/0002", "events/node/a/0003", "events/fleet/0000"], 1900);
        assert_eq!(moved.beyond(&base), Vec::<String>::new());
        let mut left = look(&["schema", "runs/ho-2/1.9", "taken/ho-2"], 1000 + (1 << 20));
        left.processes.insert(Kind::Server, 1);
        let beyond = left.beyond(&base);
        assert_eq!(beyond[..2], ["keys of runs/ho-2 in the store", "keys of taken/ho-2 in the store"]);
        assert!(beyond[2].contains("1 processes of the kind server, 0 before"), "{beyond:?}");
        assert!(beyond[3].contains("3 files of 1049576 bytes, before 3 of 1000") && beyond.len() == 4, "{beyond:?}");
    }
}
