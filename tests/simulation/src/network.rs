//! The network between agents and coordinators, and between coordinators and the store.
//!
//! A stream is what TCP gives: in order, each message once, held back while the link is cut, broken off on each side when
//! the cut lasts. A call may be lost, answered in vain, executed twice, or arrive long after its caller gave up.

use crate::{
    coordinator::Serving,
    world::{Sim, lock},
};
use async_trait::async_trait;
use drover_agent::link::remote::{Coordinator, Coordinators, Incoming};
use drover_coordinator::invariants::Said;
use drover_proto::{
    transport::Peer,
    v1::{
        ClaimManyRequest, ClaimManyResponse, ClaimRequest, ClaimResponse, HeartbeatsRequest, HeartbeatsResponse,
        SessionRequest, SessionResponse, node_service_server::NodeService, session_request, session_response::Message,
    },
    world,
    world::simulated::{self, Process},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, oneshot},
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

/// How a coordinator reaches the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// It does.
    Up,
    /// What it sends is not answered.
    Silent,
    /// It is told so at once.
    Refused,
}

/// Which way a link is cut.
#[derive(Debug, Clone, Copy, Default)]
struct Cut {
    up: bool,
    down: bool,
}

/// State of all links.
#[derive(Debug)]
pub struct Network {
    /// By agent and coordinator.
    cuts: Vec<Vec<Cut>>,
    store: Vec<Reach>,
    watch_lag_ms: Vec<u64>,
    /// The coordinators that serve.
    pub serving: Vec<Option<Arc<Serving>>>,
    faults: bool,
    /// Raised to break streams: a stream of a lower number ends.
    resets: Vec<u64>,
    streams: u64,
}

impl Network {
    pub fn new(coordinators: usize, agents: usize) -> Self {
        Self {
            cuts: vec![vec![Cut::default(); coordinators]; agents],
            store: vec![Reach::Up; coordinators],
            watch_lag_ms: vec![0; coordinators],
            serving: vec![None; coordinators],
            faults: true,
            resets: vec![0; agents],
            streams: 0,
        }
    }

    fn next_stream(&mut self) -> u64 {
        self.streams += 1;
        self.streams
    }

    pub fn store_reach(&self, coordinator: usize) -> Reach {
        self.store.get(coordinator).copied().unwrap_or(Reach::Up)
    }

    pub fn set_store(&mut self, coordinator: usize, reach: Reach) {
        if let Some(place) = self.store.get_mut(coordinator) {
            *place = reach;
        }
    }

    pub fn watch_lag_ms(&self, coordinator: usize) -> u64 {
        self.watch_lag_ms.get(coordinator).copied().unwrap_or(0)
    }

    pub fn set_watch_lag(&mut self, coordinator: usize, ms: u64) {
        if let Some(place) = self.watch_lag_ms.get_mut(coordinator) {
            *place = ms;
        }
    }

    /// Cuts or heals the links of an agent: all, or the one to a coordinator.
    pub fn cut(&mut self, agent: usize, to: Option<usize>, up: bool, down: bool) {
        for (n, link) in self.cuts[agent].iter_mut().enumerate() {
            if to.is_none_or(|to| to == n) {
                *link = Cut { up, down };
            }
        }
    }

    /// Breaks an agent's stream.
    pub fn reset(&mut self, agent: usize) {
        self.resets[agent] += 1;
    }

    pub fn faults_on(&self) -> bool {
        self.faults
    }

    /// All is well from now on.
    pub fn heal(&mut self) {
        self.faults = false;
        self.cuts.iter_mut().flatten().for_each(|cut| *cut = Cut::default());
        self.store.iter_mut().for_each(|reach| *reach = Reach::Up);
        self.watch_lag_ms.iter_mut().for_each(|lag| *lag = 0);
    }

    fn is_cut(&self, agent: usize, coordinator: usize) -> Cut {
        self.cuts[agent][coordinator]
    }

    fn serving(&self, coordinator: usize) -> Option<Arc<Serving>> {
        self.serving.get(coordinator).cloned().flatten()
    }
}

