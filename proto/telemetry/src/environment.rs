//! The standard variables `OTEL_*` that concern the source of spans. They are read once, when a program begins.

use crate::spool::BatchLimits;
use std::time::Duration;

/// Where spans go, by `OTEL_TRACES_EXPORTER`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exporter {
    /// To the sink that the program gives (default).
    Otlp,
    /// To standard output, as JSON lines.
    Console,
    /// Nowhere: spans get ids, so that logs can carry them, but no numbers.
    None,
}

/// Bounds of a source; the variables are those of OpenTelemetry's batch span processor.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Spans in memory before they are in the spool (`OTEL_BSP_MAX_QUEUE_SIZE`, default 8192).
    pub queue_spans: usize,
    /// When the queue is full and the disk takes nothing for this long, spans are given up (default 50 ms): until then the
    /// code that makes them waits, at most four times as long.
    pub stall: Duration,
    /// Spans of a batch (`OTEL_BSP_MAX_EXPORT_BATCH_SIZE`, default 512).
    pub batch_spans: usize,
    /// Bytes of a batch, as far as more than one span is concerned.
    pub batch_bytes: usize,
    /// How long spans are gathered before they are sent (`OTEL_BSP_SCHEDULE_DELAY`, default 200 ms).
    pub linger: Duration,
    /// Longest time of one attempt to send (`OTEL_BSP_EXPORT_TIMEOUT`, default 10 s).
    pub export_timeout: Duration,
    /// First pause after a failed attempt; doubles with each up to `backoff_max`.
    pub backoff: Duration,
    /// Longest pause, unless the receiver asks for a longer one.
    pub backoff_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            queue_spans: 8192,
            stall: Duration::from_millis(50),
            batch_spans: 512,
            batch_bytes: 512 << 10,
            linger: Duration::from_millis(200),
            export_timeout: Duration::from_secs(10),
            backoff: Duration::from_millis(200),
            backoff_max: Duration::from_secs(15),
        }
    }
}

impl Limits {
    pub(crate) fn batch(&self) -> BatchLimits {
        BatchLimits { spans: self.batch_spans, bytes: self.batch_bytes }
    }

    /// The defaults, changed by the variables. A value that can't be used is told as a warning and not used.
    pub(crate) fn from_environment(get: impl Fn(&str) -> Option<String>, warnings: &mut Vec<String>) -> Self {
        let mut number = |name: &str, max: u64| {
            let text = get(name).filter(|text| !text.is_empty())?;
            let number = text.parse::<u64>().ok().filter(|n| (1..=max).contains(n));
            if number.is_none() {
                warnings.push(format!("{name} = \"{text}\" is no whole number from 1 to {max}: using the default"));
            }
            number
        };
        let mut limits = Self::default();
        let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        if let Some(n) = number("OTEL_BSP_MAX_QUEUE_SIZE", 1 << 20) {
            limits.queue_spans = size(n);
        }
        if let Some(n) = number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 1 << 14) {
            limits.batch_spans = size(n);
        }
        if let Some(n) = number("OTEL_BSP_SCHEDULE_DELAY", 60_000) {
            limits.linger = Duration::from_millis(n);
        }
        if let Some(n) = number("OTEL_BSP_EXPORT_TIMEOUT", 600_000) {
            limits.export_timeout = Duration::from_millis(n);
        }
        limits
    }
}

impl Exporter {
    /// What the variables ask for. An unknown value is told as a warning and not used.
    pub(crate) fn from_environment(get: impl Fn(&str) -> Option<String>, warnings: &mut Vec<String>) -> Self {
        if get("OTEL_SDK_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true")) {
            return Self::None;
        }
        match get("OTEL_TRACES_EXPORTER").unwrap_or_default().as_str() {
            "" | "otlp" => Self::Otlp,
            "console" => Self::Console,
            "none" => Self::None,
            other => {
                let known = "known are otlp, console and none";
                warnings.push(format!("OTEL_TRACES_EXPORTER = \"{other}\" is not known: using otlp; {known}"));
                Self::Otlp
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standard_variables_are_honoured_and_wrong_values_are_told() {
        let set = |name: &str| match name {
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE" => Some("64".to_owned()),
            "OTEL_BSP_SCHEDULE_DELAY" => Some("-1".to_owned()),
            "OTEL_TRACES_EXPORTER" => Some("zipkin".to_owned()),
            _ => None,
        };
        let mut warnings = Vec::new();
        let limits = Limits::from_environment(set, &mut warnings);
        assert_eq!((limits.batch_spans, limits.linger), (64, Limits::default().linger));
        assert_eq!(Exporter::from_environment(set, &mut warnings), Exporter::Otlp);
        assert!(warnings.len() == 2 && warnings[0].contains("\"-1\"") && warnings[1].contains("\"zipkin\""));
        let console = |name: &str| (name == "OTEL_TRACES_EXPORTER").then(|| "console".to_owned());
        assert_eq!(Exporter::from_environment(console, &mut warnings), Exporter::Console);
        let disabled = |name: &str| (name == "OTEL_SDK_DISABLED").then(|| "TRUE".to_owned());
        assert_eq!(Exporter::from_environment(disabled, &mut warnings), Exporter::None);
        assert_eq!(warnings.len(), 2);
    }
}
