//! `FleetService`.

use super::{
    convert,
    deployments::{self, Deployments},
    events, logs,
    nodes::Nodes,
    page,
    processes::{self, Processes},
    release::Release,
};
use crate::{
    control::{commands::Commands, events::Events, view::View},
    plan::{self, snapshot::Snapshot},
    store::Store,
};
use drover_proto::{
    ids,
    status::{invalid_field, reason, with_reason},
    v1::{self, fleet_service_server::FleetService},
};
use futures::{StreamExt as _, stream::BoxStream};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};
use tracing::Instrument as _;

/// The service.
#[derive(Debug, Clone)]
pub struct Fleet {
    store: Store,
    view: View,
    deployments: Deployments,
    processes: Processes,
    nodes: Nodes,
    release: Release,
    proxies: crate::gateway::ProxyClient,
    stop: CancellationToken,
}

impl Fleet {
    /// The service over these parts.
    #[must_use]
    pub fn new(
        store: Store,
        view: View,
        events: Events,
        proxies: crate::gateway::ProxyClient,
        planning: &plan::Settings,
        stop: CancellationToken,
    ) -> Self {
        let deployments = Deployments { store: store.clone(), view: view.clone(), events: events.clone() };
        let commands = Commands::new(store.clone(), view.clone());
        let nodes = Nodes {
            store: store.clone(),
            view: view.clone(),
            events: events.clone(),
            freeze_share_percent: planning.freeze_share_percent,
            session_ttl_ms: planning.grace_ms,
        };
        let (to, seen, told) = (store.clone(), view.clone(), events.clone());
        let release = Release { store: to, view: seen, events: told, delays: planning.avoid };
        let processes = Processes { store: store.clone(), view: view.clone(), events, commands };
        Self { store, view, deployments, processes, nodes, release, proxies, stop }
    }

    /// A stream that ends, with an error that tells the caller to go elsewhere, when this coordinator goes away.
    fn until_stop<T: Send + 'static>(&self, stream: Answers<T>) -> Answers<T> {
        let stop = self.stop.clone();
        let away = futures::stream::once(async move {
            let what = "this coordinator is shutting down: ask another one, and go on from the last revision seen";
            stop.is_cancelled().then(|| Err(with_reason(Code::Unavailable, reason::STORE_UNAVAILABLE, what)))
        });
        stream.take_until(self.stop.clone().cancelled_owned()).chain(away.filter_map(futures::future::ready)).boxed()
    }

    fn snapshot(&self) -> Result<Arc<Snapshot>, Status> {
        let snapshot = self.view.snapshot();
        if snapshot.revision == 0 {
            let what = "this coordinator has not read the store yet: try again, or ask another one";
            return Err(with_reason(Code::Unavailable, reason::STORE_UNAVAILABLE, what));
        }
        Ok(snapshot)
    }

    /// For calls that change something. A store that is not the one it was also has no word on what need not be changed.
    fn changeable(&self) -> Result<(), Status> {
        self.snapshot()?;
        let refused = self.view.refused().borrow().clone();
        refused.map_or(Ok(()), |why| Err(with_reason(Code::Unavailable, reason::STORE_CHANGED, why)))
    }

    fn show(&self, snapshot: &Snapshot, stored: &drover_proto::store::v1::Deployment) -> v1::Deployment {
        convert::deployment(snapshot, stored)
    }
}

type Answers<T> = BoxStream<'static, Result<T, Status>>;

/// A span for a call that changes something, continuing the caller's trace.
macro_rules! call_span {
    ($request:expr, $name:literal) => {{
        let span = tracing::info_span!($name);
        drover_telemetry::context::set_parent(&span, &drover_telemetry::context::extract_metadata($request.metadata()));
        span
    }};
}

#[tonic::async_trait]
impl FleetService for Fleet {
    async fn apply_deployment(
        &self,
        request: Request<v1::ApplyDeploymentRequest>,
    ) -> Result<Response<v1::ApplyDeploymentResponse>, Status> {
        self.changeable()?;
        let span = call_span!(request, "fleet.apply_deployment");
        let (stored, changed) = self.deployments.apply(request.into_inner()).instrument(span).await?;
        let deployment = Some(self.show(&self.view.snapshot(), &stored));
        Ok(Response::new(v1::ApplyDeploymentResponse { deployment, changed }))
    }

