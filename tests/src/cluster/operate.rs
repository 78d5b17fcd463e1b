//! What an operator does with a fleet, and what tests wait for.

use super::{Cluster, SECRET, SOON};
use crate::programs::{eventually, program};
use anyhow::{Context as _, bail, ensure};
use drover_proto::{
    transport::{Connection, Secret, Security, Target},
    v1::{
        ApplyDeploymentRequest, DeleteDeploymentRequest, Deployment, DeploymentSpec, Event, GetDeploymentRequest,
        Instance, InstanceState, ListInstancesRequest, ListNodesRequest, Node, WatchEventsRequest,
        fleet_service_client::FleetServiceClient,
    },
};
use std::process::Command;

impl Cluster {
    /// A connection to a coordinator, as an operator.
    ///
    /// # Errors
    /// When it can't be reached.
    pub async fn client(&self, n: usize) -> anyhow::Result<FleetServiceClient<Connection>> {
        Ok(FleetServiceClient::new(self.connect(n, None).await?))
    }

    /// A connection to a coordinator, as a node when one is named.
    ///
    /// # Errors
    /// When it can't be reached.
    pub async fn connect(&self, n: usize, node: Option<&str>) -> anyhow::Result<Connection> {
        let security = Security { secret: Secret::new(SECRET), allow_plaintext: false };
        Ok(Target::new(&[self.coordinators[n].grpc.clone()], &security, node)?.connect(0).await?)
    }

    /// A deployment of the tiny model.
    #[must_use]
    pub fn spec(&self, name: &str, replicas: i32) -> DeploymentSpec {
        DeploymentSpec {
            name: name.to_owned(),
            model_path: "tiny.gguf".to_owned(),
            replicas: Some(replicas),
            slots: Some(2),
            context_tokens: Some(2048),
            threads: Some(1),
            memory_bytes: Some(256 << 20),
            drain_timeout_ms: Some(20_000),
            ..DeploymentSpec::default()
        }
    }

    /// Applies a new deployment and waits until all of its instances are ready.
    ///
    /// # Errors
    /// When it is refused or does not become ready.
    pub async fn deploy(&self, spec: DeploymentSpec) -> anyhow::Result<Vec<Instance>> {
        let (name, replicas) = (spec.name.clone(), spec.replicas.unwrap_or(1));
        self.client(self.asked)
            .await?
            .apply_deployment(ApplyDeploymentRequest { spec: Some(spec), generation: 0 })
            .await?;
        self.ready(&name, replicas).await
    }

    /// Runs `drover` against a coordinator; its exit code, what it printed and what it said beside that.
    ///
    /// # Errors
    /// When it can't be run.
    pub fn drover(&self, coordinator: usize, words: &[&str]) -> anyhow::Result<(Option<i32>, String, String)> {
        let mut command = Command::new(program("drover"));
        command.args(["--coordinators", &self.coordinators[coordinator].grpc, "--join-secret-file"]);
        let output = command.arg(self.folder().join("secret")).args(words).output()?;
        Ok((output.status.code(), String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?))
    }

    /// Waits until exactly this many instances of a deployment exist, all ready.
    ///
    /// # Errors
    /// When they do not become so in time; says how they are.
    pub async fn ready(&self, name: &str, replicas: i32) -> anyhow::Result<Vec<Instance>> {
        let mut client = self.client(self.asked).await?;
        let what = format!("{replicas} instances of {name} are ready");
        let outcome = eventually(&what, SOON * 2, async || {
            let request = ListInstancesRequest { deployment: name.to_owned(), page_size: 1000, ..Default::default() };
            let instances = client.list_instances(request).await?.into_inner().instances;
            let ready = instances.iter().filter(|i| i.state() == InstanceState::Ready && i.wanted).count();
            ensure!(ready == instances.len() && ready == usize::try_from(replicas)?, "{instances:#?}");
            Ok(instances)
        });
        outcome.await.with_context(|| self.logs())
    }

    /// A deployment.
    ///
    /// # Errors
    /// When there is none.
    pub async fn deployment(&self, name: &str) -> anyhow::Result<Deployment> {
        let request = GetDeploymentRequest { name: name.to_owned() };
        self.client(self.asked)
            .await?
            .get_deployment(request)
            .await?
            .into_inner()
            .deployment
            .context("no deployment in the answer")
    }

    /// Deletes a deployment and waits until it is gone.
    ///
    /// # Errors
    /// When it is refused or does not go.
    pub async fn delete(&self, name: &str) -> anyhow::Result<()> {
        let mut client = self.client(self.asked).await?;
        client.delete_deployment(DeleteDeploymentRequest { name: name.to_owned(), generation: 0 }).await?;
        let what = format!("{name} is gone");
        let gone = eventually(&what, SOON * 2, async || {
            match client.get_deployment(GetDeploymentRequest { name: name.to_owned() }).await {
                Err(status) if status.code() == tonic::Code::NotFound => Ok(()),
                Err(status) => Err(status.into()),
                Ok(answer) => bail!("{:?}", answer.into_inner()),
            }
        });
        gone.await.with_context(|| self.logs())
    }

    /// All nodes, by name, as a coordinator shows them.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn nodes(&self) -> anyhow::Result<Vec<Node>> {
        Ok(self.client(self.asked).await?.list_nodes(ListNodesRequest::default()).await?.into_inner().nodes)
    }

    /// All instances, as a coordinator shows them.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn instances(&self) -> anyhow::Result<Vec<Instance>> {
        let request = ListInstancesRequest { page_size: 1000, ..Default::default() };
        Ok(self.client(self.asked).await?.list_instances(request).await?.into_inner().instances)
    }

    /// The recorded events of an object, oldest first: "node/a", "fleet", "" for all.
    ///
    /// # Errors
    /// When they can't be read.
    pub async fn events(&self, object: &str) -> anyhow::Result<Vec<Event>> {
        let request = WatchEventsRequest { object: object.to_owned(), ..WatchEventsRequest::default() };
        let mut stream = self.client(self.asked).await?.watch_events(request).await?.into_inner();
        let mut events = Vec::new();
        while let Some(answer) = stream.message().await? {
            events.extend(answer.event);
        }
        Ok(events)
    }

    /// Waits until this many nodes are connected.
    ///
    /// # Errors
    /// When they are not in time.
    pub async fn connected(&self, nodes: usize) -> anyhow::Result<()> {
        let mut client = self.client(self.asked).await?;
        eventually(&format!("{nodes} nodes are connected"), SOON, async || {
            let listed = client.list_nodes(ListNodesRequest::default()).await?.into_inner().nodes;
            let connected = listed.iter().filter(|n| n.connected).count();
            ensure!(connected == nodes, "{connected} are");
            Ok(())
        })
        .await
    }
}