/// An agent's way to the coordinators.
#[derive(Debug)]
pub struct Dialer {
    pub sim: Arc<Sim>,
    /// Number of the agent's host.
    pub agent: usize,
    /// Name of its node.
    pub node: String,
}

#[derive(Debug)]
struct Link {
    sim: Arc<Sim>,
    agent: usize,
    node: String,
    coordinator: usize,
    /// Number of the connection, of which each serves one stream of a session at most.
    stream: u64,
}

#[async_trait]
impl Coordinators for Dialer {
    fn count(&self) -> usize {
        self.sim.settings.coordinators
    }

    async fn connect(&self, first: usize) -> anyhow::Result<(usize, Box<dyn Coordinator>)> {
        let count = self.count();
        for n in 0..count {
            let coordinator = (first + n) % count;
            let stream = lock(&self.sim.network).next_stream();
            let link = Link { sim: self.sim.clone(), agent: self.agent, node: self.node.clone(), coordinator, stream };
            link.latency().await;
            let cut = lock(&self.sim.network).is_cut(self.agent, coordinator);
            if cut.up || cut.down {
                sleep(Duration::from_secs(2)).await;
            } else if lock(&self.sim.network).serving(coordinator).is_some() {
                return Ok((coordinator, Box::new(link)));
            }
        }
        anyhow::bail!("no coordinator can be reached")
    }
}

impl Link {
    async fn latency(&self) {
        let ms = {
            let mut chance = self.sim.chance();
            if chance.permille(20) { chance.between(5, 200) } else { chance.between(0, 3) }
        };
        sleep(Duration::from_millis(ms)).await;
    }

    fn cut(&self) -> Cut {
        lock(&self.sim.network).is_cut(self.agent, self.coordinator)
    }

    fn again(&self) -> Self {
        let (sim, node) = (self.sim.clone(), self.node.clone());
        Self { sim, agent: self.agent, node, coordinator: self.coordinator, stream: self.stream }
    }

    /// Waits while the link is cut one way; false when that has lasted so long that a side gives up.
    async fn held(&self, is_cut: impl Fn(Cut) -> bool) -> bool {
        let patience = self.sim.chance().between(50, 300);
        for _ in 0..patience {
            if !is_cut(self.cut()) {
                return true;
            }
            sleep(Duration::from_millis(100)).await;
        }
        false
    }

    fn resets(&self) -> u64 {
        lock(&self.sim.network).resets[self.agent]
    }

    /// What the agent says, on its way to the coordinator; `asks` is called with each that arrives.
    async fn up<R>(
        self,
        mut requests: mpsc::Receiver<R>,
        inbound: mpsc::Sender<Result<R, Status>>,
        asks: impl Fn(&Self, &R),
    ) {
        let resets = self.resets();
        loop {
            let request = tokio::select! {
                () = inbound.closed() => return,
                request = requests.recv() => request,
                () = sleep(Duration::from_millis(250)), if resets == self.resets() => continue,
            };
            let broken = resets != self.resets();
            self.latency().await;
            if !self.held(|cut| cut.up).await || broken {
                let _ = inbound.send(Err(Status::unavailable("the connection broke"))).await;
                return;
            }
            let Some(request) = request else { return };
            asks(&self, &request);
            if inbound.send(Ok(request)).await.is_err() {
                return;
            }
        }
    }

