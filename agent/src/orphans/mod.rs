//! llama-servers of the host that no instance accounts for: found, counted, and ended where that is right.
//!
//! Owns: the look at the host from time to time, what foreign processes take of the node's memory, and the end of this
//! agent's own stale ones. Must never: touch a process whose identity or owner can't be told, or a foreign one unasked.

pub mod commands;
mod end;
mod owner;

use crate::{
    clock,
    host::{
        gpus::{self, ByProcess, Gpus},
        scan::{self, Seen},
    },
    instance::{claim, registry::Registry},
};
use drover_proto::v1::{Capacity, HostProcess, ProcessOwner, Severity, Token};
use drover_shim::record::{Directory, Record};
use owner::{Kept, Own};
use prost::Message as _;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How often the host is looked at.
const INTERVAL: Duration = Duration::from_secs(5);
/// What is taken off the node's memory is rounded up to this, so that small changes are not told.
const STEP_BYTES: i64 = 64 << 20;
/// Most processes that are told, and most bytes that they may take: an answer has to fit into the store.
const PROCESSES_MAX: usize = 256;
const TOLD_BYTES_MAX: usize = 768 << 10;
/// Most characters of a path or a name that is told.
const TEXT_MAX: usize = 1024;

/// A process with its owner.
#[derive(Debug, Clone)]
pub(crate) struct Process {
    pub(crate) seen: Seen,
    pub(crate) told: HostProcess,
}

/// Looks at the host's llama-servers.
#[derive(Debug)]
pub struct Orphans {
    registry: Arc<Registry>,
    capacity: watch::Receiver<Capacity>,
    gpus: Gpus,
}

impl Orphans {
    /// Looks once, so that the capacity is right from the beginning, and then from time to time until `stop`. `whole` is
    /// what the node has to give when nothing else runs there.
    pub async fn start(registry: Arc<Registry>, whole: Capacity, stop: CancellationToken) -> Self {
        let told = watch::Sender::new(whole);
        let orphans = Self { registry: registry.clone(), capacity: told.subscribe(), gpus: Gpus::default() };
        let mut watcher = Watcher { registry, told, stale: BTreeSet::new(), left_out: 0 };
        watcher.look().await;
        tokio::spawn(stop.run_until_cancelled_owned(async move {
            loop {
                tokio::time::sleep(INTERVAL).await;
                watcher.look().await;
            }
        }));
        orphans
    }

    /// What the node has to give now.
    #[must_use]
    pub fn capacity(&self) -> watch::Receiver<Capacity> {
        self.capacity.clone()
    }

    /// The host's llama-servers now, by pid: all of them.
    pub(crate) async fn processes(&self) -> io::Result<Vec<Process>> {
        processes(&self.registry).await
    }

    /// Has an instance's supervisor end it at once; false when it has none that hears.
    pub(crate) fn force(&self, instance: &str) -> bool {
        self.registry.force(instance)
    }

    /// What of them is told: those of this pid (0 for any), with their GPU memory, and how many are left out.
    pub(crate) async fn told(&self, pid: i64) -> io::Result<(Vec<HostProcess>, usize)> {
        let (all, held) = tokio::join!(self.processes(), self.gpus.by_process());
        let wanted = all?.into_iter().filter(|process| pid == 0 || process.told.pid == pid);
        Ok(cut(wanted.map(|process| with_gpu(process, held.as_ref())).collect()))
    }

    /// Boot that this is.
    pub(crate) fn boot_id(&self) -> &str {
        &self.registry.context().boot_id
    }
}

struct Watcher {
    registry: Arc<Registry>,
    told: watch::Sender<Capacity>,
    /// What was stale at the last look: pid and start time.
    stale: BTreeSet<(i32, u64)>,
    /// How many processes a list would leave out, as the log said last.
    left_out: usize,
}

