//! Claims of this node, one after the other: each names the session revision that the one before has returned.
//!
//! A claim whose outcome is not known is not repeated: the session is resumed, which settles it, and the set of claims
//! that comes with it tells.

use super::{
    identity::Identity,
    offers::{self, No},
};
use crate::{
    blocking, clock,
    instance::{
        claim::Claim,
        registry::{Registry, Unowned},
        trace,
    },
};
use drover_proto::{
    status::{reason, reason_of},
    transport::{Connection, Target},
    v1::{ClaimRequest, ClaimResponse, Offer, Severity, node_service_client::NodeServiceClient},
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tonic::{Code, Request, Status};
use tracing::{Instrument as _, Span, info_span};

/// Longest look at what an offer needs of this host.
const CHECK_DEADLINE: Duration = Duration::from_secs(3);
/// Longest wait for the answer of a claim.
const CLAIM_DEADLINE: Duration = Duration::from_secs(5);
/// Longest wait for a session to be resumed before the next claim.
const RESUME_DEADLINE: Duration = Duration::from_secs(5);
/// A reason that goes on is told again after this time: what is told goes into a ring of events, and is not to fall out of
/// it while somebody still waits for the instance.
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// Instances whose last refusal is remembered, so that it is not told with every offer.
const REFUSALS_MAX: usize = 1024;

/// A claim to make.
#[derive(Debug)]
pub enum Job {
    /// Of an offer.
    Offer(Box<Offer>),
    /// Of a run that this node has and that no claim covers.
    Again(Unowned),
}

/// Makes claims.
#[derive(Debug)]
pub struct Claims {
    registry: Arc<Registry>,
    target: Target,
    identity: Arc<Identity>,
    client: Option<NodeServiceClient<Connection>>,
    first: usize,
    refusals: BTreeMap<String, (String, Instant)>,
}

impl Claims {
    /// Claims for this registry through these coordinators.
    #[must_use]
    pub fn new(registry: Arc<Registry>, target: Target, identity: Arc<Identity>) -> Self {
        Self { registry, target, identity, client: None, first: 0, refusals: BTreeMap::new() }
    }

    /// Works off jobs until the queue is closed.
    pub async fn work(mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(job) = jobs.recv().await {
            match job {
                Job::Offer(offer) => self.offer(*offer).await,
                Job::Again(run) => self.again(run).await,
            }
        }
    }

    async fn offer(&mut self, offer: Offer) {
        let context = self.registry.context().clone();
        let looked_at = offer.clone();
        // The model may lie on another host, which may be away: other claims wait for this one.
        let thing = offer.spec.as_ref().map_or("", |spec| spec.model_path.as_str());
        let checked = blocking::within(CHECK_DEADLINE, thing, move || offers::check(&context, &looked_at)).await;
        let memory_bytes = match checked {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(No::Unable(why))) => return self.decline(&offer.instance, why),
            Ok(Err(No::Late)) => return,
            Err(error) => {
                let why = format!("model_path \"{}\" can't be looked at: {error}", thing.escape_debug());
                return self.decline(&offer.instance, why);
            }
        };
        match self.registry.reserve(&offer.instance, memory_bytes).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(why) => return self.decline(&offer.instance, why),
        }
        let spec = offer.spec.clone().unwrap_or_default();
        let span = trace::start(&offer.instance, &spec.name, &offer.traceparent);
        let request = ClaimRequest {
            instance: offer.instance.clone(),
            offer_revision: offer.offer_revision,
            memory_bytes,
            halt_generation: offer.halt_generation.max(self.identity.stored().halt_generation),
            ..ClaimRequest::default()
        };
        let patience = offer.deadline.as_ref().map_or(CLAIM_DEADLINE, clock::until).min(CLAIM_DEADLINE);
        match self.claim(request, patience, &span).await {
            Some(response) => {
                self.refusals.remove(&offer.instance);
                self.registry.claimed(won(&offer.instance, response, memory_bytes), span).await;
            }
            None => self.registry.release(&offer.instance).await,
        }
    }

    async fn again(&mut self, run: Unowned) {
        let context = self.registry.context().clone();
        // An earlier round may have claimed it meanwhile.
        let owned = context.board.get(&run.instance).is_some_and(|entry| entry.owned);
        if owned || context.session.has_passed() || !self.registry.reserve_again(&run.instance).await {
            return;
        }
        let request = ClaimRequest {
            instance: run.instance.clone(),
            memory_bytes: run.memory_bytes,
            recorded_token: Some(run.token),
            halt_generation: self.identity.stored().halt_generation,
            ..ClaimRequest::default()
        };
        let span = info_span!(
            parent: None,
            "instance.reclaim",
            instance = run.instance,
            outcome = tracing::field::Empty,
            error = tracing::field::Empty
        );
        match self.claim(request, CLAIM_DEADLINE, &span).await {
            Some(response) => {
                let token = response.token.unwrap_or_default();
                tracing::info!(instance = run.instance, %token, "a running server was claimed again");
                self.registry.claimed(won(&run.instance, response, run.memory_bytes), Span::none()).await;
            }
            None => self.registry.release(&run.instance).await,
        }
    }

    /// Makes a claim. `None` when it was not won, or when that is not known; then the session was resumed.
    async fn claim(&mut self, mut request: ClaimRequest, patience: Duration, action: &Span) -> Option<ClaimResponse> {
        for attempt in 0..2 {
            let session = self.identity.session();
            request.session_id.clone_from(&session.id);
            request.session_revision = session.revision;
            request.nonce = format!("{:032x}", rand::random::<u128>());
            let span = info_span!(parent: action, "claim", session_revision = session.revision);
            let failure = match self.call(request.clone(), patience).instrument(span).await {
                Ok(response) => {
                    self.identity.moved(&session.id, response.session_revision);
                    return Some(response);
                }
                Err(status) => status,
            };
            let why = reason_of(&failure).unwrap_or_default();
            let text = format!("{why} {}", failure.message());
            if why == reason::SESSION_MOVED && attempt == 0 {
                // A newer revision may be known already; else a resume brings it.
                if self.identity.session().revision > session.revision || self.identity.resume(RESUME_DEADLINE).await {
                    continue;
                }
            }
            if is_lost(&failure) {
                action.record("outcome", format!("lost: {why}"));
            } else {
                action.record("error", text.as_str());
            }
            tracing::debug!(instance = request.instance, "the claim was not made: {text}");
            if outcome_unknown(&failure) {
                self.client = None;
                self.first = self.first.wrapping_add(1);
                self.registry.release(&request.instance).await;
                tracing::warn!(instance = request.instance, "it is not known whether the claim was made: {text}");
                self.identity.resume(RESUME_DEADLINE).await;
            }
            return None;
        }
        None
    }

    async fn call(&mut self, request: ClaimRequest, patience: Duration) -> Result<ClaimResponse, Status> {
        if self.client.is_none() {
            let connection = self.target.connect(self.first % self.target.len()).await;
            // Nothing was sent: this is no unknown outcome.
            let connection = connection.map_err(|e| Status::failed_precondition(e.to_string()))?;
            self.client = Some(NodeServiceClient::new(connection));
        }
        let Some(client) = &mut self.client else { return Err(Status::failed_precondition("no connection")) };
        let mut request = Request::new(request);
        drover_telemetry::context::inject_metadata(request.metadata_mut());
        request.set_timeout(patience);
        match timeout(patience, client.claim(request)).await {
            Ok(response) => response.map(tonic::Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded("no answer in time")),
        }
    }

    /// Tells why an offer is not taken: at once, and again from time to time while it stays so.
    fn decline(&mut self, instance: &str, why: String) {
        if self.refusals.get(instance).is_some_and(|(told, at)| *told == why && at.elapsed() < TELL_AGAIN) {
            return;
        }
        if self.refusals.len() >= REFUSALS_MAX {
            self.refusals.pop_first();
        }
        self.refusals.insert(instance.to_owned(), (why.clone(), Instant::now()));
        self.registry.context().events.tell(instance, "OfferDeclined", Severity::Warning, why);
    }
}

