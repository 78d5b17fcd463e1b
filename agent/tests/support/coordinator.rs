//! A coordinator that follows a script: it keeps the rules of the session and of claims, in memory, and lets a test say
//! which answers get lost.

use drover_proto::{
    status::{reason, reason_of, with_reason},
    transport::{Admit, Security},
    v1::{
        ClaimManyRequest, ClaimManyResponse, ClaimRequest, ClaimResponse, ClaimResult, ClaimSet, CommandAnswer,
        DeploymentSpec, EndRun, HeartbeatAck, HeartbeatsRequest, HeartbeatsResponse, Hello, InstanceState, NodeCommand,
        NodeEvent, Offer, OwnedClaim, SessionRequest, SessionResponse, StatusAck, StatusReport, Token, Welcome,
        node_command,
        node_service_server::{NodeService, NodeServiceServer},
        session_request, session_response,
    },
};
use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime},
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};
use tonic::{Code, Request, Response, Status, Streaming};

/// What becomes of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Grant,
    /// It is made, and the answer comes when [`State::holding_answers`] ends.
    GrantLate,
    /// It is made, and the answer is lost.
    GrantUnheard,
    /// It is not made, and the answer is lost.
    Lost,
    Refuse(&'static str),
}

#[derive(Debug)]
pub struct State {
    pub hellos: Vec<Hello>,
    pub heartbeats: usize,
    /// Those of them that came over a stream of their own.
    pub beats: usize,
    /// False: an older coordinator, which takes heartbeats on the session's stream only.
    pub taking_beats: bool,
    /// False: what the agent says on the session's stream is not read.
    pub reading: bool,
    /// Streams of heartbeats that were opened; those of a lower number than this end.
    pub beat_streams: usize,
    pub beat_streams_cut: usize,
    welcomed_revision: i64,
    pub welcomes: Vec<Welcome>,
    pub reports: Vec<StatusReport>,
    /// Reports whose token was not that of the claim.
    pub refused: Vec<StatusReport>,
    pub events: Vec<NodeEvent>,
    pub claims: Vec<ClaimRequest>,
    pub command_answers: Vec<CommandAnswer>,
    /// Number of claims of each call for several.
    pub calls: Vec<usize>,
    pub answers: VecDeque<Answer>,
    pub owned: BTreeMap<String, OwnedClaim>,
    pub end_runs: Vec<EndRun>,
    /// False: sessions are refused, heartbeats are not answered.
    pub answering: bool,
    /// False: the session has run out, whatever the agent knows.
    pub alive: bool,
    /// False: a claim that was made is told by its own answer only.
    pub announcing: bool,
    /// True: an older coordinator, which does not know how to claim several at once.
    pub one_by_one: bool,
    /// True: late answers wait.
    pub holding_answers: bool,
    /// True: the replica that serves the session makes no claim, as its view lags behind the store; others do.
    pub lagging: bool,
    /// Claims that were refused for that.
    pub refused_for_lag: usize,
    /// Replica that serves the session.
    pub session_at: usize,
    pub ttl_ms: i64,
    pub generation: u64,
    /// By how much its clock is ahead of the agent's, in milliseconds.
    pub clock_ahead: i64,
    pub store_id: String,
    session_id: String,
    session_revision: i64,
    pub revision: i64,
    specs: BTreeMap<String, DeploymentSpec>,
    /// Offers that nobody has tried to claim: they are told again on the next stream.
    offered: BTreeMap<String, Offer>,
    /// Revision of the last claim made of each instance.
    taken: BTreeMap<String, i64>,
    stream: Option<mpsc::Sender<Result<SessionResponse, Status>>>,
}

/// For how long an offer stands.
const VALID_MS: i64 = 5_000;

/// When that is over by a clock that is ahead by so much.
fn deadline(ahead_ms: i64) -> prost_types::Timestamp {
    let now = prost_types::Timestamp::from(SystemTime::now());
    let seconds = now.seconds + (VALID_MS + ahead_ms) / 1000;
    prost_types::Timestamp { seconds, ..now }
}

/// One replica: all share the state, as they would share a store.
#[derive(Clone)]
struct Service(Arc<Mutex<State>>, usize);

pub struct Coordinator {
    address: SocketAddr,
    service: Service,
}

