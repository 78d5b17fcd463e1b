//! Which traces are recorded: the standard variables `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG`, and a count of what
//! they leave out.

use crate::mapped::Counters;
use opentelemetry::{
    Context, KeyValue,
    trace::{Link, SpanKind, TraceId},
};
use opentelemetry_sdk::trace::{Sampler, SamplingDecision, SamplingResult, ShouldSample};
use std::sync::Arc;

/// The sampler that the variables ask for, by default `parentbased_always_on`. The text is a warning about a value that is
/// not used, as the specification wants it.
pub(crate) fn from_environment(get: impl Fn(&str) -> Option<String>) -> (Sampler, Option<String>) {
    let based = |root: Sampler| Sampler::ParentBased(Box::new(root));
    let name = get("OTEL_TRACES_SAMPLER").unwrap_or_default();
    let mut warning = None;
    let ratio = |warning: &mut Option<String>| match get("OTEL_TRACES_SAMPLER_ARG").map(|text| (text.parse(), text)) {
        None => 1.0,
        Some((Ok(ratio), _)) if (0.0..=1.0).contains(&ratio) => ratio,
        Some((_, text)) => {
            *warning = Some(format!("OTEL_TRACES_SAMPLER_ARG = \"{text}\" is no number from 0 to 1: using 1"));
            1.0
        }
    };
    let sampler = match name.as_str() {
        "" | "parentbased_always_on" => based(Sampler::AlwaysOn),
        "always_on" => Sampler::AlwaysOn,
        "always_off" => Sampler::AlwaysOff,
        "parentbased_always_off" => based(Sampler::AlwaysOff),
        "traceidratio" => Sampler::TraceIdRatioBased(ratio(&mut warning)),
        "parentbased_traceidratio" => based(Sampler::TraceIdRatioBased(ratio(&mut warning))),
        other => {
            warning = Some(format!(
                "OTEL_TRACES_SAMPLER = \"{other}\" is not known: using parentbased_always_on; known are always_on, \
                 always_off, traceidratio and these with parentbased_ before them"
            ));
            based(Sampler::AlwaysOn)
        }
    };
    (sampler, warning)
}

/// A sampler that counts the spans that it leaves out.
#[derive(Debug, Clone)]
pub struct Counting {
    sampler: Sampler,
    counters: Arc<Counters>,
}

impl Counting {
    pub(crate) fn new(sampler: Sampler, counters: Arc<Counters>) -> Self {
        Self { sampler, counters }
    }
}

impl ShouldSample for Counting {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let result = self.sampler.should_sample(parent, trace_id, name, kind, attributes, links);
        if result.decision != SamplingDecision::RecordAndSample {
            self.counters.count_sampled_out();
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, argument: Option<&str>) -> (String, Option<String>) {
        let (sampler, warning) = from_environment(|key| match key {
            "OTEL_TRACES_SAMPLER" => Some(name.to_owned()),
            _ => argument.map(str::to_owned),
        });
        (format!("{sampler:?}"), warning)
    }

    #[test]
    fn every_standard_sampler_is_known_and_a_wrong_value_is_told() {
        assert_eq!(read("", None).0, "ParentBased(AlwaysOn)");
        assert_eq!(read("always_off", None).0, "AlwaysOff");
        assert_eq!(read("parentbased_always_off", None).0, "ParentBased(AlwaysOff)");
        assert_eq!(read("traceidratio", Some("0.25")), ("TraceIdRatioBased(0.25)".to_owned(), None));
        assert_eq!(read("parentbased_traceidratio", None).0, "ParentBased(TraceIdRatioBased(1.0))");
        let (sampler, warning) = read("traceidratio", Some("many"));
        assert!(sampler == "TraceIdRatioBased(1.0)" && warning.unwrap().contains("\"many\""));
        let (sampler, warning) = read("xray", None);
        assert!(sampler == "ParentBased(AlwaysOn)" && warning.unwrap().contains("\"xray\""));
    }
}