    async fn get_deployment(
        &self,
        request: Request<v1::GetDeploymentRequest>,
    ) -> Result<Response<v1::GetDeploymentResponse>, Status> {
        let snapshot = self.snapshot()?;
        let stored = deployments::find(&snapshot, &request.into_inner().name)?;
        Ok(Response::new(v1::GetDeploymentResponse { deployment: Some(self.show(&snapshot, stored)) }))
    }

    async fn list_deployments(
        &self,
        request: Request<v1::ListDeploymentsRequest>,
    ) -> Result<Response<v1::ListDeploymentsResponse>, Status> {
        let (request, snapshot) = (request.into_inner(), self.snapshot()?);
        let (page, next_page_token) = page::cut(snapshot.deployments.iter(), request.page_size, &request.page_token)?;
        let deployments = page.into_iter().map(|(_, d)| self.show(&snapshot, &d.value)).collect();
        Ok(Response::new(v1::ListDeploymentsResponse { deployments, next_page_token }))
    }

    async fn scale_deployment(
        &self,
        request: Request<v1::ScaleDeploymentRequest>,
    ) -> Result<Response<v1::ScaleDeploymentResponse>, Status> {
        self.changeable()?;
        let span = call_span!(request, "fleet.scale_deployment");
        let stored = self.deployments.scale(request.into_inner()).instrument(span).await?;
        let deployment = Some(self.show(&self.view.snapshot(), &stored));
        Ok(Response::new(v1::ScaleDeploymentResponse { deployment }))
    }

    async fn delete_deployment(
        &self,
        request: Request<v1::DeleteDeploymentRequest>,
    ) -> Result<Response<v1::DeleteDeploymentResponse>, Status> {
        self.changeable()?;
        let span = call_span!(request, "fleet.delete_deployment");
        let stored = self.deployments.delete(request.into_inner()).instrument(span).await?;
        let deployment = Some(self.show(&self.view.snapshot(), &stored));
        Ok(Response::new(v1::DeleteDeploymentResponse { deployment }))
    }

    async fn list_instances(
        &self,
        request: Request<v1::ListInstancesRequest>,
    ) -> Result<Response<v1::ListInstancesResponse>, Status> {
        let (request, snapshot) = (request.into_inner(), self.snapshot()?);
        let owner = |id: &String| snapshot.claims.get(id).map_or("", |c| c.value.node.as_str());
        let chosen = snapshot.instances.iter().filter(|(id, i)| {
            (request.deployment.is_empty() || i.value.deployment == request.deployment)
                && (request.node.is_empty() || owner(id) == request.node)
        });
        let (page, next_page_token) = page::cut(chosen, request.page_size, &request.page_token)?;
        let instances = page.into_iter().map(|(id, i)| convert::instance(&snapshot, id, i)).collect();
        Ok(Response::new(v1::ListInstancesResponse { instances, next_page_token }))
    }

    async fn get_instance(
        &self,
        request: Request<v1::GetInstanceRequest>,
    ) -> Result<Response<v1::GetInstanceResponse>, Status> {
        let (id, snapshot) = (request.into_inner().id, self.snapshot()?);
        ids::check_instance_id(&id).map_err(|e| invalid_field("id", e.to_string()))?;
        let stored = snapshot.instances.get(&id).ok_or_else(|| convert::no_instance(&id))?;
        Ok(Response::new(v1::GetInstanceResponse { instance: Some(convert::instance(&snapshot, &id, stored)) }))
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let (request, snapshot) = (request.into_inner(), self.snapshot()?);
        let (page, next_page_token) = page::cut(snapshot.nodes.iter(), request.page_size, &request.page_token)?;
        let nodes = page.into_iter().map(|(name, n)| convert::node(&snapshot, name, n)).collect();
        Ok(Response::new(v1::ListNodesResponse { nodes, next_page_token }))
    }

