//! A coordinator that keeps deployments in memory and starts nothing, and the `drover` program run against it.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a part of tests")]

use drover_proto::{status, transport, v1::*};
use std::{
    collections::BTreeMap,
    pin::Pin,
    process::{Output, Stdio},
    sync::{Arc, Mutex},
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};
use tonic::{Code, Request, Response, Status};

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Results of a page, whatever the caller asks for: so lists have several.
const PAGE: usize = 2;

#[derive(Debug, Default)]
pub struct State {
    pub deployments: BTreeMap<String, Deployment>,
    pub instances: Vec<Instance>,
    pub nodes: Vec<Node>,
    pub freeze: Freeze,
    /// Events about instances and deployments.
    pub events: Vec<Event>,
    /// `traceparent` of every change.
    pub traces: Vec<String>,
}

#[derive(Debug, Clone, Default)]
pub struct Fake(pub Arc<Mutex<State>>);

impl Fake {
    /// Serves until the test ends; gives the address.
    pub async fn serve(&self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let service = fleet_service_server::FleetServiceServer::new(self.clone());
        let incoming = transport::incoming(listener);
        tokio::spawn(transport::server().add_service(service).serve_with_incoming(incoming));
        address
    }

    fn note<T>(&self, request: &Request<T>) {
        let value = request.metadata().get("traceparent").map(|v| v.to_str().unwrap().to_owned());
        self.0.lock().unwrap().traces.push(value.unwrap_or_default());
    }
}

fn missing(name: &str) -> Status {
    status::with_reason(Code::NotFound, status::reason::NOT_FOUND, format!("there is no \"{name}\""))
}

/// A page of `all`; the token is the number of the first.
fn page<T: Clone>(all: &[T], token: &str) -> (Vec<T>, String) {
    let from: usize = if token.is_empty() { 0 } else { token.parse().unwrap() };
    let to = (from + PAGE).min(all.len());
    (all[from..to].to_vec(), if to < all.len() { to.to_string() } else { String::new() })
}

fn streamed<T: Send + 'static>(first: Vec<T>, endless: Option<fn() -> T>) -> Streamed<T> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        for item in first {
            if sender.send(Ok(item)).await.is_err() {
                return;
            }
        }
        while let Some(make) = endless {
            if sender.send(Ok(make())).await.is_err() {
                return;
            }
        }
    });
    Box::pin(ReceiverStream::new(receiver))
}

#[tonic::async_trait]
impl fleet_service_server::FleetService for Fake {
    async fn apply_deployment(
        &self,
        request: Request<ApplyDeploymentRequest>,
    ) -> Result<Response<ApplyDeploymentResponse>, Status> {
        self.note(&request);
        let ApplyDeploymentRequest { spec, generation } = request.into_inner();
        let spec = spec.unwrap();
        if spec.replicas == Some(0) {
            return Err(status::invalid_field("replicas", "0 is below 1: use ScaleDeployment"));
        }
        let mut state = self.0.lock().unwrap();
        let stored = state.deployments.get(&spec.name).map_or(0, |d| d.generation);
        if stored != generation {
            let message = format!("generation {generation} is not the stored one, {stored}: read it again");
            return Err(status::with_reason(Code::Aborted, status::reason::GENERATION_MISMATCH, message));
        }
        let replicas = spec.replicas.unwrap_or(1);
        let (name, spec) = (spec.name.clone(), Some(spec));
        let deployment = Deployment { spec, generation: generation + 1, revision: 1, replicas, ..Default::default() };
        state.deployments.insert(name, deployment.clone());
        Ok(Response::new(ApplyDeploymentResponse { deployment: Some(deployment), changed: true }))
    }

    async fn get_deployment(
        &self,
        request: Request<GetDeploymentRequest>,
    ) -> Result<Response<GetDeploymentResponse>, Status> {
        let name = request.into_inner().name;
        let deployment = self.0.lock().unwrap().deployments.get(&name).cloned().ok_or_else(|| missing(&name))?;
        Ok(Response::new(GetDeploymentResponse { deployment: Some(deployment) }))
    }

