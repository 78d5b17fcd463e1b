//! What `adopt` and `overhead` share: one host with many idle servers.

use drover_proto::v1::{Instance, ListInstancesRequest, ListProcessesRequest, ProcessOwner};
use drover_tests::cluster::{Cluster, Plan};
use std::collections::BTreeSet;

const NAME: &str = "idle";

/// A fleet of one coordinator and one agent, with this many servers that are ready and have nothing to do.
pub async fn fleet(servers: i32, plan: Plan) -> anyhow::Result<Cluster> {
    let cluster = Cluster::start(plan).await?;
    eprintln!("{servers} servers are started");
    let mut spec = cluster.spec(NAME, servers);
    spec.context_tokens = Some(512);
    spec.slots = Some(1);
    cluster.deploy(spec).await?;
    Ok(cluster)
}

/// Ends them and the fleet.
pub async fn end(cluster: Cluster) -> anyhow::Result<()> {
    cluster.delete(NAME).await?;
    cluster.end().await
}

/// All instances, as the API tells.
pub async fn instances(cluster: &Cluster) -> anyhow::Result<Vec<Instance>> {
    let request = ListInstancesRequest { deployment: NAME.to_owned(), page_size: 1000, ..Default::default() };
    Ok(cluster.client(0).await?.list_instances(request).await?.into_inner().instances)
}

/// The servers that the agent itself, asked through the API, says are its own.
pub async fn owned(cluster: &Cluster) -> anyhow::Result<BTreeSet<i64>> {
    let request = ListProcessesRequest { page_size: 1000, ..ListProcessesRequest::default() };
    let answer = cluster.client(0).await?.list_processes(request).await?.into_inner();
    let owned = answer.processes.into_iter().filter(|p| p.owner() == ProcessOwner::Owned);
    Ok(owned.map(|p| p.pid).collect())
}
