//! A host: its disk, its shims and servers, as the agent's registry uses them. It survives its agents.
//!
//! The order of a start is the real shim's: lock, spec, record of an earlier run, deadline; held and recorded; the spec and
//! the deadline once more; released. What a higher token has taken over is refused at the same places.

mod machine;

use machine::Living;
pub use machine::{Here, Plane};

use crate::world::{Sim, lock};
use drover_agent::{
    instance::{
        claim::{Claim, stored_token},
        run::Run,
    },
    link::stored::Stored,
};
use drover_coordinator::invariants::{self, HostEvent};
use drover_proto::v1::Token;
use drover_shim::{
    identity,
    record::{self, Record, Stage},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};
use tokio::{sync::watch, time::sleep};

/// Memory of one instance in bytes; hosts have a few times as much.
pub const UNIT: i64 = 1 << 30;
const MODEL: &str = "/m/m.gguf";

/// One machine.
#[derive(Debug)]
pub struct Host {
    /// What it is called in the trace; the node's name but for a clone.
    pub name: String,
    /// Name of the node.
    pub node: String,
    /// Memory, in bytes.
    pub capacity: i64,
    sim: OnceLock<Arc<Sim>>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Its launches never come to an end.
    does_nothing: bool,
    boot: u32,
    disk: BTreeMap<String, Files>,
    session: Option<Stored>,
    servers: BTreeMap<i32, Server>,
    last_pid: i32,
}

/// The files of an instance.
#[derive(Debug, Clone, Default)]
struct Files {
    /// Token and start deadline.
    spec: Option<(Token, u64)>,
    /// Token and process.
    record: Option<(Token, i32)>,
    claim: Option<Claim>,
    /// A shim is at work.
    locked: bool,
}

#[derive(Debug)]
struct Server {
    instance: String,
    /// It waits to be released, and has executed nothing.
    held: bool,
    ready: bool,
    hangs: bool,
    /// How long it takes to end when it is asked to; one that ignores that has none.
    ends_after: Option<Duration>,
    ended: watch::Sender<bool>,
}

impl Host {
    pub fn new(node: String, units: i64) -> Self {
        Self { name: node.clone(), node, capacity: units * UNIT, sim: OnceLock::new(), inner: Mutex::default() }
    }

    /// Becomes part of a run.
    pub fn join(&self, sim: &Arc<Sim>) {
        let _ = self.sim.set(sim.clone());
    }

    fn sim(&self) -> &Arc<Sim> {
        // A host is made part of a run before anything happens on it.
        self.sim.get().expect("a host of a run")
    }

    fn happens(&self, event: &HostEvent) {
        self.sim().tell(|| format!("host {}: {event:?}", self.name));
        self.sim().judge(|checker, now| checker.host(now, &self.name, &self.node, event));
    }

    /// The live servers: instance, token on disk, whether it is ready.
    pub fn live(&self) -> Vec<(String, Token, bool)> {
        let inner = lock(&self.inner);
        let token =
            |id: &str| inner.disk.get(id).and_then(|files| files.record).map_or(Token::default(), |(token, _)| token);
        let released = inner.servers.values().filter(|server| !server.held);
        released.map(|server| (server.instance.clone(), token(&server.instance), server.ready)).collect()
    }

    /// The id of its session, as it is on disk.
    pub fn session_id(&self) -> String {
        lock(&self.inner).session.as_ref().map_or_else(String::new, |stored| stored.session_id.clone())
    }

    /// Loses the file of the session.
    pub fn lose_session(&self) {
        lock(&self.inner).session = None;
    }

    /// From now on whatever is launched here hangs for good, while the agent keeps its session.
    pub fn do_nothing(&self) {
        lock(&self.inner).does_nothing = true;
    }

    /// A server ends by itself; which one, chance says.
    pub fn server_ends(&self) {
        let pids: Vec<i32> = lock(&self.inner).servers.keys().copied().collect();
        if let Some(pid) = self.sim().chance().pick(&pids).copied() {
            self.end(pid);
        }
    }

    /// An operator ends the server of an instance.
    pub fn ended_by_operator(&self, instance: &str) {
        let of_it = |(pid, server): (&i32, &Server)| (server.instance == instance && !server.held).then_some(*pid);
        let pid = lock(&self.inner).servers.iter().find_map(of_it);
        if let Some(pid) = pid {
            self.end(pid);
        }
    }

    /// All processes are gone, the disk stays.
    pub fn reboot(&self) {
        let pids: Vec<i32> = {
            let mut inner = lock(&self.inner);
            inner.boot += 1;
            inner.disk.values_mut().for_each(|files| files.locked = false);
            inner.servers.keys().copied().collect()
        };
        pids.into_iter().for_each(|pid| self.end(pid));
    }

