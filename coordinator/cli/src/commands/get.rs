//! `drover get`: deployments, instances and nodes.

use super::{Context, fetch};
use crate::{
    arguments::{Get, Kind},
    clock,
    failure::Failure,
    output::{Output, tables},
};
use drover_proto::v1::{Deployment, Instance, Node};
use serde_json::json;

/// Shows all of a kind, or the one named.
pub async fn run(context: &Context, options: &Get) -> Result<(), Failure> {
    if options.kind != Kind::Instances && (options.deployment.is_some() || options.node.is_some()) {
        return Err(Failure::Input(
            "--deployment and --node choose among instances: use `drover get instances`".into(),
        ));
    }
    let client = context.client()?;
    let output = &context.output;
    match (options.kind, options.name.as_deref()) {
        (Kind::Deployments, None) => show_deployments(output, &fetch::deployments(&client).await?),
        (Kind::Deployments, Some(name)) => {
            let found = fetch::deployment(&client, name).await?;
            let one = found.ok_or_else(|| missing("deployment", name, "drover get deployments"))?;
            if output.is_json() {
                return output.document(&fetch::json("Deployment", &one)?);
            }
            show_deployments(output, &[one])
        }
        (Kind::Instances, None) => {
            let deployment = options.deployment.as_deref().unwrap_or_default();
            let node = options.node.as_deref().unwrap_or_default();
            show_instances(output, &fetch::instances(&client, deployment, node).await?)
        }
        (Kind::Instances, Some(id)) => {
            let one = fetch::instance(&client, id).await?;
            if output.is_json() {
                return output.document(&fetch::json("Instance", &one)?);
            }
            show_instances(output, &[one])
        }
        (Kind::Nodes, None) => show_nodes(output, &fetch::nodes(&client).await?),
        (Kind::Nodes, Some(name)) => {
            let found = fetch::nodes(&client).await?.into_iter().find(|n| n.name == name);
            let one = found.ok_or_else(|| missing("node", name, "drover get nodes"))?;
            if output.is_json() {
                return output.document(&fetch::json("Node", &one)?);
            }
            show_nodes(output, &[one])
        }
    }
}

fn missing(kind: &str, name: &str, way_out: &str) -> Failure {
    Failure::Answered(format!("there is no {kind} \"{}\": `{way_out}` lists them", crate::output::printable(name)))
}

/// Deployments as a table or a document.
pub fn show_deployments(output: &Output, list: &[Deployment]) -> Result<(), Failure> {
    if output.is_json() {
        return output.document(&json!({ "deployments": fetch::json_list("Deployment", list)? }));
    }
    let rows = tables::deployments(list, clock::now_seconds());
    output.table(&tables::DEPLOYMENTS, rows, "no deployments: `drover apply -f FILE` makes one")
}

/// Instances as a table or a document.
pub fn show_instances(output: &Output, list: &[Instance]) -> Result<(), Failure> {
    if output.is_json() {
        return output.document(&json!({ "instances": fetch::json_list("Instance", list)? }));
    }
    output.table(&tables::INSTANCES, tables::instances(list, clock::now_seconds()), "no instances")
}

/// Nodes as a table or a document.
pub fn show_nodes(output: &Output, list: &[Node]) -> Result<(), Failure> {
    if output.is_json() {
        return output.document(&json!({ "nodes": fetch::json_list("Node", list)? }));
    }
    let rows = tables::nodes(list, clock::now_seconds());
    output.table(&tables::NODES, rows, "no nodes: start a drover-agent that names this coordinator")
}
