//! The world of a run: its clock, its processes, what is known of everything, and the judge.
//!
//! A [`Sim`] is shared by all parts. A process is one life of a program; to kill it drops its tasks where they wait, and to
//! pause it holds them back while time goes on.

use crate::{chance::Chance, host::Host, network::Network, trace::Trace};
use drover_coordinator::{
    invariants::{self, Checker},
    store::{Backend as _, memory::Memory},
};
use drover_proto::world::simulated::{self, Process, Turn};
use std::{
    collections::BTreeMap,
    fmt,
    rc::Rc,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::Duration,
};
use tokio::time::Instant;

/// The wall clock at the begin of a run, in milliseconds since the epoch.
pub const EPOCH_MS: i64 = 1_700_000_000_000;
/// How long hosts are up at the begin of a run: a deadline of 0 has passed.
const UP_MS: u64 = 3_600_000;

/// What a run is shared by.
pub struct Sim {
    begun: Instant,
    pub store: Memory,
    pub network: Mutex<Network>,
    pub hosts: Vec<Arc<Host>>,
    pub settings: Settings,
    trace: Mutex<Trace>,
    chance: Mutex<Chance>,
    processes: Mutex<Vec<State>>,
    judge: Mutex<Judge>,
}

/// What is the same for a whole run.
#[derive(Debug, Clone)]
pub struct Settings {
    pub seed: u64,
    pub coordinators: usize,
    pub ttl_ms: u64,
    pub offer_deadline_ms: i64,
    pub candidates: usize,
    /// Of a thousand calls of the store so many are answered late, or never, while faults are on.
    pub late_commits: u64,
    /// Of a thousand claims so many are lost, doubled or linger, while faults are on.
    pub bad_calls: u64,
    /// Of a thousand steps of a shim so many take long.
    pub slow_shims: u64,
    /// Heartbeats go over streams of their own; else over those of sessions, as with older coordinators.
    pub beats_apart: bool,
    /// Chance moves the turns of tasks.
    pub shuffle: bool,
}

#[derive(Debug)]
struct Judge {
    checker: Checker,
    /// Revision up to which the history was judged.
    judged: i64,
}

#[derive(Debug)]
struct State {
    name: String,
    life: Life,
    chance: Chance,
    tasks: BTreeMap<u64, Waker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Alive,
    Paused,
    Dead,
}

impl fmt::Debug for Sim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sim").finish_non_exhaustive()
    }
}