    fn end(&self, pid: i32) {
        let Some(server) = lock(&self.inner).servers.remove(&pid) else { return };
        if let Some(files) = lock(&self.inner).disk.get_mut(&server.instance) {
            files.locked = false;
        }
        self.happens(&HostEvent::Ended { pid });
        server.ended.send_replace(true);
    }

    fn boot_id(&self) -> String {
        format!("{}-{}", self.name, lock(&self.inner).boot)
    }

    fn record(&self, instance: &str, token: Token, pid: i32) -> Record {
        let process = identity::Process {
            boot_id: self.boot_id(),
            pid,
            start_ticks: 0,
            executable: "/llama-server".into(),
            file: None,
        };
        Record {
            format: record::FORMAT,
            instance: instance.to_owned(),
            token: stored_token(token),
            stage: Stage::Released,
            process,
            shim: "/drover-shim".into(),
            arguments: vec!["--model".to_owned(), MODEL.to_owned()],
            socket: format!("/run/{instance}.sock").into(),
            started_at_ms: 0,
            cgroup: None,
        }
    }

    fn living(self: &Arc<Self>, instance: &str) -> Option<Run> {
        let (token, pid) = {
            let inner = lock(&self.inner);
            let (token, pid) = inner.disk.get(instance)?.record?;
            inner.servers.get(&pid)?;
            (token, pid)
        };
        Some(Run { living: Arc::new(Living { host: self.clone(), pid }), record: self.record(instance, token, pid) })
    }

    fn raise_to(&self, claim: &Claim, instance: &str) {
        let raised = {
            let mut inner = lock(&self.inner);
            let files = inner.disk.entry(instance.to_owned()).or_default();
            let mut raised = None;
            if let Some((token, _)) = &mut files.spec {
                *token = claim.token.max(*token);
            }
            if let Some((token, pid)) = &mut files.record
                && *token < claim.token
            {
                *token = claim.token;
                raised = Some(*pid);
            }
            files.claim = Some(claim.clone());
            raised.filter(|pid| inner.servers.contains_key(pid))
        };
        if let Some(pid) = raised {
            self.happens(&HostEvent::Raised { pid, token: claim.token });
        }
    }

    /// What the shim does, up to its word to the agent.
    async fn shim(self: Arc<Self>, instance: String, memory_bytes: i64) -> Result<(), String> {
        let boot = lock(&self.inner).boot;
        self.step().await;
        let (token, deadline_ns) = {
            let mut inner = lock(&self.inner);
            let Some(files) = inner.disk.get_mut(&instance) else { return Err("16 no spec".to_owned()) };
            if files.locked {
                return Err("10 another shim holds it".to_owned());
            }
            let Some((token, deadline_ns)) = files.spec else { return Err("16 no spec".to_owned()) };
            files.locked = true;
            (token, deadline_ns)
        };
        let refused = |why: &str| {
            if let Some(files) = lock(&self.inner).disk.get_mut(&instance) {
                files.locked = false;
            }
            Err(why.to_owned())
        };
        self.step().await;
        let ignores = drover_proto::mutant::on("shim-ignores-tokens");
        let recorded = lock(&self.inner).disk.get(&instance).and_then(|files| files.record);
        if let Some((known, pid)) = recorded {
            if known > token && !ignores {
                return refused("11 a higher token is recorded");
            }
            if lock(&self.inner).servers.contains_key(&pid) {
                return refused("12 it runs already");
            }
        }
        if self.sim().boottime_ns() >= deadline_ns {
            return refused("14 the start deadline has passed");
        }
        let pid = {
            let mut inner = lock(&self.inner);
            inner.last_pid += 1;
            let pid = inner.last_pid;
            let Some(files) = inner.disk.get_mut(&instance) else { return Err("16 it was removed".to_owned()) };
            files.record = Some((token, pid));
            let ended = watch::Sender::new(false);
            let held =
                Server { instance: instance.clone(), held: true, ready: false, hangs: false, ends_after: None, ended };
            inner.servers.insert(pid, held);
            pid
        };
        let refused = |why: &str| {
            self.end(pid);
            refused(why)
        };
        // Recorded and held: from here on a raise finds the record, or is seen in the spec.
        self.step().await;
        let spec = lock(&self.inner).disk.get(&instance).and_then(|files| files.spec);
        let Some((now, _)) = spec else { return refused("16 no spec") };
        if now > token && !ignores {
            return refused("11 the spec was raised");
        }
        if self.sim().boottime_ns() >= deadline_ns || lock(&self.inner).boot != boot {
            return refused("14 the start deadline has passed");
        }
        self.release(&instance, token, pid, memory_bytes);
        Ok(())
    }

