//! A host: its disk, its shims and servers, as the agent's registry uses them. It survives its agents.
//!
//! The order of a start is the real shim's: lock, spec, record of an earlier run, deadline; held and recorded; the spec and
//! the deadline once more; released. What a higher token has taken over is refused at the same places.

use crate::world::{Sim, lock};
use async_trait::async_trait;
use drover_agent::{
    blocking, clock,
    host::processes::Work,
    instance::{
        adopt::Left,
        claim::{Claim, stored_token},
        context::Context,
        machine::{DataPlane, Machine, Process},
        run::{Failed, Run},
        state::{Ended, Health},
    },
    link::{offers::No, stored::Stored},
    mutant,
    proxy::Route,
};
use drover_coordinator::invariants::{self, HostEvent};
use drover_proto::v1::{Offer, Token};
use drover_shim::{
    durable, identity,
    record::{self, Directory, Record, Stage},
};
use std::{
    collections::BTreeMap,
    fmt, io,
    path::Path,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};
use tokio::{
    sync::{oneshot, watch},
    time::{sleep, timeout},
};

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

/// The host, for one agent.
#[derive(Debug)]
pub struct Here(pub Arc<Host>);

fn of(directory: &Directory) -> String {
    directory.path().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

#[async_trait]
impl Machine for Here {
    async fn scan(&self, context: &Arc<Context>) -> io::Result<Vec<(Claim, Directory, Left)>> {
        let names: Vec<String> = lock(&self.0.inner).disk.keys().cloned().collect();
        let mut found = Vec::new();
        for name in names {
            found.push(self.look(context, name).await);
        }
        Ok(found)
    }

    async fn look(&self, context: &Arc<Context>, instance: String) -> (Claim, Directory, Left) {
        let directory = Directory::new(context.settings.instances_dir().join(&instance));
        let files = lock(&self.0.inner).disk.get(&instance).cloned().unwrap_or_default();
        let claim = files.claim.unwrap_or_else(|| Claim {
            instance: instance.clone(),
            token: files.record.map(|(token, _)| token).unwrap_or_default(),
            spec: Default::default(),
            revision: 0,
            memory_bytes: 0,
            restarts: 0,
            failed: None,
            since: None,
        });
        let left = match self.0.living(&instance) {
            Some(run) => {
                // A raise that was cut off is finished.
                self.0.raise_to(&claim, &instance);
                let ready = self.probe(&context.settings.socket_of(&instance), None).await == Health::Ok;
                Left::Living { run, ready }
            }
            None => Left::Ended(files.record.map(|_| Ended { code: Some(1), ..Ended::default() })),
        };
        (claim, directory, left)
    }

    async fn launch(&self, context: &Context, claim: &Claim, directory: &Directory) -> Result<Run, Failed> {
        let instance = of(directory);
        if let Some(run) = self.0.living(&instance) {
            return Ok(run);
        }
        let does_nothing = lock(&self.0.inner).does_nothing;
        if does_nothing {
            std::future::pending::<()>().await;
        }
        let failed = |message: String, retry| Failed { message, retry, ended: None };
        let Some(deadline_ns) = context.session.start_until_ns() else {
            return Err(failed("this node has no session now".to_owned(), true));
        };
        let owned = context.board.get(&instance).is_some_and(|entry| entry.owned);
        if !owned && !mutant::on(mutant::name::START_WITHOUT_CLAIM) {
            return Err(failed("no claim covers it any more".to_owned(), true));
        }
        if let Some(files) = lock(&self.0.inner).disk.get_mut(&instance) {
            files.spec = Some((claim.token, deadline_ns));
        }
        let (word, said) = oneshot::channel();
        let shim = self.0.clone().shim(instance.clone(), claim.memory_bytes);
        // A process of its own: it goes on when the agent is gone.
        tokio::spawn(async move {
            let _ = word.send(shim.await);
        });
        let said = timeout(Duration::from_secs(15), said).await;
        match (self.0.living(&instance), said) {
            (Some(run), _) => Ok(run),
            (None, Ok(Ok(Err(why)))) => Err(failed(format!("the start was refused: {why}"), !why.starts_with("11"))),
            (None, _) => Err(failed("llama-server has ended at once, or its shim is silent".to_owned(), true)),
        }
    }

    async fn ended(&self, _: &Directory, _: &Record) -> Ended {
        Ended { code: Some(1), ..Ended::default() }
    }

    async fn probe(&self, socket: &Path, _: Option<&Path>) -> Health {
        sleep(Duration::from_millis(1)).await;
        let instance = socket.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let inner = lock(&self.0.inner);
        match inner.servers.values().find(|server| server.instance == instance) {
            Some(server) if server.hangs => Health::Failing("no answer".to_owned()),
            Some(server) if server.ready => Health::Ok,
            _ => Health::Loading,
        }
    }

    fn prepare(&self, claim: &Claim, directory: &Directory) -> Result<(), String> {
        self.0.raise_to(claim, &of(directory));
        Ok(())
    }

    fn raise(&self, claim: &Claim, directory: &Directory) -> Result<(), durable::Error> {
        self.0.raise_to(claim, &of(directory));
        Ok(())
    }

    fn keep(&self, claim: &Claim, directory: &Directory) -> Result<(), durable::Error> {
        if let Some(files) = lock(&self.0.inner).disk.get_mut(&of(directory)) {
            files.claim = Some(claim.clone());
        }
        Ok(())
    }

    fn remove(&self, directory: &Directory, _: &Path) -> bool {
        let instance = of(directory);
        let mut inner = lock(&self.0.inner);
        let lives = inner.servers.values().any(|server| server.instance == instance);
        if lives || inner.disk.get(&instance).is_some_and(|files| files.locked) {
            return false;
        }
        inner.disk.remove(&instance);
        true
    }

    async fn look_at_offers(
        &self,
        context: &Arc<Context>,
        _: &str,
        offers: &[Offer],
    ) -> Result<Vec<Result<i64, No>>, blocking::Error> {
        let check = |offer: &Offer| {
            if context.session.has_passed() || offer.deadline.as_ref().is_none_or(|d| clock::until(d).is_zero()) {
                return Err(No::Late);
            }
            let faults = lock(&self.0.sim().network).faults_on();
            if faults && self.0.sim().chance().permille(30) {
                return Err(No::Unable("the host's memory is short just now".to_owned()));
            }
            Ok(UNIT)
        };
        Ok(offers.iter().map(check).collect())
    }

    fn session(&self, _: &Path) -> Result<Stored, durable::Error> {
        Ok(lock(&self.0.inner).session.clone().unwrap_or_default())
    }

    fn keep_session(&self, _: &Path, stored: &Stored) -> Result<(), durable::Error> {
        lock(&self.0.inner).session = Some(stored.clone());
        Ok(())
    }
}

/// A process that was found by its record.
struct Living {
    host: Arc<Host>,
    pid: i32,
}

impl fmt::Debug for Living {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} of {}", self.pid, self.host.name)
    }
}

#[async_trait]
impl Process for Living {
    fn pid(&self) -> i32 {
        self.pid
    }

    async fn ended(&self) {
        let watched = lock(&self.host.inner).servers.get(&self.pid).map(|server| server.ended.subscribe());
        if let Some(mut ended) = watched {
            let _ = ended.wait_for(|ended| *ended).await;
        }
    }

    fn work(&self) -> Option<Work> {
        None
    }

    fn terminate(&self) -> io::Result<()> {
        self.host.signal(self.pid, false);
        Ok(())
    }

    fn kill_tree(&self) -> io::Result<()> {
        self.host.signal(self.pid, true);
        Ok(())
    }
}

/// The host's data plane: takes every route at once, and drains in a moment.
#[derive(Debug)]
pub struct Plane(pub Arc<Host>);

#[async_trait]
impl DataPlane for Plane {
    fn set_routes(&self, _: Vec<Route>) {}

    async fn wait_applied(&self, _: Duration) -> bool {
        true
    }

    async fn wait_drained(&self, _: &str, within: Duration) -> bool {
        let ms = self.0.sim().chance().between(0, 1500);
        sleep(Duration::from_millis(ms).min(within)).await;
        true
    }
}
