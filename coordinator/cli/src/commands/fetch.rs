//! Reading what the coordinators know: single objects, and lists over all their pages.

use crate::{client::Client, failure::Failure};
use drover_proto::{
    limits, text,
    v1::{
        Deployment, Event, GetDeploymentRequest, GetInstanceRequest, HostProcess, Instance, ListDeploymentsRequest,
        ListInstancesRequest, ListNodesRequest, ListProcessesRequest, Node, NodeFailure, NotListed, WatchEventsRequest,
    },
};

/// Most results of one page.
const PAGE_SIZE: i32 = limits::PAGE_SIZE_MAX as i32;

/// A deployment by name; `None` when there is none of that name.
pub async fn deployment(client: &Client, name: &str) -> Result<Option<Deployment>, Failure> {
    let answer = client
        .read(|mut fleet| async move {
            match fleet.get_deployment(GetDeploymentRequest { name: name.to_owned() }).await {
                Err(status) if status.code() == tonic::Code::NotFound => Ok(tonic::Response::new(None)),
                other => other.map(|response| response.map(Some)),
            }
        })
        .await?;
    match answer {
        None => Ok(None),
        Some(response) => response.deployment.map(Some).ok_or_else(|| empty("GetDeployment")),
    }
}

/// An instance by id.
pub async fn instance(client: &Client, id: &str) -> Result<Instance, Failure> {
    let request = || GetInstanceRequest { id: id.to_owned() };
    let answer = client.read(|mut fleet| async move { fleet.get_instance(request()).await }).await?;
    answer.instance.ok_or_else(|| empty("GetInstance"))
}

/// All deployments, by name.
pub async fn deployments(client: &Client) -> Result<Vec<Deployment>, Failure> {
    let (mut all, mut token) = (Vec::new(), String::new());
    loop {
        let request = || ListDeploymentsRequest { page_size: PAGE_SIZE, page_token: token.clone() };
        let page = client
            .read(|mut fleet| {
                let r = request();
                async move { fleet.list_deployments(r).await }
            })
            .await?;
        all.extend(page.deployments);
        if !further(&mut token, page.next_page_token)? {
            return Ok(all);
        }
    }
}

/// All instances, by id; of one deployment or node unless these are empty.
pub async fn instances(client: &Client, deployment: &str, node: &str) -> Result<Vec<Instance>, Failure> {
    let (mut all, mut token) = (Vec::new(), String::new());
    loop {
        let request = || ListInstancesRequest {
            deployment: deployment.to_owned(),
            node: node.to_owned(),
            page_size: PAGE_SIZE,
            page_token: token.clone(),
        };
        let page = client
            .read(|mut fleet| {
                let r = request();
                async move { fleet.list_instances(r).await }
            })
            .await?;
        all.extend(page.instances);
        if !further(&mut token, page.next_page_token)? {
            return Ok(all);
        }
    }
}

/// All nodes, by name.
pub async fn nodes(client: &Client) -> Result<Vec<Node>, Failure> {
    let (mut all, mut token) = (Vec::new(), String::new());
    loop {
        let request = || ListNodesRequest { page_size: PAGE_SIZE, page_token: token.clone() };
        let page = client
            .read(|mut fleet| {
                let r = request();
                async move { fleet.list_nodes(r).await }
            })
            .await?;
        all.extend(page.nodes);
        if !further(&mut token, page.next_page_token)? {
            return Ok(all);
        }
    }
}

/// What nodes say of their llama-server processes.
#[derive(Debug)]
pub struct Listed {
    /// By node and pid.
    pub processes: Vec<HostProcess>,
    /// Nodes that did not answer.
    pub unreachable: Vec<NodeFailure>,
    /// Nodes that have more than is listed.
    pub not_listed: Vec<NotListed>,
}

/// The llama-server processes of a node, or of all when it is empty.
pub async fn processes(client: &Client, node: &str) -> Result<Listed, Failure> {
    let (mut processes, mut token) = (Vec::new(), String::new());
    loop {
        let request =
            || ListProcessesRequest { node: node.to_owned(), page_size: PAGE_SIZE, page_token: token.clone() };
        let page = client
            .read(|mut fleet| {
                let r = request();
                async move { fleet.list_processes(r).await }
            })
            .await?;
        processes.extend(page.processes);
        if !further(&mut token, page.next_page_token)? {
            return Ok(Listed { processes, unreachable: page.unreachable, not_listed: page.not_listed });
        }
    }
}

/// The events that are kept about an object, oldest first. How long their stream may take is the caller's to limit.
pub async fn recorded_events(client: &Client, object: &str) -> Result<Vec<Event>, Failure> {
    let request = || WatchEventsRequest { object: object.to_owned(), ..Default::default() };
    let mut stream = client.read(|mut fleet| async move { fleet.watch_events(request()).await }).await?;
    let mut all = Vec::new();
    while let Some(answer) = stream.message().await.map_err(|status| Failure::of_status(&status))? {
        all.extend(answer.event);
    }
    Ok(all)
}

/// Whether there is a next page. One that begins where the last one began would never end.
fn further(token: &mut String, next: String) -> Result<bool, Failure> {
    if next.is_empty() {
        return Ok(false);
    }
    if *token == next {
        return Err(Failure::Answered("the coordinator answered with the same page twice".to_owned()));
    }
    *token = next;
    Ok(true)
}

/// A message of the contract as JSON; `name` without its package.
pub fn json(name: &str, message: &impl prost::Message) -> Result<serde_json::Value, Failure> {
    text::to_json(&format!("drover.v1.{name}"), message).map_err(|e| Failure::Answered(e.to_string()))
}

/// Several messages of the contract as a JSON array.
pub fn json_list(name: &str, messages: &[impl prost::Message]) -> Result<serde_json::Value, Failure> {
    Ok(serde_json::Value::Array(messages.iter().map(|m| json(name, m)).collect::<Result<_, _>>()?))
}

/// The answer lacks what it promises.
pub fn empty(call: &str) -> Failure {
    Failure::Answered(format!("the coordinator's answer to {call} is empty: it is of another version?"))
}