    /// What the coordinator says, on its way to the agent; `left` is called with each that leaves it.
    async fn down<A>(
        self,
        mut answers: mpsc::Receiver<Result<A, Status>>,
        incoming: mpsc::Sender<Result<A, Status>>,
        of: Process,
        left: impl Fn(&Self, &A),
    ) {
        let resets = self.resets();
        loop {
            let answer = tokio::select! {
                () = incoming.closed() => return,
                answer = answers.recv() => answer,
                () = sleep(Duration::from_millis(250)), if resets == self.resets() => continue,
            };
            // What a coordinator has left behind was said before it died, maybe in another store than this one is by now.
            if let Some(Ok(answer)) = &answer
                && !self.sim.is_dead(of)
            {
                left(&self, answer);
            }
            let broken = resets != self.resets();
            self.latency().await;
            if !self.held(|cut| cut.down).await || broken {
                let _ = incoming.send(Err(Status::unavailable("the connection broke"))).await;
                return;
            }
            let Some(answer) = answer else {
                if self.sim.is_dead(of) {
                    let _ = incoming.send(Err(Status::unavailable("the connection broke"))).await;
                }
                return;
            };
            if incoming.send(answer).await.is_err() {
                return;
            }
        }
    }

    /// A message of a session has reached the coordinator.
    fn asks(&self, request: &SessionRequest) {
        self.sim.judge(|checker, now| match &request.message {
            Some(session_request::Message::Hello(hello)) => {
                let (resumes, chosen) = (&hello.resume_session_id, &hello.new_session_id);
                checker.told(now, &self.node, &Said::Hello { stream: self.stream, resumes, chosen });
                checker.asked_for_renewal(&self.node);
            }
            Some(session_request::Message::Heartbeat(_)) => checker.asked_for_renewal(&self.node),
            _ => {}
        });
    }

    /// A message has left the coordinator.
    fn left(&self, answer: &SessionResponse) {
        self.sim.judge(|checker, now| match &answer.message {
            Some(Message::Welcome(welcome)) => {
                let said = Said::Welcome {
                    stream: self.stream,
                    session_id: &welcome.session_id,
                    session_revision: welcome.session_revision,
                    resumed: welcome.resumed,
                };
                checker.told(now, &self.node, &said);
                if let Some(set) = &welcome.claims {
                    checker.told(now, &self.node, &Said::Claims(set));
                }
            }
            Some(Message::Claims(set)) => checker.told(now, &self.node, &Said::Claims(set)),
            _ => {}
        });
        if let Some(Message::Welcome(welcome)) = &answer.message {
            let coordinator = self.coordinator;
            self.sim.tell(|| {
                format!(
                    "coordinator {coordinator} welcomes {} at {} (resumed {})",
                    self.node, welcome.session_revision, welcome.resumed
                )
            });
        }
    }
}

#[async_trait]
impl Coordinator for Link {
    async fn session(&mut self, requests: mpsc::Receiver<SessionRequest>) -> Result<Incoming, Status> {
        let serving = lock(&self.sim.network).serving(self.coordinator);
        let serving = serving.ok_or_else(|| Status::unavailable("connection refused"))?;
        let (inbound, received) = mpsc::channel(64);
        tokio::spawn(self.again().up(requests, inbound, Self::asks));
        let (opened, open) = oneshot::channel();
        let (sessions, node, process) = (serving.sessions.clone(), self.node.clone(), serving.process);
        simulated::as_process(process, || {
            tokio::spawn(world::task(async move {
                let _ = opened.send(sessions.serve(node, ReceiverStream::new(received)).await);
            }))
        });
        let answers = open.await.map_err(|_| Status::unavailable("the connection broke"))??;
        let (told, incoming) = mpsc::channel(64);
        tokio::spawn(self.again().down(answers.into_inner(), told, process, Self::left));
        Ok(Incoming::new(ReceiverStream::new(incoming)))
    }

    async fn heartbeats(
        &mut self,
        requests: mpsc::Receiver<HeartbeatsRequest>,
    ) -> Result<Incoming<HeartbeatsResponse>, Status> {
        if !self.sim.settings.beats_apart {
            return Err(Status::unimplemented("this coordinator is an older one"));
        }
        let serving = lock(&self.sim.network).serving(self.coordinator);
        let serving = serving.ok_or_else(|| Status::unavailable("connection refused"))?;
        let (inbound, received) = mpsc::channel(4);
        let asks =
            |link: &Self, _: &HeartbeatsRequest| link.sim.judge(|checker, _| checker.asked_for_renewal(&link.node));
        tokio::spawn(self.again().up(requests, inbound, asks));
        let (opened, open) = oneshot::channel();
        let (sessions, node, process) = (serving.sessions.clone(), self.node.clone(), serving.process);
        simulated::as_process(process, || {
            tokio::spawn(world::task(async move {
                let _ = opened.send(sessions.heartbeats(&node, ReceiverStream::new(received)).await);
            }))
        });
        let answers = open.await.map_err(|_| Status::unavailable("the connection broke"))??;
        let (told, incoming) = mpsc::channel(4);
        tokio::spawn(self.again().down(answers.into_inner(), told, process, |_, _| {}));
        Ok(Incoming::new(ReceiverStream::new(incoming)))
    }