    async fn list_deployments(
        &self,
        request: Request<ListDeploymentsRequest>,
    ) -> Result<Response<ListDeploymentsResponse>, Status> {
        let all: Vec<_> = self.0.lock().unwrap().deployments.values().cloned().collect();
        let (deployments, next_page_token) = page(&all, &request.into_inner().page_token);
        Ok(Response::new(ListDeploymentsResponse { deployments, next_page_token }))
    }

    async fn scale_deployment(
        &self,
        request: Request<ScaleDeploymentRequest>,
    ) -> Result<Response<ScaleDeploymentResponse>, Status> {
        self.note(&request);
        let request = request.into_inner();
        let mut state = self.0.lock().unwrap();
        let deployment = state.deployments.get_mut(&request.name).ok_or_else(|| missing(&request.name))?;
        deployment.replicas = request.replicas.unwrap();
        deployment.generation += 1;
        Ok(Response::new(ScaleDeploymentResponse { deployment: Some(deployment.clone()) }))
    }

    async fn delete_deployment(
        &self,
        request: Request<DeleteDeploymentRequest>,
    ) -> Result<Response<DeleteDeploymentResponse>, Status> {
        self.note(&request);
        let name = request.into_inner().name;
        let mut deployment = self.0.lock().unwrap().deployments.remove(&name).ok_or_else(|| missing(&name))?;
        deployment.deleting = true;
        Ok(Response::new(DeleteDeploymentResponse { deployment: Some(deployment) }))
    }

    async fn list_instances(
        &self,
        request: Request<ListInstancesRequest>,
    ) -> Result<Response<ListInstancesResponse>, Status> {
        let request = request.into_inner();
        let all: Vec<_> = self.0.lock().unwrap().instances.clone();
        let of = |i: &Instance| request.deployment.is_empty() || i.deployment == request.deployment;
        let chosen: Vec<_> = all.into_iter().filter(of).collect();
        let (instances, next_page_token) = page(&chosen, &request.page_token);
        Ok(Response::new(ListInstancesResponse { instances, next_page_token }))
    }

    async fn get_instance(
        &self,
        request: Request<GetInstanceRequest>,
    ) -> Result<Response<GetInstanceResponse>, Status> {
        let id = request.into_inner().id;
        let found = self.0.lock().unwrap().instances.iter().find(|i| i.id == id).cloned();
        Ok(Response::new(GetInstanceResponse { instance: Some(found.ok_or_else(|| missing(&id))?) }))
    }

    async fn list_nodes(&self, request: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        let all: Vec<_> = self.0.lock().unwrap().nodes.clone();
        let (nodes, next_page_token) = page(&all, &request.into_inner().page_token);
        Ok(Response::new(ListNodesResponse { nodes, next_page_token }))
    }

