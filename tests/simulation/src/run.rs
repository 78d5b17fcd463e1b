//! One seed: builds the world, carries out the plan, lets everything settle, and says what was broken.

use crate::{
    agent::{self, Agent},
    asked, coordinator,
    host::{Host, UNIT},
    network::Reach,
    plan::{Plan, Step},
    trace::Trace,
    world::{Programs, Sim, lock},
};
use drover_coordinator::{
    invariants::{Rule, Violation},
    store::{Backend as _, Op, Store, Txn, keys, memory, records, restore},
};
use drover_proto::{mutant, store::v1 as record, v1::DeploymentSpec, world::simulated::Process};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::sleep;

/// Longest time after the last fault in which the fleet must come to what was asked of it.
const SETTLE: Duration = Duration::from_secs(120);
/// How long it must stay there.
const CALM: Duration = Duration::from_secs(3);
/// A run that has not ended by then hangs.
const LONGEST: Duration = Duration::from_secs(600);

/// How a run is looked at.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// Lines of the trace that are kept.
    pub keep: usize,
    /// Print the trace as it comes.
    pub print: bool,
    /// A rule that is broken on purpose.
    pub mutant: Option<&'static str>,
}

/// What became of a run.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub seed: u64,
    pub hash: u64,
    pub violations: Vec<Violation>,
    pub revisions: i64,
    pub simulated: Duration,
    pub last: Vec<String>,
}

/// Runs a plan on this thread.
#[must_use]
pub fn run(plan: &Plan, options: Options) -> Outcome {
    within(plan, options, async |sim: &Arc<Sim>| {
        let fleet = Arc::new(Fleet::start(sim));
        if tokio::time::timeout(LONGEST, fleet.live(plan)).await.is_err() {
            sim.judge(|checker, now| checker.not_reached(now, "the run does not end"));
        }
        fleet.end();
    })
}

/// Of a plan its first host alone: a shim there is overtaken by a higher token.
#[must_use]
pub fn overtaken(plan: &Plan, options: Options) -> Outcome {
    within(plan, options, async |sim: &Arc<Sim>| {
        if let Some(host) = sim.hosts.first() {
            host.overtaken(sim).await;
        }
        // Nobody has claimed anything here: only what the host's own files say is judged.
        sim.judge(|checker, _| checker.forget_all_but(Rule::LowerTokenStarted));
    })
}

fn within(plan: &Plan, options: Options, life: impl AsyncFnOnce(&Arc<Sim>)) -> Outcome {
    mutant::choose(Some(options.mutant.unwrap_or("")));
    let runtime = runtime(plan.settings.seed);
    let outcome = runtime.block_on(async {
        let hosts: Vec<Arc<Host>> =
            plan.nodes.iter().enumerate().map(|(n, units)| Arc::new(Host::new(format!("n{n}"), *units))).collect();
        let sim = Arc::new(Sim::new(plan.settings.clone(), hosts, Trace::new(options.keep, options.print)));
        let entered = Programs::enter(sim.clone());
        for host in &sim.hosts {
            host.join(&sim);
        }
        life(&sim).await;
        sleep(Duration::from_millis(1)).await;
        let violations = sim.judge(|checker, _| checker.violations().to_vec());
        let revisions = sim.judge(|checker, _| checker.state().revision);
        let (hash, last) = {
            let trace = sim.trace();
            (trace.hash(), trace.last().map(str::to_owned).collect())
        };
        let simulated = Duration::from_millis(sim.now_ms());
        (Outcome { seed: plan.settings.seed, hash, violations, revisions, simulated, last }, entered)
    });
    let (outcome, entered) = outcome;
    drop(runtime);
    drop(entered);
    mutant::choose(None);
    outcome
}

#[cfg(tokio_unstable)]
fn runtime(seed: u64) -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()))
        .build()
        .expect("a runtime without I/O needs nothing of the system")
}

#[cfg(not(tokio_unstable))]
fn runtime(_: u64) -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without I/O needs nothing of the system")
}

/// Whether runs can be repeated: tokio's own chance is seeded only when it is built so.
#[must_use]
pub const fn repeats() -> bool {
    cfg!(tokio_unstable)
}

/// The programs of a run.
struct Fleet {
    sim: Arc<Sim>,
    agents: Mutex<Vec<Option<Agent>>>,
    coordinators: Mutex<Vec<Option<Process>>>,
    deployments: Mutex<BTreeMap<String, u64>>,
    /// The last copy of the store's content.
    copy: Mutex<Option<memory::Copy>>,
}

impl Fleet {
    fn start(sim: &Arc<Sim>) -> Self {
        let coordinators = (0..sim.settings.coordinators).map(|n| Some(coordinator::start(sim, n))).collect();
        let agents = (0..sim.hosts.len()).map(|n| Some(agent::start(sim, n))).collect();
        Self {
            sim: sim.clone(),
            agents: Mutex::new(agents),
            coordinators: Mutex::new(coordinators),
            deployments: Mutex::default(),
            copy: Mutex::default(),
        }
    }