impl Watcher {
    async fn look(&mut self) {
        let context = self.registry.context().clone();
        let all = match processes(&self.registry).await {
            Ok(all) => all,
            Err(error) => {
                tracing::warn!(%error, "the host's processes can't be listed: what else runs here is not known");
                return;
            }
        };
        let left_out = all.len().saturating_sub(PROCESSES_MAX);
        if left_out != std::mem::replace(&mut self.left_out, left_out) && left_out > 0 {
            tracing::warn!(
                "{} llama-servers run here; lists show {PROCESSES_MAX}, {left_out} more are not listed",
                all.len()
            );
        }
        let taken = taken_bytes(&all);
        context.taken_bytes.store(taken, Ordering::Relaxed);
        let memory_bytes = context.memory_bytes();
        self.told.send_if_modified(|capacity| {
            let before = std::mem::replace(&mut capacity.memory_bytes, memory_bytes);
            before != memory_bytes
        });
        // What is stale twice in a row is no instance that was just being started or stopped.
        let stale: Vec<&Process> = all.iter().filter(|p| p.told.owner() == ProcessOwner::Stale).collect();
        let again = stale.iter().filter(|p| self.stale.contains(&(p.seen.pid, p.seen.start_ticks)));
        let ends = again.map(|process| async {
            let (ended, how) = end::end(&process.seen, &context.boot_id, end::Patience::stale()).await;
            let severity = if ended.is_over() { Severity::Info } else { Severity::Warning };
            let (pid, why) = (process.seen.pid, &process.told.message);
            let what = format!("pid {pid} was started by this agent and nothing wants it any more ({why}): {how}");
            context.events.tell("", "StaleProcess", severity, what);
        });
        futures::future::join_all(ends).await;
        self.stale = stale.iter().map(|p| (p.seen.pid, p.seen.start_ticks)).collect();
    }
}

/// Those that fit into an answer, by pid, and how many do not. What no instance accounts for is what lists are for: it comes
/// before what is owned.
fn cut(mut all: Vec<HostProcess>) -> (Vec<HostProcess>, usize) {
    let count = all.len();
    all.sort_by_key(|process| (process.owner() == ProcessOwner::Owned, process.pid));
    let mut bytes = 0_usize;
    all.truncate(PROCESSES_MAX);
    all.retain(|process| {
        bytes += process.encoded_len();
        bytes <= TOLD_BYTES_MAX
    });
    all.sort_by_key(|process| process.pid);
    let left_out = count - all.len();
    (all, left_out)
}

fn with_gpu(process: Process, held: Option<&ByProcess>) -> HostProcess {
    let bytes = gpus::bytes_of(process.seen.pid, held);
    HostProcess { gpu_memory_known: bytes.is_some(), gpu_memory_bytes: bytes.unwrap_or(0), ..process.told }
}

fn taken_bytes(all: &[Process]) -> i64 {
    let takes = all.iter().filter(|process| owner::takes(process.told.owner()));
    let bytes = takes.fold(0_i64, |sum, process| sum.saturating_add(process.told.rss_bytes));
    bytes.saturating_add(STEP_BYTES - 1) / STEP_BYTES * STEP_BYTES
}

