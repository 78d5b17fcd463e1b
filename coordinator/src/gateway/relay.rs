//! From the beginning of an answer to its end: hands the body on, watches the deadlines, says so when it breaks, and
//! records what it was.

use super::{
    ATTEMPTS, INSTANCE, REQUEST_ID,
    deadline::Clock,
    error::ApiError,
    forward::Answer,
    loads::{Loads, Place},
    sse::Events,
    timings::Tail,
    trace,
};
use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use std::{
    future::Future as _,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::time::{Instant, Sleep, sleep_until};
use tracing::Span;

/// Makes the client's answer of a llama-server's.
pub(super) fn relay(answer: Answer, clock: Clock, loads: Loads, span: Span) -> Response {
    let (mut parts, body) = answer.response.into_parts();
    let events = is_event_stream(&parts.headers);
    parts.extensions.clear();
    // Of the connection to the proxy, or said by the gateway itself.
    for name in [header::CONNECTION, header::TRANSFER_ENCODING, header::SERVER, header::DATE, REQUEST_ID] {
        parts.headers.remove(name);
    }
    if let Ok(instance) = HeaderValue::from_str(&answer.instance) {
        parts.headers.insert(INSTANCE, instance);
    }
    parts.headers.insert(ATTEMPTS, HeaderValue::from(answer.attempts));
    let next = if events { clock.first_byte } else { Instant::now() + clock.between };
    let limit = next.min(clock.total);
    let body = Relay {
        body: Some(body),
        events: events.then(Events::default),
        place: Some(answer.place),
        clock,
        limit,
        timer: Box::pin(sleep_until(limit)),
        tail: Tail::default(),
        bytes: 0,
        outcome: None,
        loads,
        span,
    };
    Response::from_parts(parts, Body::new(body))
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    kind.len() >= 17 && kind[..17].eq_ignore_ascii_case(b"text/event-stream")
}

/// A body on its way. Dropped before its end, it drops the connection to the proxy with it, which cancels the generation.
struct Relay {
    /// None once it has ended or broken.
    body: Option<Incoming>,
    /// Set for a stream of events.
    events: Option<Events>,
    place: Option<Place>,
    clock: Clock,
    /// When the next piece must be there. Put off without touching the timer, which looks again when it fires.
    limit: Instant,
    timer: Pin<Box<Sleep>>,
    tail: Tail,
    bytes: u64,
    outcome: Option<&'static str>,
    loads: Loads,
    span: Span,
}

impl Relay {
    /// Ends it: the place is free and the span has its last attributes.
    fn end(&mut self, outcome: &'static str) {
        if self.outcome.is_some() {
            return;
        }
        self.outcome = Some(outcome);
        (self.body, self.place) = (None, None);
        match outcome {
            "broken" => self.loads.broke(),
            "abandoned" => self.loads.was_abandoned(),
            _ => {}
        }
        trace::ended(&self.span, outcome, self.bytes, self.tail.timings());
    }

    /// Ends it before its time: a stream with an event that says so, another body with an error that cuts the connection.
    fn break_off(&mut self, status: StatusCode, code: &'static str, message: &str) -> Option<io::Result<Bytes>> {
        tracing::info!(parent: &self.span, code, message, bytes = self.bytes, "an answer broke off");
        trace::failed(&self.span, message);
        let last = match &mut self.events {
            Some(events) => {
                let error = ApiError::new(status, "server_error", message).code(code);
                Ok(events.break_off(&error.json()))
            }
            None => Err(io::Error::other(message.to_owned())),
        };
        self.end("broken");
        Some(last)
    }

    /// What the next bytes of the upstream are to the client; none when all are held back.
    fn take(&mut self, data: Bytes) -> Option<Bytes> {
        let (pass, progress) = match &mut self.events {
            Some(events) => {
                let step = events.push(data);
                (step.pass, step.progress)
            }
            None => (data, true),
        };
        if progress {
            self.limit = (Instant::now() + self.clock.between).min(self.clock.total);
        }
        if pass.is_empty() {
            return None;
        }
        self.tail.push(&pass);
        self.bytes += pass.len() as u64;
        Some(pass)
    }

    fn poll_timer(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.timer.deadline() > self.limit {
            let limit = self.limit;
            self.timer.as_mut().reset(limit);
        }
        loop {
            ready!(self.timer.as_mut().poll(context));
            if Instant::now() >= self.limit {
                return Poll::Ready(());
            }
            let limit = self.limit;
            self.timer.as_mut().reset(limit);
        }
    }
}

impl http_body::Body for Relay {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = &mut *self;
        let last = loop {
            let Some(body) = &mut this.body else { return Poll::Ready(None) };
            let complete = |events: &Option<Events>| events.as_ref().is_none_or(Events::is_complete);
            match Pin::new(body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data()
                        && let Some(pass) = this.take(data)
                    {
                        break Some(Ok(pass));
                    }
                }
                // A stream that has said its last word may end in any way.
                Poll::Ready(Some(Err(_))) if this.events.as_ref().is_some_and(Events::is_complete) => {
                    this.end("complete");
                    break None;
                }
                Poll::Ready(Some(Err(_))) => {
                    let message = "the instance broke off in the middle of its answer";
                    break this.break_off(StatusCode::BAD_GATEWAY, "upstream_broken", message);
                }
                Poll::Ready(None) if complete(&this.events) => {
                    this.end("complete");
                    break None;
                }
                Poll::Ready(None) => {
                    let message = "the instance's stream ended without its last event";
                    break this.break_off(StatusCode::BAD_GATEWAY, "upstream_broken", message);
                }
                Poll::Pending => {
                    ready!(this.poll_timer(context));
                    let message = if Instant::now() >= this.clock.total {
                        "the request took longer than gateway.total_timeout_ms"
                    } else {
                        "the instance sent nothing in time (gateway.between_bytes_timeout_ms)"
                    };
                    break this.break_off(StatusCode::GATEWAY_TIMEOUT, "upstream_timeout", message);
                }
            }
        };
        Poll::Ready(last.map(|piece| piece.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_none() && self.outcome.is_some()
    }

    fn size_hint(&self) -> SizeHint {
        // An exact length is kept, so that the client notices a body that was cut.
        match (&self.body, &self.events) {
            (Some(body), None) => body.size_hint(),
            _ => SizeHint::default(),
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // With a known length the reader may stop at the last byte and never ask for the end.
        let all_read = self.events.is_none() && self.body.as_ref().is_some_and(http_body::Body::is_end_stream);
        self.end(if all_read { "complete" } else { "abandoned" });
    }
}