    /// Nobody is at work on an instance of which nothing lives, and a shim that comes later finds its time over.
    fn calls_off(&self, instance: &str) -> bool {
        let mut inner = lock(&self.inner);
        let Some(files) = inner.disk.get_mut(instance) else { return true };
        if let Some((_, deadline_ns)) = &mut files.spec
            && !files.locked
        {
            *deadline_ns = 0;
        }
        !files.locked
    }

    /// A shim was killed in the middle of a start: its lock is free, and what it held ends.
    fn shim_is_dead(&self, instance: &str) {
        let held = {
            let mut inner = lock(&self.inner);
            let held = inner.servers.iter().find(|(_, server)| server.instance == *instance && server.held);
            let held = held.map(|(pid, _)| *pid);
            if let Some(files) = inner.disk.get_mut(instance) {
                files.locked = false;
            }
            held
        };
        held.into_iter().for_each(|pid| self.end(pid));
    }

    /// The next step of a shim; a few take long.
    async fn step(&self) {
        let ms = {
            let mut chance = self.sim().chance();
            if chance.permille(self.sim().settings.slow_shims) {
                chance.spread_ms(10, 12_000)
            } else {
                chance.between(0, 3)
            }
        };
        sleep(Duration::from_millis(ms)).await;
    }

    fn release(self: &Arc<Self>, instance: &str, token: Token, pid: i32, memory_bytes: i64) {
        let (load_ms, ends_after, dies_ms) = {
            let mut chance = self.sim().chance();
            let faults = lock(&self.sim().network).faults_on();
            let ends_after = (!chance.permille(100)).then(|| Duration::from_millis(chance.between(0, 2000)));
            let dies = faults && chance.permille(60);
            (chance.spread_ms(200, 8000), ends_after, dies.then(|| chance.spread_ms(100, 30_000)))
        };
        let on_disk = {
            let mut inner = lock(&self.inner);
            // It was ended while it was held.
            let Some(server) = inner.servers.get_mut(&pid) else { return };
            (server.held, server.ends_after) = (false, ends_after);
            let files = inner.disk.get(instance);
            let tokens = files.map(|files| {
                let claim = files.claim.as_ref().map(|claim| claim.token);
                [files.spec.map(|(t, _)| t), files.record.map(|(t, _)| t), claim].into_iter().flatten().max()
            });
            tokens.flatten().unwrap_or(token)
        };
        let process = invariants::Process { instance: instance.to_owned(), token, memory_bytes };
        self.happens(&HostEvent::Started { pid, process, on_disk, capacity: self.capacity });
        let host = self.clone();
        tokio::spawn(async move {
            sleep(Duration::from_millis(load_ms)).await;
            if let Some(server) = lock(&host.inner).servers.get_mut(&pid) {
                server.ready = true;
            }
            if let Some(ms) = dies_ms {
                sleep(Duration::from_millis(ms)).await;
                host.end(pid);
            }
        });
    }

    /// A shim starts under one token while an agent raises the instance to the next; both are told, whatever it leads to.
    pub async fn overtaken(self: &Arc<Self>, sim: &Sim) {
        let token = |revision| Token { generation: 1, revision };
        let claim = |revision| Claim {
            instance: "m-1".to_owned(),
            token: token(revision),
            spec: Default::default(),
            revision: 1,
            memory_bytes: UNIT,
            restarts: 0,
            failed: None,
            since: None,
        };
        self.raise_to(&claim(5), "m-1");
        let deadline_ns = sim.boottime_ns() + 3_600_000_000_000;
        if let Some(files) = lock(&self.inner).disk.get_mut("m-1") {
            files.spec = Some((token(5), deadline_ns));
        }
        let shim = tokio::spawn(self.clone().shim("m-1".to_owned(), UNIT));
        while !lock(&self.inner).servers.values().any(|server| server.held) {
            sleep(Duration::from_millis(1)).await;
        }
        self.raise_to(&claim(9), "m-1");
        let _ = shim.await;
    }

    fn signal(self: &Arc<Self>, pid: i32, kill: bool) {
        let seen = lock(&self.inner).servers.get(&pid).map(|server| (server.ready && !server.hangs, server.ends_after));
        let Some((ready, ends_after)) = seen else { return };
        self.happens(&HostEvent::Signalled { pid, ready });
        let held = lock(&self.inner).servers.get(&pid).is_some_and(|server| server.held);
        let after = if kill || held { Some(Duration::ZERO) } else { ends_after };
        if let Some(server) = lock(&self.inner).servers.get_mut(&pid) {
            server.ready = false;
        }
        let Some(after) = after else { return };
        let host = self.clone();
        tokio::spawn(async move {
            sleep(after).await;
            host.end(pid);
        });
    }
}