/// Whether a claim was refused by the rules of claiming, as all but one are when several nodes race for an offer.
fn is_lost(status: &Status) -> bool {
    matches!(
        reason_of(status).as_deref(),
        Some(
            reason::ALREADY_CLAIMED
                | reason::OFFER_GONE
                | reason::SESSION_MOVED
                | reason::HALTED
                | reason::NO_CAPACITY
                | reason::NOT_FOUND
                | reason::DELETING
        )
    )
}

/// Whether a call may have taken effect though it has failed.
fn outcome_unknown(status: &Status) -> bool {
    match reason_of(status).as_deref() {
        Some(reason::OUTCOME_UNKNOWN) => true,
        Some(reason::STORE_UNAVAILABLE) => false,
        Some(_) => false,
        None => matches!(
            status.code(),
            Code::Unknown
                | Code::DeadlineExceeded
                | Code::Unavailable
                | Code::Cancelled
                | Code::Internal
                | Code::Aborted
        ),
    }
}

fn won(instance: &str, response: ClaimResponse, memory_bytes: i64) -> Claim {
    Claim {
        instance: instance.to_owned(),
        token: response.token.unwrap_or_default(),
        spec: response.spec.unwrap_or_default(),
        revision: response.revision,
        memory_bytes,
        restarts: 0,
        failed: None,
        since: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_proto::status::with_reason;

    #[test]
    fn a_lost_race_is_an_outcome_and_a_call_that_broke_is_an_error() {
        let of = |why: &str| with_reason(Code::FailedPrecondition, why, "as the test says");
        assert!([reason::ALREADY_CLAIMED, reason::OFFER_GONE, reason::HALTED].iter().all(|why| is_lost(&of(why))));
        assert!(!is_lost(&of(reason::OUTCOME_UNKNOWN)) && !is_lost(&of(reason::STORE_UNAVAILABLE)));
        assert!(!is_lost(&Status::unavailable("the connection broke")));
    }

    #[test]
    fn both_can_be_recorded_on_a_start() {
        let _guard = tracing::subscriber::set_default(tracing_subscriber::registry());
        let span = trace::start("tiny-234567", "tiny", "");
        assert!(["outcome", "error"].iter().all(|name| span.has_field(*name)));
    }
}
