//! `drover end-absence`: waits no longer for an agent that has left.

use super::{Context, fetch};
use crate::{arguments::EndAbsence, clock, failure::Failure, output, trace::Trace};
use drover_proto::v1::EndAbsenceRequest;

/// Ends it.
pub async fn run(context: &Context, options: &EndAbsence) -> Result<(), Failure> {
    let (client, trace) = (context.client()?, Trace::begin());
    let request = EndAbsenceRequest { node: options.node.clone(), reason: options.reason.clone().unwrap_or_default() };
    let answer = client
        .write(|mut fleet| {
            let request = trace.request(request.clone());
            async move { fleet.end_absence(request).await }
        })
        .await?;
    context.output.verbose(&format!("trace {}", trace.id()));
    if context.output.is_json() {
        return context.output.document(&fetch::json("EndAbsenceResponse", &answer)?);
    }
    context.output.line(&format!(
        "the agent of {}, which meant to be back until {}, is waited for no longer: its session ends within {}",
        output::printable(&options.node),
        clock::utc(answer.absent_until.as_ref()),
        clock::age(answer.ends_within_ms / 1000)
    ))
}