    async fn claim(&mut self, _: ClaimRequest, _: Duration) -> Result<ClaimResponse, Status> {
        Err(Status::unimplemented("all coordinators here take several claims a call"))
    }

    async fn claim_many(&mut self, request: ClaimManyRequest, _: Duration) -> Result<ClaimManyResponse, Status> {
        let serving = lock(&self.sim.network).serving(self.coordinator);
        // Nothing was sent.
        let serving = serving.ok_or_else(|| Status::unavailable("connection refused"))?;
        let bad = lock(&self.sim.network).faults_on();
        let (linger_ms, twice, answer_lost) = {
            let mut chance = self.sim.chance();
            let rate = if bad { self.sim.settings.bad_calls } else { 0 };
            let linger = chance.permille(rate).then(|| chance.spread_ms(100, 30_000));
            (linger, chance.permille(rate), chance.permille(rate))
        };
        self.latency().await;
        let (answer, answered) = oneshot::channel();
        let link = self.again();
        tokio::spawn(async move {
            if let Some(ms) = linger_ms {
                sleep(Duration::from_millis(ms)).await;
            }
            if !link.held(|cut| cut.up).await {
                return;
            }
            let mut answers = Vec::new();
            for _ in 0..=u8::from(twice) {
                answers.push(link.execute(&serving, request.clone()).await);
            }
            link.latency().await;
            if !answer_lost
                && link.held(|cut| cut.down).await
                && let Some(first) = answers.swap_remove(0)
            {
                let _ = answer.send(first);
            } else {
                // Its caller waits until it has waited long enough.
                sleep(Duration::from_secs(60)).await;
            }
        });
        answered.await.unwrap_or_else(|_| Err(Status::unavailable("the connection broke")))
    }
}

impl Link {
    /// Carries out a call in the coordinator; `None` when that dies meanwhile.
    async fn execute(
        &self,
        serving: &Arc<Serving>,
        request: ClaimManyRequest,
    ) -> Option<Result<ClaimManyResponse, Status>> {
        let (done, outcome) = oneshot::channel();
        let (api, process, node) = (serving.node.clone(), serving.process, self.node.clone());
        let nonces: Vec<_> = request.claims.iter().map(|item| (item.instance.clone(), item.nonce.clone())).collect();
        simulated::as_process(process, || {
            tokio::spawn(world::task(async move {
                let mut request = Request::new(request);
                request.extensions_mut().insert(Peer { node: Some(node) });
                let _ = done.send(api.claim_many(request).await.map(tonic::Response::into_inner));
            }))
        });
        let outcome = outcome.await.ok()?;
        match &outcome {
            // As for a stream: it was answered before it died.
            Ok(_) if self.sim.is_dead(process) => {}
            Ok(answer) => self.sim.judge(|checker, now| {
                for result in &answer.results {
                    let nonce = nonces.iter().find(|(id, _)| *id == result.instance).map_or("", |(_, nonce)| nonce);
                    if let Some(token) = result.token {
                        let said = Said::Claimed { instance: &result.instance, nonce, token };
                        checker.told(now, &self.node, &said);
                    }
                }
            }),
            Err(status) => {
                let (node, text) = (&self.node, status.message());
                self.sim.tell(|| format!("{node} is refused its claims: {text}"));
            }
        }
        Some(outcome)
    }
}
