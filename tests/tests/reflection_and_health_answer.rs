//! Reflection tells the whole contract to whoever holds the secret, and health answers without it.

use anyhow::Context as _;
use drover_proto::status::{self, reason};
use drover_tests::cluster::{Cluster, Plan};
use prost::Message as _;
use prost_types::FileDescriptorProto;
use std::collections::BTreeSet;
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

const FLEET: [&str; 19] = [
    "ApplyDeployment",
    "GetDeployment",
    "ListDeployments",
    "ScaleDeployment",
    "DeleteDeployment",
    "ListInstances",
    "GetInstance",
    "ListNodes",
    "WatchEvents",
    "StreamLogs",
    "ListProcesses",
    "StopProcess",
    "CleanupProcesses",
    "CheckDuplicates",
    "GetFreeze",
    "OverrideFreeze",
    "ReleaseClaim",
    "EndAbsence",
    "RemoveNode",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reflection_and_health_answer() -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan { agents: 0, ..Plan::default() }).await?;

    let MessageResponse::ListServicesResponse(listed) =
        ask(&cluster, MessageRequest::ListServices(String::new())).await?
    else {
        anyhow::bail!("no list of services")
    };
    let services: BTreeSet<String> = listed.service.into_iter().map(|s| s.name).collect();
    for name in ["drover.v1.FleetService", "drover.v1.NodeService", "grpc.health.v1.Health"] {
        assert!(services.contains(name), "{name} is not in {services:?}");
    }
    let fleet = file(&cluster, "drover.v1.FleetService").await?;
    let methods: Vec<&str> = fleet.service[0].method.iter().map(|m| m.name()).collect();
    assert_eq!(methods, FLEET, "each method that is declared works, and is declared once");
    let types = file(&cluster, "drover.v1.DeploymentSpec").await?;
    let spec = types.message_type.iter().find(|m| m.name() == "DeploymentSpec").context("no DeploymentSpec")?;
    assert!(spec.field.iter().any(|f| f.name() == "model_path"), "{spec:?}");

    let stranger = Channel::from_shared(format!("http://{}", cluster.coordinators[0].grpc))?.connect().await?;
    let request = tokio_stream::once(request(MessageRequest::ListServices(String::new())));
    let refusal = ServerReflectionClient::new(stranger.clone()).server_reflection_info(request).await.unwrap_err();
    assert_eq!(refusal.code(), Code::Unauthenticated, "{refusal}");
    assert_eq!(status::reason_of(&refusal).as_deref(), Some(reason::UNAUTHENTICATED));

    // A probe holds no secret, and learns nothing but this.
    let mut health = HealthClient::new(stranger);
    for service in ["", "drover.v1.FleetService", "drover.v1.NodeService"] {
        let answer = health.check(HealthCheckRequest { service: service.to_owned() }).await?.into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service:?}");
    }
    let unknown = health.check(HealthCheckRequest { service: "drover.v1.Absent".to_owned() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    cluster.end().await
}

fn request(message: MessageRequest) -> ServerReflectionRequest {
    ServerReflectionRequest { host: String::new(), message_request: Some(message) }
}

/// One question to the reflection service, with the secret.
async fn ask(cluster: &Cluster, message: MessageRequest) -> anyhow::Result<MessageResponse> {
    let mut client = ServerReflectionClient::new(cluster.connect(0, None).await?);
    let mut answers = client.server_reflection_info(tokio_stream::once(request(message))).await?.into_inner();
    answers.message().await?.and_then(|answer| answer.message_response).context("no answer")
}

/// The file of the contract that defines a symbol.
async fn file(cluster: &Cluster, symbol: &str) -> anyhow::Result<FileDescriptorProto> {
    let answer = ask(cluster, MessageRequest::FileContainingSymbol(symbol.to_owned())).await?;
    let MessageResponse::FileDescriptorResponse(files) = answer else { anyhow::bail!("{symbol}: {answer:?}") };
    let bytes = files.file_descriptor_proto.first().context("no file")?;
    Ok(FileDescriptorProto::decode(bytes.as_slice())?)
}
