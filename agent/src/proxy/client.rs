//! The agent's side of its proxy: finds the living one or starts one, keeps it alive, gives it the routes.
//!
//! A task owns the control connection and the child; [`ProxyHandle`] is the cheap handle that everybody else holds. The
//! handle's end stops the task and leaves the proxy running; only [`ProxyHandle::end`] and [`end_at`] end the proxy.

use super::{
    ProxySettings,
    peer::{self, END_MARGIN, Peer},
    retired::{self, Retired},
    route::Route,
    spawn,
    wire::{FromAgent, FromProxy},
};
use anyhow::{Context as _, anyhow, bail};
use std::{collections::BTreeMap, io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    process::Child,
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

/// A proxy must have answered within this time after its start.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// How often a socket is tried while its proxy starts.
const START_POLL: Duration = Duration::from_millis(10);
/// Pause before a proxy is looked for that fails again and again. There is none the first time that one ends, and after one
/// that has lived for longer than the longest pause.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(1);

pub use peer::end_at;

/// What the proxy should do.
#[derive(Debug, Default, Clone)]
pub(super) struct Desired {
    pub(super) sequence: u64,
    /// None until the agent has said so once: a proxy found alive keeps its routes until then.
    pub(super) routes: Option<Arc<Vec<Route>>>,
    pub(super) end: Option<Duration>,
}

/// What is known of it.
#[derive(Debug, Default, Clone)]
pub(super) struct Observed {
    connected: bool,
    address: Option<SocketAddr>,
    pid: u32,
    version: String,
    applied: u64,
    in_flight: BTreeMap<String, u64>,
    /// Proxies that end and have requests in flight still, by pid.
    pub(super) retired: BTreeMap<u32, Retired>,
    failures: u32,
    error: String,
    ended: Option<Result<(), String>>,
}

impl Observed {
    /// Whether routes of this sequence are in force everywhere and an instance has no request in flight.
    fn is_drained(&self, instance: &str, sequence: u64) -> bool {
        let idle =
            |applied: u64, in_flight: &BTreeMap<String, u64>| applied >= sequence && !in_flight.contains_key(instance);
        self.connected
            && idle(self.applied, &self.in_flight)
            && self.retired.values().all(|retired| idle(retired.applied, &retired.in_flight))
    }
}

/// A cheap handle on the host's proxy.
#[derive(Debug, Clone)]
pub struct ProxyHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    desired: watch::Sender<Desired>,
    observed: watch::Receiver<Observed>,
    supervisor: JoinHandle<()>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

impl ProxyHandle {
    /// Takes over the proxy that serves this runtime folder, whatever its version and settings, or starts one; then
    /// supervises it: should it die, another is started within a second on the same port and given the routes again.
    ///
    /// Must be called on a runtime that lives as long as the agent.
    ///
    /// # Errors
    /// No proxy could be started; the text holds the last lines of its log.
    pub async fn ensure(settings: ProxySettings) -> anyhow::Result<Self> {
        let (desired, desires) = watch::channel(Desired::default());
        let (observations, observed) = watch::channel(Observed::default());
        let supervisor =
            tokio::spawn(Supervisor { settings, desired: desires, observed: observations, known: None }.run());
        let shared = Shared { desired, observed, supervisor };
        let mut observed = shared.observed.clone();
        let up = observed.wait_for(|o| o.connected || o.failures >= 2);
        match timeout(START_DEADLINE, up).await {
            Ok(Ok(o)) if o.connected => {}
            Ok(Ok(o)) => bail!("the proxy can't be started: {}", o.error),
            Ok(Err(_)) => bail!("the proxy's supervisor has ended"),
            Err(_) => bail!(
                "the proxy has not answered within {} s: {}",
                START_DEADLINE.as_secs(),
                shared.observed.borrow().error
            ),
        }
        Ok(Self(Arc::new(shared)))
    }

    /// Sets the full set of routes; returns at once. They reach the proxy now, or when it is back.
    pub fn set_routes(&self, routes: Vec<Route>) {
        self.0.desired.send_if_modified(|desired| {
            if desired.routes.as_deref() == Some(&routes) {
                return false;
            }
            desired.sequence += 1;
            desired.routes = Some(Arc::new(routes));
            true
        });
    }

    /// Waits until the routes set last are in force; false when they are not in time.
    pub async fn wait_applied(&self, within: Duration) -> bool {
        let sequence = self.0.desired.borrow().sequence;
        self.wait_for(within, |o| o.connected && o.applied >= sequence).await
    }

    /// Requests of an instance in flight, as the proxy last told, and those that were upgraded and drain still.
    #[must_use]
    pub fn in_flight(&self, instance: &str) -> u64 {
        let observed = self.0.observed.borrow();
        let all = observed.retired.values().map(|retired| &retired.in_flight).chain([&observed.in_flight]);
        all.filter_map(|in_flight| in_flight.get(instance)).sum()
    }

    /// Waits until the routes set last are in force and an instance has no request in flight: set its route to draining (or
    /// leave it out) first. False when requests are left, or the proxy is away, at the end of the time.
    pub async fn wait_drained(&self, instance: &str, within: Duration) -> bool {
        let sequence = self.0.desired.borrow().sequence;
        self.wait_for(within, |o| o.is_drained(instance, sequence)).await
    }

    async fn wait_for(&self, within: Duration, condition: impl FnMut(&Observed) -> bool) -> bool {
        let mut observed = self.0.observed.clone();
        matches!(timeout(within, observed.wait_for(condition)).await, Ok(Ok(_)))
    }

    /// Address of the HTTP listener, with its real port; stays the same when the proxy is started again.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        // Set by the first hello, which `ensure` waits for.
        self.0.observed.borrow().address.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    /// Process id of the proxy, as it last told.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.0.observed.borrow().pid
    }

    /// Waits until another proxy process serves than the one with this id; says its id.
    pub async fn replaced(&self, pid: u32) -> u32 {
        let mut observed = self.0.observed.clone();
        let changed = observed.wait_for(|o| o.connected && o.pid != pid).await.map(|o| o.pid);
        match changed {
            Ok(pid) => pid,
            // Its supervisor has ended: none will come.
            Err(_) => std::future::pending().await,
        }
    }

    /// Version of the proxy, as it last told; may differ from the agent's after an upgrade.
    #[must_use]
    pub fn version(&self) -> String {
        self.0.observed.borrow().version.clone()
    }

    /// Ends the proxy: it drains for at most `within`, then cuts what is left, and is killed when it does not. Returns when
    /// the process is gone.
    ///
    /// # Errors
    /// It could not be ended.
    pub async fn end(self, within: Duration) -> anyhow::Result<()> {
        self.0.desired.send_modify(|desired| desired.end = Some(within));
        let mut observed = self.0.observed.clone();
        let ended = timeout(within + 4 * END_MARGIN, observed.wait_for(|o| o.ended.is_some())).await;
        match ended.map(|o| o.map(|o| o.ended.clone())) {
            Ok(Ok(Some(result))) => result.map_err(|error| anyhow!("the proxy has not ended: {error}")),
            _ => bail!("the proxy has not ended in time (pid {})", self.pid()),
        }
    }
}