impl Coordinator {
    pub async fn start() -> Self {
        let state = State {
            hellos: Vec::new(),
            heartbeats: 0,
            beats: 0,
            taking_beats: true,
            reading: true,
            beat_streams: 0,
            beat_streams_cut: 0,
            welcomed_revision: 0,
            welcomes: Vec::new(),
            reports: Vec::new(),
            refused: Vec::new(),
            events: Vec::new(),
            claims: Vec::new(),
            command_answers: Vec::new(),
            calls: Vec::new(),
            answers: VecDeque::new(),
            owned: BTreeMap::new(),
            end_runs: Vec::new(),
            answering: true,
            alive: true,
            announcing: true,
            one_by_one: false,
            holding_answers: true,
            lagging: false,
            refused_for_lag: 0,
            session_at: 0,
            ttl_ms: 3_000,
            generation: 1,
            clock_ahead: 0,
            store_id: "store-1".to_owned(),
            session_id: "none".to_owned(),
            session_revision: 0,
            revision: 100,
            specs: BTreeMap::new(),
            offered: BTreeMap::new(),
            taken: BTreeMap::new(),
            stream: None,
        };
        Self::serve(Service(Arc::new(Mutex::new(state)), 0)).await
    }

    /// Another replica over the same state.
    pub async fn replica(&self, number: usize) -> Self {
        Self::serve(Service(self.service.0.clone(), number)).await
    }

    async fn serve(service: Service) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = NodeServiceServer::with_interceptor(service.clone(), Admit::new(Security::default()));
        tokio::spawn(
            drover_proto::transport::server()
                .add_service(server)
                .serve_with_incoming(drover_proto::transport::incoming(listener)),
        );
        Self { address, service }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.service.0.lock().unwrap()
    }

    pub fn last_report(&self, instance: &str) -> Option<StatusReport> {
        self.state().reports.iter().rev().find(|r| r.instance == instance).cloned()
    }

    pub fn offer(&self, instance: &str, spec: DeploymentSpec) {
        self.state().offer(instance, spec);
    }

    /// Changes what is owned and sends the set.
    pub fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        change(&mut state);
        state.revision += 1;
        state.send_claims();
    }

    /// Asks the node for something.
    pub fn command(&self, command: node_command::Command) {
        let command = NodeCommand { id: "one".to_owned(), command: Some(command) };
        self.state().send(session_response::Message::Command(command));
    }

    pub fn stop(&self, instance: &str) {
        self.change(|state| state.owned.get_mut(instance).unwrap().wanted = false);
    }

    /// Cuts the session's stream.
    pub fn cut(&self) {
        self.state().stream = None;
    }

    /// The session runs out: its claims are gone, and the stream with them.
    pub fn expire(&self) {
        let mut state = self.state();
        state.alive = false;
        state.owned.clear();
        state.stream = None;
    }
}

impl State {
    pub fn offer(&mut self, instance: &str, spec: DeploymentSpec) {
        self.revision += 1;
        self.specs.insert(instance.to_owned(), spec.clone());
        let offer = Offer {
            instance: instance.to_owned(),
            offer_revision: self.revision,
            spec: Some(spec),
            revision: 1,
            deadline: Some(deadline(self.clock_ahead)),
            valid_ms: VALID_MS,
            ..Offer::default()
        };
        self.offered.insert(instance.to_owned(), offer.clone());
        self.send(session_response::Message::Offer(offer));
    }

    /// Tells again what nobody has tried to claim: it may have been on its way on a stream that has ended.
    fn offer_again(&mut self) {
        for offer in self.offered.clone().into_values() {
            let offer = Offer { deadline: Some(deadline(self.clock_ahead)), ..offer };
            self.send(session_response::Message::Offer(offer));
        }
    }

    fn set(&self) -> ClaimSet {
        ClaimSet {
            claims: self.owned.values().cloned().collect(),
            revision: self.revision,
            session_revision: self.session_revision,
            end_runs: self.end_runs.clone(),
            store_generation: self.generation,
        }
    }

    fn send(&mut self, message: session_response::Message) {
        if let Some(stream) = &self.stream {
            // The agent may be gone: the next stream begins with all that counts.
            let _ = stream.try_send(Ok(SessionResponse { message: Some(message) }));
        }
    }

    pub fn send_claims(&mut self) {
        let set = self.set();
        self.send(session_response::Message::Claims(set));
    }

