//! What our programs use, as /proc tells: memory, processor time, descriptors, threads.

use crate::cluster::Cluster;
use anyhow::{Context as _, ensure};
use std::{fmt, fs, path::Path, time::Duration};

/// What a program is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// An agent.
    Agent,
    /// A host's proxy.
    Proxy,
    /// A shim.
    Shim,
    /// A coordinator.
    Coordinator,
    /// The store.
    Etcd,
    /// A llama-server.
    Server,
}

/// A living process of a fleet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Program {
    /// What it is.
    pub kind: Kind,
    /// Which one: a node, an instance, "coordinator-0".
    pub name: String,
    /// Process id.
    pub pid: u32,
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Agent => write!(f, "agent {}", self.name),
            Kind::Proxy => write!(f, "proxy {}", self.name),
            Kind::Shim => write!(f, "shim {}", self.name),
            Kind::Server => write!(f, "server {}", self.name),
            Kind::Coordinator | Kind::Etcd => f.write_str(&self.name),
        }
    }
}

/// The processes of a fleet, in the order of their kinds.
#[must_use]
pub fn programs(cluster: &Cluster) -> Vec<Program> {
    programs_of(cluster.folder(), cluster.etcd.pid())
}

/// As [`programs`], for whoever has no hold of the fleet itself.
#[must_use]
pub fn programs_of(folder: &Path, etcd: Option<u32>) -> Vec<Program> {
    let etcd = etcd.map(|pid| Program { kind: Kind::Etcd, name: "etcd".to_owned(), pid });
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let found = entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let words: Vec<_> = line.split(|b| *b == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let (kind, name) = kind_of(folder, &words)?;
        Some(Program { kind, name, pid })
    });
    let mut all: Vec<Program> = found.chain(etcd).collect();
    all.sort();
    all
}

/// What a command line is, if it is one of a fleet's.
fn kind_of(folder: &Path, words: &[String]) -> Option<(Kind, String)> {
    let program = Path::new(words.first()?).file_name()?.to_str()?;
    let after = |flag: &str| words.iter().skip_while(|word| *word != flag).nth(1).map(Path::new);
    let ours = |path: &Path| path.starts_with(folder);
    let stem = |path: &Path| path.file_stem().map(|name| name.to_string_lossy().into_owned());
    let node = |path: &Path| stem(path)?.strip_prefix("agent-").map(str::to_owned);
    match program {
        "drover-agent" if words.get(1).is_some_and(|word| word == "proxy") => {
            Some((Kind::Proxy, after("--state-dir").filter(|p| ours(p)).and_then(node)?))
        }
        "drover-agent" => Some((Kind::Agent, after("--config").filter(|p| ours(p)).and_then(node)?)),
        "drover-coordinator" => Some((Kind::Coordinator, after("--config").filter(|p| ours(p)).and_then(stem)?)),
        "drover-shim" => Some((Kind::Shim, words.get(1).map(Path::new).filter(|p| ours(p)).and_then(stem)?)),
        "llama-server" => Some((Kind::Server, after("--host").filter(|p| ours(p)).and_then(stem)?)),
        _ => None,
    }
}

/// What a process uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Resident memory, in KiB.
    pub rss_kb: u64,
    /// Memory that no other process shares (Private_Clean and Private_Dirty), in KiB.
    pub private_kb: u64,
    /// Processor time since it began, to a hundredth of a second.
    pub cpu: Duration,
    /// Open descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
    /// When it began, in clock ticks since boot: with the pid it names a process.
    pub start_ticks: u64,
}

impl Usage {
    /// Of a living process.
    ///
    /// # Errors
    /// When it has ended.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let place = Path::new("/proc").join(pid.to_string());
        let rollup = fs::read_to_string(place.join("smaps_rollup"))?;
        let stat = fs::read_to_string(place.join("stat"))?;
        let descriptors = fs::read_dir(place.join("fd"))?.count() as u64;
        let (cpu, threads, start_ticks) = stat_of(&stat).context("/proc/<pid>/stat")?;
        let kb = |name: &str| kb_of(&rollup, name).with_context(|| format!("{name} in smaps_rollup"));
        let private_kb = kb("Private_Clean")? + kb("Private_Dirty")?;
        // One that is about to be collected has a stat, and no memory.
        ensure!(kb("Rss")? > 0, "pid {pid} has ended");
        Ok(Self { rss_kb: kb("Rss")?, private_kb, cpu, descriptors, threads, start_ticks })
    }
}

/// When a process began, in clock ticks since boot; `None` when there is none.
#[must_use]
pub fn start_ticks(pid: u32) -> Option<u64> {
    Some(stat_of(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?.2)
}

fn kb_of(rollup: &str, name: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// Processor time, threads and start time; the fields are numbered as in proc(5), from 1.
fn stat_of(stat: &str) -> Option<(Duration, u64, u64)> {
    // The name stands in parentheses and may hold anything; the third field follows.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split_ascii_whitespace().collect();
    let field = |n: usize| fields.get(n - 3)?.parse::<u64>().ok();
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    let ticks = ticks.and_then(|t| u64::try_from(t).ok()).filter(|t| *t > 0).unwrap_or(100);
    let cpu = Duration::from_millis((field(14)? + field(15)?) * 1000 / ticks);
    Some((cpu, field(20)?, field(22)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_of_a_fleet_are_told_apart_by_their_command_lines() {
        let folder = Path::new("/tmp/drv-1");
        let of = |line: &str| kind_of(folder, &line.split(' ').map(str::to_owned).collect::<Vec<_>>());
        let is = |kind, name: &str| Some((kind, name.to_owned()));
        assert_eq!(of("/x/drover-agent run --config /tmp/drv-1/agent-a.toml"), is(Kind::Agent, "a"));
        assert_eq!(of("/x/drover-agent proxy --state-dir /tmp/drv-1/agent-b"), is(Kind::Proxy, "b"));
        assert_eq!(of("/x/drover-shim /tmp/drv-1/agent-a/instances/hi-234567"), is(Kind::Shim, "hi-234567"));
        assert_eq!(of("llama-server --host /tmp/drv-1/agent-a/run/hi-2.sock"), is(Kind::Server, "hi-2"));
        assert_eq!(
            of("drover-coordinator --config /tmp/drv-1/coordinator-0.toml"),
            is(Kind::Coordinator, "coordinator-0")
        );
        for other in ["/x/drover-agent run --config /tmp/drv-12/agent-a.toml", "drover-agent down", "bash", ""] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn a_process_tells_what_it_uses() {
        let me = std::process::id();
        let before = Usage::of(me).unwrap();
        let (mut ballast, _file) = (vec![0_u8; 8 << 20], fs::File::open("/proc/self/stat").unwrap());
        ballast.iter_mut().step_by(512).for_each(|byte| *byte = 1);
        let after = Usage::of(me).unwrap();
        assert!(after.private_kb >= before.private_kb + (7 << 10), "{before:?}, {after:?}");
        assert!(after.rss_kb >= after.private_kb && after.threads >= 1 && after.cpu >= before.cpu);
        assert_eq!(after.start_ticks, before.start_ticks);
        assert_eq!(ballast[0], 1);
    }

    #[test]
    fn a_name_in_parentheses_moves_no_field() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 0 0 0 0 0 250 50 0 0 20 0 9 0 4242 0 0";
        assert_eq!(stat_of(stat), Some((Duration::from_secs(3), 9, 4242)));
    }
}