    type WatchEventsStream = Answers<v1::WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let stream = events::watch(self.store.clone(), request.into_inner()).await?;
        Ok(Response::new(self.until_stop(stream)))
    }

    type StreamLogsStream = Answers<v1::StreamLogsResponse>;

    async fn stream_logs(
        &self,
        request: Request<v1::StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        let snapshot = self.snapshot()?;
        let stream = logs::stream(&snapshot, &self.proxies, request.into_inner()).await?;
        Ok(Response::new(self.until_stop(stream)))
    }

    async fn list_processes(
        &self,
        request: Request<v1::ListProcessesRequest>,
    ) -> Result<Response<v1::ListProcessesResponse>, Status> {
        self.snapshot()?;
        Ok(Response::new(self.processes.list(request.into_inner()).await?))
    }

    async fn stop_process(
        &self,
        request: Request<v1::StopProcessRequest>,
    ) -> Result<Response<v1::StopProcessResponse>, Status> {
        self.changeable()?;
        let (span, who) = (call_span!(request, "fleet.stop_process"), processes::caller(&request));
        Ok(Response::new(self.processes.stop(&who, request.into_inner()).instrument(span).await?))
    }

    async fn check_duplicates(
        &self,
        _: Request<v1::CheckDuplicatesRequest>,
    ) -> Result<Response<v1::CheckDuplicatesResponse>, Status> {
        self.snapshot()?;
        Ok(Response::new(self.processes.check_duplicates().await?))
    }

    async fn cleanup_processes(
        &self,
        request: Request<v1::CleanupProcessesRequest>,
    ) -> Result<Response<v1::CleanupProcessesResponse>, Status> {
        self.changeable()?;
        let (span, who) = (call_span!(request, "fleet.cleanup_processes"), processes::caller(&request));
        Ok(Response::new(self.processes.clean_up(&who, request.into_inner()).instrument(span).await?))
    }

    async fn get_freeze(&self, _: Request<v1::GetFreezeRequest>) -> Result<Response<v1::GetFreezeResponse>, Status> {
        self.snapshot()?;
        Ok(Response::new(v1::GetFreezeResponse { freeze: Some(self.nodes.freeze()) }))
    }

    async fn override_freeze(
        &self,
        request: Request<v1::OverrideFreezeRequest>,
    ) -> Result<Response<v1::OverrideFreezeResponse>, Status> {
        self.changeable()?;
        let (span, who) = (call_span!(request, "fleet.override_freeze"), processes::caller(&request));
        let freeze = self.nodes.override_freeze(&who, request.into_inner()).instrument(span).await?;
        Ok(Response::new(v1::OverrideFreezeResponse { freeze: Some(freeze) }))
    }

    async fn release_claim(
        &self,
        request: Request<v1::ReleaseClaimRequest>,
    ) -> Result<Response<v1::ReleaseClaimResponse>, Status> {
        self.changeable()?;
        let (span, who) = (call_span!(request, "fleet.release_claim"), processes::caller(&request));
        Ok(Response::new(self.release.release(&who, request.into_inner()).instrument(span).await?))
    }

    async fn end_absence(
        &self,
        request: Request<v1::EndAbsenceRequest>,
    ) -> Result<Response<v1::EndAbsenceResponse>, Status> {
        self.changeable()?;
        let (span, who) = (call_span!(request, "fleet.end_absence"), processes::caller(&request));
        Ok(Response::new(self.nodes.end_absence(&who, request.into_inner()).instrument(span).await?))
    }

    async fn remove_node(
        &self,
        request: Request<v1::RemoveNodeRequest>,
    ) -> Result<Response<v1::RemoveNodeResponse>, Status> {
        self.changeable()?;
        let (span, who) = (call_span!(request, "fleet.remove_node"), processes::caller(&request));
        self.nodes.remove(&who, request.into_inner()).instrument(span).await?;
        Ok(Response::new(v1::RemoveNodeResponse {}))
    }
}