    type WatchEventsStream = Streamed<WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let request = request.into_inner();
        let event = |revision| Event { object: "fleet".into(), reason: "Told".into(), revision, ..Default::default() };
        let mut first: Vec<_> = (1..=3).map(|n| WatchEventsResponse { event: Some(event(n)) }).collect();
        if request.object.starts_with("instance/") || request.object.starts_with("deployment/") {
            let told = self.0.lock().unwrap().events.clone();
            let about = told.into_iter().filter(|e| e.object == request.object);
            first = about.map(|event| WatchEventsResponse { event: Some(event) }).collect();
        }
        if request.follow && request.object == "quiet" {
            let quiet = tokio_stream::iter((1..=3).map(move |n| Ok(WatchEventsResponse { event: Some(event(n)) })));
            return Ok(Response::new(Box::pin(quiet.chain(tokio_stream::pending()))));
        }
        let endless: Option<fn() -> _> = request.follow.then_some(|| WatchEventsResponse {
            event: Some(Event { object: "node/a".into(), reason: "Again".into(), revision: 9, ..Default::default() }),
        });
        Ok(Response::new(streamed(first, endless)))
    }

    type StreamLogsStream = Streamed<StreamLogsResponse>;

    async fn stream_logs(
        &self,
        request: Request<StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        let request = request.into_inner();
        if request.instance == "gone" {
            let reason = status::reason::NODE_UNREACHABLE;
            return Err(status::with_reason(Code::Unavailable, reason, "node a can't be reached: look at it"));
        }
        let lines = (0..request.tail_lines).map(|n| format!("line {n}")).collect();
        Ok(Response::new(streamed(vec![StreamLogsResponse { lines }], None)))
    }

    async fn list_processes(
        &self,
        _: Request<ListProcessesRequest>,
    ) -> Result<Response<ListProcessesResponse>, Status> {
        Err(Status::unimplemented("this fake has no hosts"))
    }

    async fn stop_process(&self, _: Request<StopProcessRequest>) -> Result<Response<StopProcessResponse>, Status> {
        Err(Status::unimplemented("this fake has no hosts"))
    }

    async fn check_duplicates(
        &self,
        _: Request<CheckDuplicatesRequest>,
    ) -> Result<Response<CheckDuplicatesResponse>, Status> {
        Err(Status::unimplemented("this fake has no hosts"))
    }

    async fn cleanup_processes(
        &self,
        _: Request<CleanupProcessesRequest>,
    ) -> Result<Response<CleanupProcessesResponse>, Status> {
        Err(Status::unimplemented("this fake has no hosts"))
    }

    async fn get_freeze(&self, _: Request<GetFreezeRequest>) -> Result<Response<GetFreezeResponse>, Status> {
        Ok(Response::new(GetFreezeResponse { freeze: Some(self.0.lock().unwrap().freeze.clone()) }))
    }

    async fn override_freeze(
        &self,
        request: Request<OverrideFreezeRequest>,
    ) -> Result<Response<OverrideFreezeResponse>, Status> {
        self.note(&request);
        let (request, mut state) = (request.into_inner(), self.0.lock().unwrap());
        let until = prost_types::Timestamp { seconds: 4_000_000_000, nanos: 0 };
        state.freeze.frozen = request.for_ms == 0;
        state.freeze.override_until = (request.for_ms > 0).then_some(until);
        state.freeze.override_reason = request.reason;
        Ok(Response::new(OverrideFreezeResponse { freeze: Some(state.freeze.clone()) }))
    }

    async fn release_claim(
        &self,
        request: Request<ReleaseClaimRequest>,
    ) -> Result<Response<ReleaseClaimResponse>, Status> {
        self.note(&request);
        let request = request.into_inner();
        let state = self.0.lock().unwrap();
        let held = state.instances.iter().find(|i| i.id == request.instance && i.token.is_some());
        let Some(held) = held else {
            let what = format!("nobody holds a claim on {}", request.instance);
            return Err(status::with_reason(Code::FailedPrecondition, status::reason::NOT_CLAIMED, what));
        };
        Ok(Response::new(ReleaseClaimResponse {
            node: held.node.clone(),
            token: held.token,
            state: held.state,
            held_ms: 5000,
            avoided_until: None,
        }))
    }

    async fn end_absence(&self, request: Request<EndAbsenceRequest>) -> Result<Response<EndAbsenceResponse>, Status> {
        match request.into_inner().node.as_str() {
            "away" => {
                let absent_until = Some(prost_types::Timestamp { seconds: 60, nanos: 0 });
                Ok(Response::new(EndAbsenceResponse { absent_until, ends_within_ms: 10_000 }))
            }
            node => {
                let what = format!("the agent of {node} is not absent on purpose");
                Err(status::with_reason(Code::FailedPrecondition, status::reason::NOT_ABSENT, what))
            }
        }
    }

    async fn remove_node(&self, request: Request<RemoveNodeRequest>) -> Result<Response<RemoveNodeResponse>, Status> {
        match request.into_inner().name.as_str() {
            "gone" => Ok(Response::new(RemoveNodeResponse {})),
            name => {
                let what = format!("node {name} has a session");
                Err(status::with_reason(Code::FailedPrecondition, status::reason::SESSION_EXISTS, what))
            }
        }
    }
}

/// `drover` with its words, without any of the caller's settings.
pub fn drover(address: &str, words: &[&str]) -> tokio::process::Command {
    #[allow(clippy::disallowed_methods, reason = "a test runs the program")]
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_drover"));
    for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("DROVER_")) {
        command.env_remove(key);
    }
    command.args(["--coordinators", address]).args(words);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// Runs it to its end, which must come soon.
pub async fn run(address: &str, words: &[&str]) -> Output {
    let output = drover(address, words).output();
    tokio::time::timeout(std::time::Duration::from_secs(60), output).await.expect("drover ends").unwrap()
}

/// Exit code, standard output and standard error.
pub fn parts(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}
