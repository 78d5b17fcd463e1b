//! Logs: what `tracing-subscriber` prints, with the trace id behind every line that belongs to a trace, so that logs can stand
//! in for spans.

use opentelemetry::trace::TraceContextExt as _;
use std::{
    fmt,
    sync::{Arc, OnceLock},
};
use tracing::{Dispatch, Event, Subscriber, dispatcher::WeakDispatch};
use tracing_subscriber::{
    Layer,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// The subscriber that all layers belong to: asking for the current one does not work while it handles an event.
pub(crate) type Home = Arc<OnceLock<WeakDispatch>>;

/// A layer that only remembers which subscriber it belongs to.
#[derive(Debug)]
pub(crate) struct RememberHome(pub Home);

impl<S: Subscriber> Layer<S> for RememberHome {
    fn on_register_dispatch(&self, subscriber: &Dispatch) {
        // A second registration is a copy of the first.
        let _ = self.0.set(subscriber.downgrade());
    }
}

/// Adds trace ids to what another format prints.
#[derive(Debug)]
pub(crate) struct WithTraceId<F> {
    pub inner: F,
    pub json: bool,
    pub home: Home,
}

impl<S, N, F> FormatEvent<S, N> for WithTraceId<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut text = String::new();
        self.inner.format_event(context, Writer::new(&mut text), event)?;
        let line = text.trim_end_matches('\n');
        match (self.trace_id(context, event), self.json.then(|| line.strip_suffix('}')).flatten()) {
            (None, _) => writeln!(out, "{line}"),
            (Some(id), Some(object)) => writeln!(out, "{object},\"trace_id\":\"{id}\"}}"),
            (Some(id), None) => writeln!(out, "{line} trace_id={id}"),
        }
    }
}

impl<F> WithTraceId<F> {
    fn trace_id<S, N>(&self, context: &FmtContext<'_, S, N>, event: &Event<'_>) -> Option<String>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
        N: for<'a> FormatFields<'a> + 'static,
    {
        let home = self.home.get()?.upgrade()?;
        let parent = event.parent().and_then(|id| context.span(id)).or_else(|| context.lookup_current())?;
        // The innermost span may be one that is not traced.
        parent.scope().find_map(|span| {
            let traced = tracing_opentelemetry::get_otel_context(&span.id(), &home)?;
            let id = traced.span().span_context().trace_id();
            (id != opentelemetry::trace::TraceId::INVALID).then(|| id.to_string())
        })
    }
}