    fn welcome(&mut self, hello: &Hello) -> Welcome {
        let resumed = self.alive && hello.resume_session_id == self.session_id;
        self.revision += 1;
        self.session_revision = self.revision;
        self.welcomed_revision = self.revision;
        if !resumed {
            self.owned.clear();
            // Unique on this host, as real ones are: agents hold the sessions that they have by a name of the host's.
            self.session_id = format!("session-{}-{:016x}", self.revision, drover_proto::world::random_u64());
            self.alive = true;
        }
        let welcome = Welcome {
            protocol: 1,
            session_id: self.session_id.clone(),
            session_revision: self.session_revision,
            ttl_ms: self.ttl_ms,
            heartbeat_interval_ms: 200,
            store_generation: self.generation,
            cluster_id: 7,
            claims: Some(self.set()),
            resumed,
            coordinator: "script".to_owned(),
            store_id: self.store_id.clone(),
        };
        self.hellos.push(hello.clone());
        self.welcomes.push(welcome.clone());
        welcome
    }

    fn take(&mut self, message: session_request::Message) {
        match message {
            session_request::Message::Heartbeat(heartbeat) if self.answering => {
                self.heartbeats += 1;
                let ack = HeartbeatAck { sequence: heartbeat.sequence, ttl_ms: self.ttl_ms };
                self.send(session_response::Message::HeartbeatAck(ack));
            }
            session_request::Message::Status(report) => {
                let accepted = self.owned.get(&report.instance).is_some_and(|c| c.token == report.token);
                let ack =
                    StatusAck { instance: report.instance.clone(), token: report.token, accepted, state: report.state };
                self.send(session_response::Message::StatusAck(ack));
                if accepted {
                    if report.state() == InstanceState::Stopped {
                        self.owned.remove(&report.instance);
                        self.revision += 1;
                        self.send_claims();
                    }
                    self.reports.push(report);
                } else {
                    self.refused.push(report);
                }
            }
            session_request::Message::Event(event) => self.events.push(event),
            session_request::Message::CommandAnswer(answer) => self.command_answers.push(answer),
            _ => {}
        }
    }

    /// The answer to a heartbeat on a stream of their own; `None` when there is none.
    fn beat(&mut self, beat: &HeartbeatsRequest, stream: usize) -> Option<Result<HeartbeatsResponse, Status>> {
        let of_this = beat.session_id == self.session_id && beat.stream_revision == self.welcomed_revision;
        if !of_this || !self.alive || self.stream.is_none() || stream <= self.beat_streams_cut {
            return Some(Err(Status::aborted("as the script says")));
        }
        if !self.answering {
            return None;
        }
        self.heartbeats += 1;
        self.beats += 1;
        let ack = Some(HeartbeatAck { sequence: beat.sequence, ttl_ms: self.ttl_ms });
        Some(Ok(HeartbeatsResponse { ack }))
    }

    fn claim(&mut self, request: &ClaimRequest) -> Result<ClaimResponse, Status> {
        self.claims.push(request.clone());
        let refuse = |why| Err(with_reason(Code::FailedPrecondition, why, "as the script says"));
        if request.session_id != self.session_id || request.session_revision != self.session_revision {
            return refuse(reason::SESSION_MOVED);
        }
        self.offered.remove(&request.instance);
        let answer = self.answers.pop_front().unwrap_or(Answer::Grant);
        match answer {
            Answer::Refuse(why) => return refuse(why),
            Answer::Lost => return Err(Status::unavailable("the connection broke")),
            Answer::Grant | Answer::GrantLate | Answer::GrantUnheard => {}
        }
        if self.owned.contains_key(&request.instance) {
            return refuse(reason::ALREADY_CLAIMED);
        }
        // An offer serves once; a claim that is made again names none.
        let taken = self.taken.get(&request.instance).copied().unwrap_or(0);
        if request.offer_revision != 0 && request.offer_revision < taken {
            return refuse(reason::OFFER_GONE);
        }
        self.revision += 1;
        self.session_revision = self.revision;
        self.taken.insert(request.instance.clone(), self.revision);
        let token = Token { generation: self.generation, revision: self.revision };
        let spec = self.specs.get(&request.instance).cloned();
        let claim = OwnedClaim {
            instance: request.instance.clone(),
            token: Some(token),
            wanted: true,
            spec: spec.clone(),
            revision: 1,
            memory_bytes: request.memory_bytes,
            traceparent: String::new(),
        };
        self.owned.insert(request.instance.clone(), claim);
        if self.announcing {
            self.send_claims();
        }
        if answer == Answer::GrantUnheard {
            return Err(Status::unavailable("the connection broke"));
        }
        Ok(ClaimResponse { token: Some(token), session_revision: self.session_revision, spec, revision: 1 })
    }
}