    fn end(&self) {
        for n in 0..self.sim.settings.coordinators {
            self.kill_coordinator(n);
        }
        for n in 0..self.sim.hosts.len() {
            self.kill_agent(n);
        }
    }

    fn kill_agent(&self, n: usize) {
        if let Some(agent) = lock(&self.agents)[n].take() {
            self.sim.kill(agent.main);
            self.sim.kill(agent.session);
        }
    }

    fn start_agent(&self, n: usize) {
        let mut agents = lock(&self.agents);
        if agents[n].is_none() {
            agents[n] = Some(agent::start(&self.sim, n));
        }
    }

    fn kill_coordinator(&self, n: usize) {
        lock(&self.sim.network).serving[n] = None;
        if let Some(process) = lock(&self.coordinators)[n].take() {
            self.sim.kill(process);
        }
    }

    fn start_coordinator(&self, n: usize) {
        let mut coordinators = lock(&self.coordinators);
        if coordinators[n].is_none() {
            coordinators[n] = Some(coordinator::start(&self.sim, n));
        }
    }

    /// The plan, then the time in which everything settles.
    async fn live(self: &Arc<Self>, plan: &Plan) {
        for (at, step) in &plan.steps {
            let now = self.sim.now_ms();
            sleep(Duration::from_millis(at.saturating_sub(now))).await;
            self.sim.tell(|| format!("-- {step:?}"));
            self.take(step).await;
        }
        sleep(Duration::from_millis(plan.chaos_ms.saturating_sub(self.sim.now_ms()))).await;
        self.heal();
        let mut reached_since = None;
        let begun = tokio::time::Instant::now();
        loop {
            self.end_foreign();
            let lacks = asked::lacks(&self.sim);
            match (&lacks, reached_since) {
                (None, None) => reached_since = Some(tokio::time::Instant::now()),
                (None, Some(since)) if tokio::time::Instant::now() - since > CALM => return,
                (None, Some(_)) => {}
                (Some(_), _) => reached_since = None,
            }
            if begun.elapsed() > SETTLE {
                let lacks = lacks.unwrap_or_else(|| "it does not stay as it was asked for".to_owned());
                self.sim.judge(|checker, now| checker.not_reached(now, &lacks));
                return;
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    fn heal(&self) {
        self.sim.tell(|| "-- all faults end".to_owned());
        lock(&self.sim.network).heal();
        for n in 0..self.sim.settings.coordinators {
            if let Some(process) = lock(&self.coordinators)[n] {
                self.sim.resume(process);
            }
            // One that was told to end is there no more.
            if lock(&self.sim.network).serving[n].is_none() {
                self.kill_coordinator(n);
            }
            self.start_coordinator(n);
        }
        for n in 0..self.sim.hosts.len() {
            if let Some(agent) = lock(&self.agents)[n] {
                self.sim.resume(agent.main);
                self.sim.resume(agent.session);
            }
            self.start_agent(n);
        }
    }

    /// Does something when its time has come, unless all faults have ended by then.
    fn later(self: &Arc<Self>, ms: u64, what: impl FnOnce(&Self) + Send + 'static) {
        let fleet = self.clone();
        tokio::spawn(async move {
            sleep(Duration::from_millis(ms)).await;
            if lock(&fleet.sim.network).faults_on() {
                what(&fleet);
            }
        });
    }

    async fn take(self: &Arc<Self>, step: &Step) {
        let sim = &self.sim;
        match step.clone() {
            Step::Apply { name, replicas, changed } => self.apply(&name, replicas, changed).await,
            Step::Delete { name } => self.delete(&name).await,
            Step::Cut { agent, to, up, down, ms } => {
                lock(&sim.network).cut(agent, to, up, down);
                self.later(ms, move |fleet| lock(&fleet.sim.network).cut(agent, to, false, false));
            }
            Step::Reset { agent } => lock(&sim.network).reset(agent),
            Step::KillAgent { agent, ms } => {
                self.kill_agent(agent);
                self.later(ms, move |fleet| fleet.start_agent(agent));
            }
            Step::PauseAgent { agent, all, ms } => {
                let Some(paused) = lock(&self.agents)[agent] else { return };
                sim.pause(paused.main);
                if all {
                    sim.pause(paused.session);
                }
                self.later(ms, move |fleet| {
                    fleet.sim.resume(paused.main);
                    fleet.sim.resume(paused.session);
                });
            }
            Step::Reboot { agent, ms } => {
                self.kill_agent(agent);
                sim.hosts[agent].reboot();
                self.later(ms, move |fleet| fleet.start_agent(agent));
            }
            Step::LoseSession { agent, ms } => {
                self.kill_agent(agent);
                sim.hosts[agent].lose_session();
                self.later(ms, move |fleet| fleet.start_agent(agent));
            }
            Step::DoesNothing { agent } => sim.hosts[agent].do_nothing(),
            Step::ServerEnds { agent } => sim.hosts[agent].server_ends(),
            Step::KillCoordinator { coordinator, kill, ms } => {
                if kill {
                    self.kill_coordinator(coordinator);
                } else {
                    coordinator::stop(sim, coordinator);
                }
                self.later(ms, move |fleet| {
                    fleet.kill_coordinator(coordinator);
                    fleet.start_coordinator(coordinator);
                });
            }
            Step::KillCoordinators { ms } => {
                for n in 0..sim.settings.coordinators {
                    self.kill_coordinator(n);
                    self.later(ms, move |fleet| fleet.start_coordinator(n));
                }
            }
            Step::PauseCoordinator { coordinator, ms } => {
                let Some(process) = lock(&self.coordinators)[coordinator] else { return };
                sim.pause(process);
                self.later(ms, move |fleet| fleet.sim.resume(process));
            }
            Step::CutStore { coordinator, refused, ms } => {
                let reach = if refused { Reach::Refused } else { Reach::Silent };
                for n in (0..sim.settings.coordinators).filter(|n| coordinator.is_none_or(|one| one == *n)) {
                    lock(&sim.network).set_store(n, reach);
                    self.later(ms, move |fleet| lock(&fleet.sim.network).set_store(n, Reach::Up));
                }
            }
            Step::SlowWatch { coordinator, lag_ms, ms } => {
                lock(&sim.network).set_watch_lag(coordinator, lag_ms);
                self.later(ms, move |fleet| lock(&fleet.sim.network).set_watch_lag(coordinator, 0));
            }
            Step::Compact => {
                let at = sim.judge(|checker, _| checker.state().revision);
                let _ = sim.store.compact(at);
            }
            Step::Copy => *lock(&self.copy) = Some(sim.store.copy()),
            Step::Restore { ms } => {
                for n in 0..sim.settings.coordinators {
                    self.kill_coordinator(n);
                }
                self.restore().await;
                for n in 0..sim.settings.coordinators {
                    self.later(ms, move |fleet| fleet.start_coordinator(n));
                }
            }
            Step::NewEtcdLeader => sim.store.refresh_leases(),
        }
    }

    /// The operator sets the store back to the last copy.
    async fn restore(&self) {
        let Some(copy) = lock(&self.copy).clone() else { return };
        let sim = &self.sim;
        let known = sim.judge(|checker, _| checker.state().generation());
        sim.store.restore(&copy, sim.store.cluster_id().await.unwrap_or(0) + 1);
        let store: Store = Arc::new(sim.store.clone());
        match restore::finish(&store, known).await {
            Ok(schema) => sim.tell(|| format!("the store goes on from {}: {:?}", schema.mod_revision, schema.value)),
            Err(error) => sim.judge(|checker, now| checker.not_reached(now, &format!("a restore fails: {error}"))),
        }
        sim.restored().await;
    }

    /// The operator ends servers that were claimed before a restore, of instances that the copy does not know: nobody else
    /// may.
    fn end_foreign(&self) {
        let (known, generation) = self.sim.judge(|checker, _| {
            let state = checker.state();
            (state.instances.keys().cloned().collect::<BTreeSet<_>>(), state.generation())
        });
        for host in &self.sim.hosts {
            for (id, token, _) in host.live() {
                if token.generation < generation && !known.contains(&id) {
                    host.ended_by_operator(&id);
                }
            }
        }
    }

    /// The operator asks for a deployment.
    async fn apply(&self, name: &str, replicas: i32, changed: bool) {
        let revision = {
            let mut known = lock(&self.deployments);
            let revision = known.entry(name.to_owned()).or_default();
            if changed || *revision == 0 {
                *revision += 1;
            }
            *revision
        };
        let spec = DeploymentSpec {
            name: name.to_owned(),
            model_path: "m.gguf".to_owned(),
            memory_bytes: Some(UNIT),
            drain_timeout_ms: Some(2000),
            stop_grace_ms: Some(1000),
            load_timeout_ms: Some(20_000),
            ..DeploymentSpec::default()
        };
        let deployment = record::Deployment {
            spec: Some(spec.clone()),
            generation: revision,
            revision,
            replicas,
            ..Default::default()
        };
        let then = vec![
            records::put(keys::revision(name, revision), &record::Revision { spec: Some(spec), created_at: None }, 0),
            records::put(keys::deployment(name), &deployment, 0),
        ];
        self.write(then).await;
    }

    async fn delete(&self, name: &str) {
        let known = self.sim.judge(|checker, _| checker.state().deployments.get(name).map(|d| d.value.clone()));
        let Some(known) = known else { return };
        let deleting = record::Deployment { deleting: true, ..known };
        self.write(vec![records::put(keys::deployment(name), &deleting, 0)]).await;
    }

    async fn write(&self, then: Vec<Op>) {
        // The twin refuses nothing that is well formed.
        let _ = self.sim.store.txn(Txn { then, ..Txn::default() }).await;
    }
}