/// Nothing panics while it holds one of these locks but by a defect of the simulation itself.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sim {
    pub fn new(settings: Settings, hosts: Vec<Arc<Host>>, trace: Trace) -> Self {
        let checker = Checker::new(invariants::Settings {
            grace_ms: i64::try_from(settings.ttl_ms).unwrap_or(i64::MAX),
            slack_ms: 1000,
            orders: true,
        });
        Self {
            begun: Instant::now(),
            store: Memory::with_history(7, usize::MAX),
            network: Mutex::new(Network::new(settings.coordinators, hosts.len())),
            hosts,
            trace: Mutex::new(trace),
            chance: Mutex::new(Chance::new(settings.seed, "world")),
            processes: Mutex::default(),
            judge: Mutex::new(Judge { checker, judged: 1 }),
            settings,
        }
    }

    /// Milliseconds since the begin.
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn wall_ms(&self) -> i64 {
        EPOCH_MS + i64::try_from(self.now_ms()).unwrap_or(0)
    }

    /// Time since the boot of any host, in nanoseconds: they are all up as long.
    pub fn boottime_ns(&self) -> u64 {
        let up = Duration::from_millis(UP_MS) + self.begun.elapsed();
        u64::try_from(up.as_nanos()).unwrap_or(u64::MAX)
    }

    /// As the wall clock shows what is this long since boot, in milliseconds.
    fn wall_of_boot_ms(&self, boot_ns: u64) -> i64 {
        EPOCH_MS + i64::try_from(boot_ns / 1_000_000).unwrap_or(0) - i64::try_from(UP_MS).unwrap_or(0)
    }

    pub fn chance(&self) -> MutexGuard<'_, Chance> {
        lock(&self.chance)
    }

    pub fn trace(&self) -> MutexGuard<'_, Trace> {
        lock(&self.trace)
    }

    pub fn tell(&self, what: impl FnOnce() -> String) {
        let now = self.now_ms();
        lock(&self.trace).tell(now, what);
    }

    pub fn note(&self, what: &str, bytes: &[u8]) {
        let now = self.now_ms();
        lock(&self.trace).note(now, what, bytes);
    }

    /// A life of a program begins.
    pub fn process(&self, name: String) -> Process {
        let mut processes = lock(&self.processes);
        let number = u32::try_from(processes.len()).unwrap_or(u32::MAX);
        let chance = Chance::new(self.settings.seed, &format!("{name}#{number}"));
        processes.push(State { name, life: Life::Alive, chance, tasks: BTreeMap::new() });
        number
    }

    fn live(&self, process: Process, life: Life) {
        let wakers: Vec<Waker> = {
            let mut processes = lock(&self.processes);
            let Some(state) = processes.get_mut(index(process)) else { return };
            if state.life == Life::Dead || state.life == life {
                return;
            }
            state.life = life;
            state.tasks.values().cloned().collect()
        };
        self.tell(|| format!("{} is {life:?}", self.name_of(process)));
        wakers.into_iter().for_each(Waker::wake);
    }

    fn name_of(&self, process: Process) -> String {
        lock(&self.processes)
            .get(index(process))
            .map_or_else(String::new, |state| format!("{} (#{process})", state.name))
    }

    /// Ends it as kill -9 does.
    pub fn kill(&self, process: Process) {
        self.live(process, Life::Dead);
    }

    /// Stops it as SIGSTOP does.
    pub fn pause(&self, process: Process) {
        self.live(process, Life::Paused);
    }

    /// Lets it go on.
    pub fn resume(&self, process: Process) {
        self.live(process, Life::Alive);
    }

    pub fn is_dead(&self, process: Process) -> bool {
        lock(&self.processes).get(index(process)).is_none_or(|state| state.life == Life::Dead)
    }

    /// Judges the history so far, then asks or tells the checker.
    pub fn judge<T>(&self, with: impl FnOnce(&mut Checker, i64) -> T) -> T {
        let now = self.wall_ms();
        let mut judge = lock(&self.judge);
        while let Ok(Some(changes)) = self.store.changes(judge.judged + 1) {
            judge.judged = changes.revision;
            let text = changes
                .changes
                .iter()
                .map(|change| match change {
                    drover_coordinator::store::Change::Put(kv) => {
                        self.note(&kv.key, &kv.value);
                        format!("+{}", kv.key)
                    }
                    drover_coordinator::store::Change::Delete { key, .. } => format!("-{key}"),
                })
                .collect::<Vec<_>>()
                .join(" ");
            if !text.starts_with("+events/") {
                self.tell(|| format!("revision {}: {text}", changes.revision));
            }
            judge.checker.store(now, &changes);
        }
        with(&mut judge.checker, now)
    }

    /// The store was set back to a copy.
    pub async fn restored(&self) {
        // The twin refuses no reader.
        let Ok(listing) = self.store.list("").await else { return };
        let now = self.wall_ms();
        let mut judge = lock(&self.judge);
        judge.judged = listing.revision;
        judge.checker.restored(now, &listing);
    }

    /// What an agent takes for its deadline is compared with its session's lease.
    pub fn deadline(&self, node: &str, session: &str, deadline_ns: u64) {
        let deadline_ms = self.wall_of_boot_ms(deadline_ns);
        let lease = self.judge(|checker, _| {
            let standing = checker.state().sessions.get(node).filter(|s| s.value.session_id == session);
            standing.map(|s| s.value.lease)
        });
        let Some(until) = lease.and_then(|lease| self.store.lease_until(lease)) else { return };
        let until_ms = EPOCH_MS + i64::try_from(until.duration_since(self.begun).as_millis()).unwrap_or(0);
        self.judge(|checker, now| checker.deadline(now, node, deadline_ms, until_ms));
    }
}

fn index(process: Process) -> usize {
    usize::try_from(process).unwrap_or(usize::MAX)
}

/// The world as the programs meet it.
pub struct Programs(pub Arc<Sim>);

impl Programs {
    /// Enters it.
    #[must_use]
    pub fn enter(sim: Arc<Sim>) -> simulated::Entered {
        simulated::enter(Rc::new(Self(sim)))
    }
}

impl simulated::World for Programs {
    fn wall_ms(&self, _: Process) -> i64 {
        self.0.wall_ms()
    }

    fn boottime_ns(&self, _: Process) -> u64 {
        self.0.boottime_ns()
    }

    fn random(&self, of: Process) -> u64 {
        lock(&self.0.processes).get_mut(index(of)).map_or(0, |state| state.chance.next())
    }

    fn turn(&self, of: Process, task: u64, waker: &Waker) -> Turn {
        let mut processes = lock(&self.0.processes);
        let Some(state) = processes.get_mut(index(of)) else { return Turn::Never };
        match state.life {
            Life::Dead => {
                state.tasks.remove(&task);
                Turn::Never
            }
            Life::Paused => {
                state.tasks.insert(task, waker.clone());
                Turn::Later
            }
            Life::Alive => {
                state.tasks.insert(task, waker.clone());
                drop(processes);
                if !self.0.settings.shuffle {
                    return Turn::Run;
                }
                let (later, long) = {
                    let mut chance = self.0.chance();
                    (chance.permille(20), chance.permille(50).then(|| chance.between(1, 30)))
                };
                if !later {
                    return Turn::Run;
                }
                let waker = waker.clone();
                match long {
                    None => waker.wake(),
                    // A thread that is not given the processor for a while.
                    Some(ms) => drop(tokio::spawn(async move {
                        tokio::time::sleep(Duration::from_millis(ms)).await;
                        waker.wake();
                    })),
                }
                Turn::Later
            }
        }
    }

    fn gone(&self, of: Process, task: u64) {
        if let Some(state) = lock(&self.0.processes).get_mut(index(of)) {
            state.tasks.remove(&task);
        }
    }

    fn panicked(&self, of: Process, what: &str) {
        let name = self.0.name_of(of);
        self.0.judge(|checker, now| checker.panicked(now, &name, what));
    }
}
