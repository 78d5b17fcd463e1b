//! `drover freeze`: whether nothing is replaced, and the operator's word on it.

use super::{Context, fetch};
use crate::{
    arguments::{Freeze, FreezeCommand},
    clock,
    failure::Failure,
    output,
    trace::Trace,
};
use drover_proto::v1::{self, GetFreezeRequest, OverrideFreezeRequest};

/// Shows it, or overrides it first.
pub async fn run(context: &Context, options: &Freeze) -> Result<(), Failure> {
    let client = context.client()?;
    let (for_ms, reason) = match &options.command {
        None => {
            let answer = client.read(|mut fleet| async move { fleet.get_freeze(GetFreezeRequest {}).await }).await?;
            return show(context, &answer.freeze.ok_or_else(|| fetch::empty("GetFreeze"))?);
        }
        Some(FreezeCommand::Override(options)) => (options.for_s * 1000, options.reason.clone().unwrap_or_default()),
        Some(FreezeCommand::EndOverride) => (0, String::new()),
    };
    let (trace, request) = (Trace::begin(), OverrideFreezeRequest { for_ms, reason });
    let answer = client
        .write(|mut fleet| {
            let request = trace.request(request.clone());
            async move { fleet.override_freeze(request).await }
        })
        .await?;
    context.output.verbose(&format!("trace {}", trace.id()));
    show(context, &answer.freeze.ok_or_else(|| fetch::empty("OverrideFreeze"))?)
}

fn show(context: &Context, freeze: &v1::Freeze) -> Result<(), Failure> {
    if context.output.is_json() {
        return context.output.document(&fetch::json("Freeze", freeze)?);
    }
    context.output.line(&sentence(freeze))
}

/// For people.
fn sentence(freeze: &v1::Freeze) -> String {
    let lost = format!("{} of {} nodes seen in the last hour are lost", freeze.lost, freeze.seen);
    let share = freeze.share_percent;
    if let Some(until) = &freeze.override_until {
        let (until, by) = (clock::utc(Some(until)), output::printable(&freeze.override_by));
        let why = match freeze.override_reason.as_str() {
            "" => String::new(),
            reason => format!(" ({})", output::printable(reason)),
        };
        return format!("not frozen: overridden until {until} by {by}{why}; {lost}, {share} % may be");
    }
    if freeze.frozen {
        format!(
            "FROZEN: {lost}, more than {share} %: nothing that was owned is claimed elsewhere; when they are really gone: \
             drover freeze override --for SECONDS, or drover remove-node NAME"
        )
    } else {
        format!("not frozen: {lost}, {share} % may be")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sentence_says_how_it_is_and_the_way_out() {
        let frozen = v1::Freeze { frozen: true, lost: 3, seen: 5, share_percent: 55, ..v1::Freeze::default() };
        let said = sentence(&frozen);
        assert!(said.starts_with("FROZEN: 3 of 5 nodes") && said.contains("drover freeze override"), "{said}");
        let override_until = Some(prost_types::Timestamp { seconds: 0, nanos: 0 });
        let overridden = v1::Freeze { frozen: false, override_until, override_by: "ada".to_owned(), ..frozen.clone() };
        assert!(sentence(&overridden).contains("overridden until 1970-01-01") && sentence(&overridden).contains("ada"));
        assert!(sentence(&v1::Freeze { frozen: false, ..frozen }).starts_with("not frozen: 3 of 5"));
    }
}
