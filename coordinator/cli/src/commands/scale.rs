//! `drover scale`: the number of instances of a deployment.

use super::{Context, fetch};
use crate::{arguments::Scale, failure::Failure, progress::Progress, trace::Trace, wait};
use drover_proto::v1::ScaleDeploymentRequest;

/// Scales, and waits when asked to.
pub async fn run(context: &Context, options: &Scale) -> Result<(), Failure> {
    let client = context.client()?;
    let trace = Trace::begin();
    let request = ScaleDeploymentRequest {
        name: options.name.clone(),
        replicas: Some(options.replicas),
        generation: options.generation.unwrap_or(0),
    };
    let answer = client
        .write(|mut fleet| {
            let request = trace.request(request.clone());
            async move { fleet.scale_deployment(request).await }
        })
        .await?;
    let mut deployment = answer.deployment.ok_or_else(|| fetch::empty("ScaleDeployment"))?;
    context.output.verbose(&format!("trace {}", trace.id()));
    let people = !context.output.is_json();
    if people {
        let (name, generation) = (&options.name, deployment.generation);
        context
            .output
            .line(&format!("deployment {name} is scaled to {} (generation {generation})", options.replicas))?;
    }
    if options.wait.wait {
        let progress = Progress::begin();
        let generation = deployment.generation;
        deployment = wait::until_ready(&client, &options.name, generation, options.wait.limit(), &progress).await?;
        progress.end();
        if people {
            context.output.line(&ready_line(&options.name, deployment.ready_replicas))?;
        }
    }
    if !people {
        let deployment = fetch::json("Deployment", &deployment)?;
        context.output.document(&serde_json::json!({ "deployment": deployment, "trace_id": trace.id() }))?;
    }
    Ok(())
}

/// What is said when a deployment is as it was asked for.
pub fn ready_line(name: &str, replicas: i32) -> String {
    match replicas {
        0 => format!("deployment {name} runs no instance, as asked for"),
        1 => format!("deployment {name} is ready: 1 instance answers"),
        n => format!("deployment {name} is ready: {n} instances answer"),
    }
}