/// How a connection to the proxy ended.
enum Over {
    /// By our own order: the process is gone, or why not.
    Ended(Result<(), String>),
    /// The agent's handle is gone.
    Released,
    /// It is about to end, and has a successor started; with the sequence of the routes that it was given.
    Retiring(Box<Peer>, u64),
    /// Otherwise: look again.
    Lost,
}

struct Supervisor {
    settings: ProxySettings,
    desired: watch::Receiver<Desired>,
    observed: watch::Sender<Observed>,
    /// Address that the proxy had last.
    known: Option<SocketAddr>,
}

impl Supervisor {
    async fn run(mut self) {
        let mut child: Option<Child> = None;
        let mut delay = Duration::ZERO;
        loop {
            let began = Instant::now();
            let problem = match Peer::connect(&self.settings.control_socket()).await {
                Ok(peer) => match self.talk(peer).await {
                    Ok(Over::Ended(result)) => {
                        if let Some(mut child) = child {
                            let _ = timeout(END_MARGIN, child.wait()).await;
                        }
                        self.observed.send_modify(|o| o.ended = Some(result));
                        return;
                    }
                    Ok(Over::Released) => return,
                    Ok(Over::Retiring(peer, sent)) => {
                        self.retire(*peer, sent);
                        reap(child.take());
                        match self.start(true).await {
                            Ok(started) => {
                                child = Some(started);
                                continue;
                            }
                            Err(error) => Some(format!("no successor of the proxy that ends: {error:#}")),
                        }
                    }
                    Ok(Over::Lost) => None,
                    Err(error) => Some(format!("its control connection broke: {error}")),
                },
                Err(_) if self.desired.borrow().end.is_some() => {
                    if let Some(mut child) = child {
                        let _ = child.kill().await;
                    }
                    self.observed.send_modify(|o| o.ended = Some(Ok(())));
                    return;
                }
                Err(error) if peer::nobody_listens(&error) => match self.start(false).await {
                    Ok(started) => {
                        child = Some(started);
                        continue;
                    }
                    Err(error) => Some(format!("{error:#}")),
                },
                Err(error) => Some(format!("{}: {error}", self.settings.control_socket().display())),
            };
            if began.elapsed() > RETRY_MAX {
                delay = Duration::ZERO;
            }
            if problem.is_some() {
                // Something is in the way, and may be gone in a moment.
                delay = delay.max(RETRY_MIN);
            }
            self.observed.send_modify(|o| {
                (o.connected, o.applied) = (false, 0);
                if let Some(problem) = problem {
                    tracing::warn!(problem, "the proxy is away");
                    o.failures += 1;
                    o.error = problem;
                }
            });
            reap(child.take());
            sleep(delay).await;
            delay = (delay * 2).clamp(RETRY_MIN, RETRY_MAX);
        }
    }

