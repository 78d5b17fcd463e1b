//! `drover delete`: drain and stop all instances of a deployment, then remove it.

use super::{Context, fetch};
use crate::{arguments::Delete, failure::Failure, progress::Progress, trace::Trace, wait};
use drover_proto::v1::DeleteDeploymentRequest;

/// Orders the deletion, and waits until it is gone when asked to.
pub async fn run(context: &Context, options: &Delete) -> Result<(), Failure> {
    let client = context.client()?;
    let trace = Trace::begin();
    let request =
        DeleteDeploymentRequest { name: options.name.clone(), generation: options.generation.unwrap_or_default() };
    let answer = client
        .write(|mut fleet| {
            let request = trace.request(request.clone());
            async move { fleet.delete_deployment(request).await }
        })
        .await?;
    let deployment = answer.deployment.ok_or_else(|| fetch::empty("DeleteDeployment"))?;
    context.output.verbose(&format!("trace {}", trace.id()));
    let people = !context.output.is_json();
    if people {
        context.output.line(&format!("deployment {} is being deleted", options.name))?;
    }
    if options.wait.wait {
        let progress = Progress::begin();
        wait::until_gone(&client, &options.name, options.wait.limit(), &progress).await?;
        progress.end();
        if people {
            context.output.line(&format!("deployment {} is gone", options.name))?;
        }
    }
    if !people {
        let deployment = fetch::json("Deployment", &deployment)?;
        let document =
            serde_json::json!({ "deployment": deployment, "gone": options.wait.wait, "trace_id": trace.id() });
        context.output.document(&document)?;
    }
    Ok(())
}
