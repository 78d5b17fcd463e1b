//! `drover remove-node`: forgets a node.

use super::Context;
use crate::{arguments::RemoveNode, failure::Failure, output, trace::Trace};
use drover_proto::v1::RemoveNodeRequest;

/// Removes it.
pub async fn run(context: &Context, options: &RemoveNode) -> Result<(), Failure> {
    let (client, trace) = (context.client()?, Trace::begin());
    let request = RemoveNodeRequest { name: options.name.clone(), reason: options.reason.clone().unwrap_or_default() };
    client
        .write(|mut fleet| {
            let request = trace.request(request.clone());
            async move { fleet.remove_node(request).await }
        })
        .await?;
    context.output.verbose(&format!("trace {}", trace.id()));
    if context.output.is_json() {
        return context.output.document(&serde_json::json!({ "removed": options.name, "trace_id": trace.id() }));
    }
    context.output.line(&format!("node {} is forgotten", output::printable(&options.name)))
}
