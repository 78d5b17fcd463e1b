//! llama-servers of the host that no instance accounts for: found, counted, and ended where that is right.
//!
//! Owns: the look at the host from time to time, what foreign processes take of the node's memory, and the end of this
//! agent's own stale ones. Must never: touch a process whose identity or owner can't be told, or a foreign one unasked.

pub mod commands;
mod end;
mod owner;

use crate::{
    clock,
    host::scan::{self, Seen},
    instance::{claim, registry::Registry},
};
use drover_proto::v1::{Capacity, HostProcess, ProcessOwner, Severity, Token};
use drover_shim::record::{Directory, Record};
use owner::{Kept, Own};
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
/// Most processes that are told.
const PROCESSES_MAX: usize = 256;

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
}

impl Orphans {
    /// Looks once, so that the capacity is right from the beginning, and then from time to time until `stop`. `whole` is
    /// what the node has to give when nothing else runs there.
    pub async fn start(registry: Arc<Registry>, whole: Capacity, stop: CancellationToken) -> Self {
        let told = watch::Sender::new(whole);
        let orphans = Self { registry: registry.clone(), capacity: told.subscribe() };
        let mut watcher = Watcher { registry, told, stale: BTreeSet::new() };
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

    /// The host's llama-servers now, by pid.
    pub(crate) async fn processes(&self) -> io::Result<Vec<Process>> {
        processes(&self.registry).await
    }

    /// Has an instance's supervisor end it at once; false when it has none that hears.
    pub(crate) fn force(&self, instance: &str) -> bool {
        self.registry.force(instance)
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

fn taken_bytes(all: &[Process]) -> i64 {
    let takes = all.iter().filter(|process| owner::takes(process.told.owner()));
    let bytes = takes.fold(0_i64, |sum, process| sum.saturating_add(process.told.rss_bytes));
    bytes.saturating_add(STEP_BYTES - 1) / STEP_BYTES * STEP_BYTES
}

/// The processes first, the records after: what was started in between is not among the processes.
async fn processes(registry: &Arc<Registry>) -> io::Result<Vec<Process>> {
    let settings = registry.context().settings.clone();
    let server = settings.llama_server.clone();
    let seen = blocking(move || {
        let server = fs::canonicalize(&server).unwrap_or(server);
        scan::llama_servers(Path::new("/proc"), &server)
    });
    let seen = seen.await?;
    let runs = registry.recorded_runs();
    let known: BTreeMap<String, Option<Token>> = runs.into_iter().map(|run| (run.instance, run.token)).collect();
    let own = blocking(move || Ok(own(&settings, &known))).await?;
    let now = clock::boottime();
    Ok(seen.into_iter().take(PROCESSES_MAX).map(|seen| tell(seen, &own, now)).collect())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// What this agent has: what it knows, and what lies on disk.
fn own(settings: &crate::config::Settings, known: &BTreeMap<String, Option<Token>>) -> Own {
    let entries = fs::read_dir(settings.instances_dir()).into_iter().flatten().flatten();
    let on_disk = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let names: BTreeSet<String> = on_disk.chain(known.keys().cloned()).collect();
    let mut own = Own { runtime_dir: settings.runtime_dir.clone(), ..Own::default() };
    for instance in names {
        let record: Option<Record> =
            drover_shim::record::read(&Directory::new(settings.instances_dir().join(&instance)).record()).ok();
        let kept = Kept {
            process: record.as_ref().map(|r| (r.process.pid, r.process.start_ticks)),
            token: record.as_ref().map(|r| claim::token(r.token)),
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
        executable: seen.executable.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
        model_path: seen.model_path().unwrap_or_default().to_owned(),
        rss_bytes: seen.rss_bytes,
        gpu_memory_bytes: 0,
        age_ms: age_ms(seen.start_ticks, now),
        message: belongs.message,
    };
    Process { seen, told }
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
}