    /// Attends to a proxy that is about to end, beside its successor.
    fn retire(&mut self, peer: Peer, sent: u64) {
        let pid = peer.hello.pid;
        self.observed.send_modify(|o| {
            o.retired.insert(pid, Retired { applied: o.applied, in_flight: std::mem::take(&mut o.in_flight) });
            (o.connected, o.applied) = (false, 0);
        });
        tokio::spawn(retired::attend(peer, sent, self.desired.clone(), self.observed.clone()));
    }

    /// Starts a proxy and waits until its socket accepts.
    async fn start(&mut self, take_over: bool) -> anyhow::Result<Child> {
        let mut child = spawn::spawn(&self.settings, self.known, take_over)?;
        let accepting = async {
            loop {
                if let Some(status) = child.try_wait().context("the proxy can't be waited for")? {
                    bail!("the proxy ended at its start with {status}: {}", spawn::last_words(&self.settings));
                }
                // Where a listener is taken over the socket is the other one's at first.
                let peer = Peer::connect(&self.settings.control_socket()).await;
                if peer.is_ok_and(|peer| child.id() == Some(peer.hello.pid)) {
                    return Ok(());
                }
                sleep(START_POLL).await;
            }
        };
        match timeout(START_DEADLINE, accepting).await {
            Ok(Ok(())) => Ok(child),
            Ok(Err(error)) => Err(error),
            Err(_) => {
                let _ = child.kill().await;
                bail!("the proxy did not listen in time: {}", spawn::last_words(&self.settings))
            }
        }
    }

    async fn talk(&mut self, mut peer: Peer) -> io::Result<Over> {
        let peer::Hello { pid, version, address } = peer.hello.clone();
        if version != drover_proto::VERSION || (self.settings.listen.port() != 0 && self.settings.listen != address) {
            // Replacing it would cut streams: an upgrade of the proxy is an act of its own.
            tracing::info!(version, %address, "a living proxy of other version or settings is kept");
        }
        self.known = Some(address);
        spawn::remember(&self.settings, address);
        self.observed.send_modify(|o| {
            (o.connected, o.applied, o.failures) = (true, 0, 0);
            (o.pid, o.version, o.address) = (pid, version, Some(address));
            o.in_flight.clear();
            o.error.clear();
        });
        let mut sent = 0;
        loop {
            let desired = self.desired.borrow_and_update().clone();
            if let Some(within) = desired.end {
                let ended = peer.end(within).await;
                return Ok(Over::Ended(ended.map_err(|error| format!("{error:#}"))));
            }
            if let Some(routes) = desired.routes.filter(|_| desired.sequence > sent) {
                let message = FromAgent::Routes { sequence: desired.sequence, routes: routes.to_vec() };
                peer.send(&message).await?;
                sent = desired.sequence;
            }
            tokio::select! {
                changed = self.desired.changed() => if changed.is_err() {
                    return Ok(Over::Released);
                },
                message = peer.next() => match message? {
                    Some(FromProxy::State { applied, in_flight }) => {
                        self.observed.send_modify(|o| (o.applied, o.in_flight) = (applied, in_flight));
                    }
                    Some(FromProxy::Hello { .. }) => {}
                    Some(FromProxy::Ending) => {
                        tracing::info!(pid, "the proxy is about to end: a successor is started");
                        return Ok(Over::Retiring(Box::new(peer), sent));
                    }
                    None => {
                        tracing::warn!(pid, "the proxy has ended: another is started");
                        // What it held is free when it is gone, which takes a moment; one that drains keeps none of it.
                        let _ = timeout(RETRY_MIN, peer.gone()).await;
                        return Ok(Over::Lost);
                    }
                },
            }
        }
    }
}

/// Waits for a proxy that has ended, or will: one that was told to end by somebody else may drain for a while yet.
fn reap(child: Option<Child>) {
    let Some(mut child) = child else { return };
    tokio::spawn(async move {
        if let Ok(status) = child.wait().await {
            tracing::info!(%status, "a proxy has ended");
        }
    });
}