/// The processes first, the records after: what was started in between is not among the processes.
async fn processes(registry: &Arc<Registry>) -> io::Result<Vec<Process>> {
    let (settings, boot_id) = (registry.context().settings.clone(), registry.context().boot_id.clone());
    let server = settings.llama_server.clone();
    let seen = blocking(move || {
        let server = fs::canonicalize(&server).unwrap_or(server);
        scan::llama_servers(Path::new("/proc"), &server)
    });
    let seen = seen.await?;
    let runs = registry.recorded_runs();
    let known: BTreeMap<String, Option<Token>> = runs.into_iter().map(|run| (run.instance, run.token)).collect();
    let own = blocking(move || Ok(own(&settings, boot_id, &known))).await?;
    let now = clock::boottime();
    Ok(seen.into_iter().map(|seen| tell(seen, &own, now)).collect())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// What this agent has: what it knows, and what lies on disk.
fn own(settings: &crate::config::Settings, boot_id: String, known: &BTreeMap<String, Option<Token>>) -> Own {
    let entries = fs::read_dir(settings.instances_dir()).into_iter().flatten().flatten();
    let on_disk = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let names: BTreeSet<String> = on_disk.chain(known.keys().cloned()).collect();
    let mut own = Own { runtime_dir: settings.runtime_dir.clone(), boot_id, ..Own::default() };
    for instance in names {
        let record: Option<Record> =
            drover_shim::record::read(&Directory::new(settings.instances_dir().join(&instance)).record()).ok();
        let kept = Kept {
            token: record.as_ref().map(|r| claim::token(r.token)),
            process: record.map(|r| r.process),
            known: known.contains_key(&instance),
        };
        own.sockets.insert(settings.socket_of(&instance), instance.clone());
        own.instances.insert(instance, kept);
    }
    own
}

fn tell(seen: Seen, own: &Own, now: Duration) -> Process {
    let belongs = owner::of(&seen, own);
    let told = HostProcess {
        // The coordinator knows whom it asks.
        node: String::new(),
        pid: i64::from(seen.pid),
        start_ticks: seen.start_ticks,
        owner: belongs.owner.into(),
        instance: belongs.instance,
        token: belongs.token,
        command_line: seen.command_line(),
        executable: seen.executable.as_ref().map(|path| shown(&path.display().to_string())).unwrap_or_default(),
        model_path: shown(seen.model_path().unwrap_or_default()),
        model_alias: shown(seen.alias().unwrap_or_default()),
        rss_bytes: seen.rss_bytes,
        // Asked for where it is told.
        gpu_memory_bytes: 0,
        gpu_memory_known: false,
        age_ms: age_ms(seen.start_ticks, now),
        message: belongs.message,
    };
    Process { seen, told }
}

fn shown(text: &str) -> String {
    text.chars().take(TEXT_MAX).collect()
}

fn age_ms(start_ticks: u64, now: Duration) -> i64 {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten();
    let ticks = ticks.and_then(|t| u64::try_from(t).ok()).filter(|t| *t > 0).unwrap_or(100);
    let started = Duration::from_millis(start_ticks.saturating_mul(1000) / ticks);
    i64::try_from(now.saturating_sub(started).as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(owner: ProcessOwner, rss_bytes: i64) -> Process {
        let seen = Seen {
            pid: 1,
            start_ticks: 1,
            executable: None,
            arguments: vec![],
            rss_bytes,
            kept_by_shim: false,
            unreadable: None,
        };
        Process { seen, told: HostProcess { owner: owner.into(), rss_bytes, ..HostProcess::default() } }
    }

    #[test]
    fn what_is_taken_is_rounded_up_and_owned_ones_take_nothing() {
        assert_eq!(taken_bytes(&[process(ProcessOwner::Owned, 1 << 40)]), 0);
        assert_eq!(taken_bytes(&[process(ProcessOwner::Foreign, 1)]), STEP_BYTES);
        let both = [process(ProcessOwner::Foreign, STEP_BYTES), process(ProcessOwner::Stale, 1)];
        assert_eq!(taken_bytes(&both), 2 * STEP_BYTES);
        assert!(taken_bytes(&[process(ProcessOwner::Foreign, i64::MAX)]) > 0);
    }

    fn told(pid: i64, owner: ProcessOwner, text: usize) -> HostProcess {
        HostProcess { pid, owner: owner.into(), command_line: "x".repeat(text), ..HostProcess::default() }
    }

    #[test]
    fn what_does_not_fit_is_counted_and_owned_ones_are_left_out_first() {
        let owned = (1..=300).map(|pid| told(pid, ProcessOwner::Owned, 10));
        let all: Vec<_> =
            owned.chain([told(9000, ProcessOwner::Foreign, 10), told(8000, ProcessOwner::Stale, 10)]).collect();
        let (listed, left_out) = cut(all);
        assert_eq!((listed.len(), left_out), (PROCESSES_MAX, 46));
        assert_eq!(listed.iter().map(|p| p.pid).rev().take(3).collect::<Vec<_>>(), [9000, 8000, 254]);
        let (listed, left_out) = cut((1..=256).map(|pid| told(pid, ProcessOwner::Foreign, 4 * TEXT_MAX)).collect());
        let bytes: usize = listed.iter().map(|p| p.encoded_len()).sum();
        assert!(left_out > 0 && listed.len() + left_out == 256 && bytes <= TOLD_BYTES_MAX, "{left_out} {bytes}");
        assert_eq!(cut(vec![]), (vec![], 0));
    }

    #[test]
    fn gpu_memory_is_told_from_none_and_from_not_known() {
        let held = ByProcess::from([(1, Some(5)), (2, None)]);
        let of = |pid, held| {
            let process = process(ProcessOwner::Foreign, 0);
            let told = with_gpu(Process { seen: Seen { pid, ..process.seen }, told: process.told }, held);
            (told.gpu_memory_known, told.gpu_memory_bytes)
        };
        assert_eq!([of(1, Some(&held)), of(2, Some(&held)), of(3, Some(&held))], [(true, 5), (false, 0), (true, 0)]);
        assert_eq!(of(1, None), (false, 0));
    }
}