#[tonic::async_trait]
impl NodeService for Service {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<SessionResponse, Status>> + Send>>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|m| m.message);
        let Some(session_request::Message::Hello(hello)) = first else {
            return Err(Status::invalid_argument("the first message must be a hello"));
        };
        let (sender, responses) = mpsc::channel(1024);
        {
            let mut state = self.0.lock().unwrap();
            if !state.answering {
                return Err(Status::unavailable("not now"));
            }
            let welcome = state.welcome(&hello);
            state.session_at = self.1;
            state.stream = Some(sender);
            state.send(session_response::Message::Welcome(welcome));
            state.offer_again();
        }
        let service = self.clone();
        tokio::spawn(async move {
            while let Some(Ok(request)) = requests.next().await {
                while !service.0.lock().unwrap().reading {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                if let Some(message) = request.message {
                    service.0.lock().unwrap().take(message);
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }

    type HeartbeatsStream = Pin<Box<dyn Stream<Item = Result<HeartbeatsResponse, Status>> + Send>>;

    async fn heartbeats(
        &self,
        request: Request<Streaming<HeartbeatsRequest>>,
    ) -> Result<Response<Self::HeartbeatsStream>, Status> {
        let number = {
            let mut state = self.0.lock().unwrap();
            if !state.taking_beats {
                return Err(Status::unimplemented("as the script says"));
            }
            state.beat_streams += 1;
            state.beat_streams
        };
        let (mut requests, service) = (request.into_inner(), self.clone());
        let (sender, responses) = mpsc::channel(64);
        tokio::spawn(async move {
            while let Some(Ok(beat)) = requests.next().await {
                let answer = service.0.lock().unwrap().beat(&beat, number);
                let Some(answer) = answer else { continue };
                let ends = answer.is_err();
                if sender.send(answer).await.is_err() || ends {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }

    async fn claim(&self, request: Request<ClaimRequest>) -> Result<Response<ClaimResponse>, Status> {
        let late = self.0.lock().unwrap().answers.front() == Some(&Answer::GrantLate);
        let answer = self.0.lock().unwrap().claim(request.get_ref()).map(Response::new);
        while late && self.0.lock().unwrap().holding_answers {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        answer
    }

    async fn claim_many(&self, request: Request<ClaimManyRequest>) -> Result<Response<ClaimManyResponse>, Status> {
        let request = request.into_inner();
        {
            let mut state = self.0.lock().unwrap();
            if state.lagging && state.session_at == self.1 {
                state.refused_for_lag += 1;
                return Err(with_reason(Code::Unavailable, reason::STORE_UNAVAILABLE, "as the script says"));
            }
        }
        if self.0.lock().unwrap().one_by_one {
            return Err(Status::unimplemented("as the script says"));
        }
        self.0.lock().unwrap().calls.push(request.claims.len());
        let mut session_revision = request.session_revision;
        let mut results = Vec::new();
        for item in request.claims {
            let one = ClaimRequest {
                session_id: request.session_id.clone(),
                session_revision,
                instance: item.instance.clone(),
                offer_revision: item.offer_revision,
                nonce: item.nonce,
                memory_bytes: item.memory_bytes,
                recorded_token: item.recorded_token,
                halt_generation: request.halt_generation,
            };
            let mut result = ClaimResult { instance: item.instance, ..ClaimResult::default() };
            match self.claim(Request::new(one)).await.map(Response::into_inner) {
                Ok(made) => {
                    session_revision = made.session_revision;
                    (result.token, result.spec, result.revision) = (made.token, made.spec, made.revision);
                }
                Err(status) => match reason_of(&status) {
                    Some(why) if why != reason::SESSION_MOVED => result.reason = why,
                    _ => return Err(status),
                },
            }
            results.push(result);
        }
        Ok(Response::new(ClaimManyResponse { results, session_revision }))
    }
}
