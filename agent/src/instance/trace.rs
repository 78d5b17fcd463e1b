//! The spans of an instance's life: from the offer to the first answer, and from the wish to stop to the end.
//!
//! A start is one span, "instance.start", a child of the action that asked for it; below it "claim", "launch" and "load".
//! Its attribute `outcome` says "lost: <reason>" when the claim was refused by the rules: several nodes are offered one
//! instance, so that is no error. `error` is for what went wrong.

use drover_telemetry::context;
use tracing::Span;

/// The span of a start, under the action that asked for it.
#[must_use]
pub fn start(instance: &str, deployment: &str, traceparent: &str) -> Span {
    let span = tracing::info_span!(
        parent: None,
        "instance.start",
        instance,
        deployment,
        outcome = tracing::field::Empty,
        error = tracing::field::Empty
    );
    context::set_parent(&span, traceparent);
    span
}

/// The span of a stop, under the action that asked for it.
#[must_use]
pub fn stop(instance: &str, traceparent: &str) -> Span {
    let span = tracing::info_span!(parent: None, "instance.stop", instance);
    context::set_parent(&span, traceparent);
    span
}

/// What is under way with an instance, as spans.
#[derive(Debug, Default)]
pub struct Spans {
    /// A start, until the first answer; or a stop, until the end.
    action: Option<Span>,
    /// The step of it that goes on now.
    step: Option<Span>,
    traceparent: String,
}

impl Spans {
    /// Spans of a start that has its span already.
    #[must_use]
    pub fn of(action: Span) -> Self {
        let traceparent = context::traceparent_of(&action);
        Self { action: Some(action), step: None, traceparent }
    }

    /// Another action begins.
    pub fn begin(&mut self, action: Span) {
        *self = Self::of(action);
    }

    /// Whether an action is under way.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.action.is_some()
    }

    /// The next step of the action that is under way, if one is.
    pub fn step(&mut self, make: impl FnOnce(&Span) -> Span) {
        self.step = self.action.as_ref().map(make);
    }

    /// The span to work in now.
    #[must_use]
    pub fn current(&self) -> Span {
        self.step.as_ref().or(self.action.as_ref()).cloned().unwrap_or_else(Span::none)
    }

    /// The action is over. Its traceparent stays, for the report of what it led to.
    pub fn end(&mut self, error: Option<&str>) {
        self.step = None;
        if let (Some(span), Some(error)) = (&self.action, error) {
            span.record("error", error);
        }
        self.action = None;
    }

    /// W3C traceparent of the last action; empty when it was not traced.
    #[must_use]
    pub fn traceparent(&self) -> &str {
        &self.traceparent
    }
}
