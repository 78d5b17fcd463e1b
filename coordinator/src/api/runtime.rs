//! Two runtimes: connections and heartbeats live on one, every other call is carried out on the other. So whatever this
//! coordinator is busy with, heartbeats are read, leases renewed and pings answered.

use http::{Request, Response};
use std::{convert::Infallible, pin::Pin, task};
use tokio::runtime::Handle;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, body::Body, codegen::Service, server::NamedService};

/// The one call that is carried out where the connections live.
const HEARTBEATS: &str = "/drover.v1.NodeService/Heartbeats";

/// A service whose calls are carried out on another runtime than the connections'.
#[derive(Debug, Clone)]
pub struct Elsewhere<S> {
    service: S,
    runtime: Handle,
}

impl<S> Elsewhere<S> {
    /// Calls of this service are carried out on that runtime.
    #[must_use]
    pub fn new(service: S, runtime: Handle) -> Self {
        Self { service, runtime }
    }
}

impl<S: NamedService> NamedService for Elsewhere<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Elsewhere<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut task::Context<'_>) -> task::Poll<Result<(), Infallible>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.uri().path() == HEARTBEATS {
            return Box::pin(self.service.call(request));
        }
        // The one that was asked whether it is ready.
        let ready = self.service.clone();
        let mut service = std::mem::replace(&mut self.service, ready);
        // A caller that goes away ends it, as it does where both are one.
        let call = AbortOnDropHandle::new(self.runtime.spawn(async move { service.call(request).await }));
        Box::pin(async move {
            call.await
                .unwrap_or_else(|error| Ok(Status::internal(format!("the call was cut short: {error}")).into_http()))
        })
    }
}
