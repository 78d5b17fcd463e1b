//! Claims of this node, one call after the other: each names the session revision that the one before has returned. What
//! waits meanwhile is claimed together by the next one.
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
        context::Context,
        registry::{Registry, Unowned},
        trace,
    },
};
use drover_proto::{
    limits,
    status::{reason, reason_of},
    transport::{Connection, Target},
    v1::{
        ClaimItem, ClaimManyRequest, ClaimManyResponse, ClaimRequest, ClaimResult, Offer, Severity, Token,
        node_service_client::NodeServiceClient,
    },
};
use drover_telemetry::context::traceparent_of;
use futures::future::join_all;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tonic::{Code, Request, Status};
use tracing::{Span, info_span};

/// Longest look at what offers need of this host.
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

/// A claim that is about to be made: its room is reserved.
#[derive(Debug)]
struct Pending {
    item: ClaimItem,
    /// Halt generation under which it was offered.
    halt_generation: u64,
    /// The start or the re-claim that it is part of.
    action: Span,
    /// How long its answer is worth waiting for.
    patience: Duration,
}

/// Makes claims.
#[derive(Debug)]
pub struct Claims {
    registry: Arc<Registry>,
    target: Target,
    identity: Arc<Identity>,
    client: Option<NodeServiceClient<Connection>>,
    /// The coordinator of this connection is an older one, which takes one claim a call.
    one_by_one: bool,
    first: usize,
    refusals: BTreeMap<String, (String, Instant)>,
}

impl Claims {
    /// Claims for this registry through these coordinators.
    #[must_use]
    pub fn new(registry: Arc<Registry>, target: Target, identity: Arc<Identity>) -> Self {
        Self { registry, target, identity, client: None, one_by_one: false, first: 0, refusals: BTreeMap::new() }
    }

    /// Works off jobs until the queue is closed.
    pub async fn work(mut self, mut jobs: mpsc::Receiver<Job>) {
        let mut taken = Vec::new();
        while jobs.recv_many(&mut taken, limits::CLAIMS_PER_CALL_MAX).await > 0 {
            let (mut offers, mut pending) = (Vec::new(), Vec::new());
            for job in taken.drain(..) {
                match job {
                    Job::Offer(offer) => offers.push(*offer),
                    Job::Again(run) => pending.extend(self.again(run).await),
                }
            }
            self.take_up(offers, &mut pending).await;
            while !pending.is_empty() {
                let rest = if self.one_by_one { pending.split_off(1) } else { Vec::new() };
                pending = self.claim(pending).await;
                pending.extend(rest);
            }
        }
    }

    /// Checks offers, and reserves room for those that this node can take.
    async fn take_up(&mut self, offers: Vec<Offer>, pending: &mut Vec<Pending>) {
        let mut by_model: BTreeMap<String, Vec<Offer>> = BTreeMap::new();
        for offer in offers {
            let model = offer.spec.as_ref().map_or("", |spec| spec.model_path.as_str()).to_owned();
            by_model.entry(model).or_default().push(offer);
        }
        let checks = by_model.into_iter().map(|(model, offers)| check(self.registry.context().clone(), model, offers));
        for (offer, outcome) in join_all(checks).await.into_iter().flatten() {
            let memory_bytes = match outcome {
                Ok(bytes) => bytes,
                Err(No::Unable(why)) => {
                    self.decline(&offer.instance, why);
                    continue;
                }
                Err(No::Late) => continue,
            };
            match self.registry.reserve(&offer.instance, memory_bytes).await {
                Ok(true) => pending.push(Pending::of_offer(offer, memory_bytes)),
                Ok(false) => {}
                Err(why) => self.decline(&offer.instance, why),
            }
        }
    }

    async fn again(&mut self, run: Unowned) -> Option<Pending> {
        let context = self.registry.context();
        // An earlier round may have claimed it meanwhile.
        let owned = context.board.get(&run.instance).is_some_and(|entry| entry.owned);
        if owned || context.session.has_passed() || !self.registry.reserve_again(&run.instance).await {
            return None;
        }
        Some(Pending::of_run(run))
    }

    /// Makes claims together. Returns those that must be made again, as the coordinator did not know the call.
    async fn claim(&mut self, mut pending: Vec<Pending>) -> Vec<Pending> {
        for attempt in 0..2 {
            let session = self.identity.session();
            let spans: Vec<Span> = pending
                .iter_mut()
                .map(|one| {
                    let span = info_span!(parent: &one.action, "claim", session_revision = session.revision);
                    one.item.nonce = format!("{:032x}", rand::random::<u128>());
                    one.item.traceparent = traceparent_of(&span);
                    span
                })
                .collect();
            let known = self.identity.stored().halt_generation;
            let request = ClaimManyRequest {
                session_id: session.id.clone(),
                session_revision: session.revision,
                halt_generation: pending.iter().map(|one| one.halt_generation).fold(known, u64::max),
                claims: pending.iter().map(|one| one.item.clone()).collect(),
            };
            // An offer that runs out meanwhile is refused alone: it must not cut the wait for the others short.
            let patience = pending.iter().map(|one| one.patience).max().unwrap_or(CLAIM_DEADLINE);
            let outcome = self.call(request, patience).await;
            drop(spans);
            let failure = match outcome {
                Ok(response) => {
                    self.identity.moved(&session.id, response.session_revision);
                    self.settle(pending, response.results).await;
                    return Vec::new();
                }
                Err(status) if status.code() == Code::Unimplemented && !self.one_by_one => {
                    tracing::info!("the coordinator is an older one: it is asked for one claim at a time");
                    self.one_by_one = true;
                    return pending;
                }
                Err(status) => status,
            };
            let why = reason_of(&failure).unwrap_or_default();
            if why == reason::SESSION_MOVED && attempt == 0 {
                // A newer revision may be known already; else a resume brings it.
                if self.identity.session().revision > session.revision || self.identity.resume(RESUME_DEADLINE).await {
                    continue;
                }
            }
            self.failed(&pending, &why, &failure).await;
            return Vec::new();
        }
        Vec::new()
    }

    /// None of these claims was made, or that is not known.
    async fn failed(&mut self, pending: &[Pending], why: &str, failure: &Status) {
        let unknown = outcome_unknown(failure);
        for Pending { item, action, .. } in pending {
            not_made(item, action, why, failure.message());
            if unknown {
                tracing::warn!(instance = item.instance, "it is not known whether the claim was made: {failure}");
            }
            self.registry.release(&item.instance).await;
        }
        if unknown {
            self.client = None;
            self.first = self.first.wrapping_add(1);
            self.identity.resume(RESUME_DEADLINE).await;
        }
    }

    /// What became of each.
    async fn settle(&mut self, pending: Vec<Pending>, results: Vec<ClaimResult>) {
        let mut results: BTreeMap<String, ClaimResult> =
            results.into_iter().map(|result| (result.instance.clone(), result)).collect();
        for Pending { item, action, .. } in pending {
            let result = results.remove(&item.instance).unwrap_or_default();
            let Some(token) = result.token else {
                not_made(&item, &action, &result.reason, &result.message);
                self.registry.release(&item.instance).await;
                continue;
            };
            self.refusals.remove(&item.instance);
            let action = if item.recorded_token.is_none() {
                action
            } else {
                tracing::info!(instance = item.instance, %token, "a running server was claimed again");
                Span::none()
            };
            self.registry.claimed(won(item, token, result), action).await;
        }
    }

    async fn call(&mut self, request: ClaimManyRequest, patience: Duration) -> Result<ClaimManyResponse, Status> {
        if self.client.is_none() {
            let connection = self.target.connect(self.first % self.target.len()).await;
            // Nothing was sent: this is no unknown outcome.
            let connection = connection.map_err(|e| Status::failed_precondition(e.to_string()))?;
            self.client = Some(NodeServiceClient::new(connection));
            self.one_by_one = false;
        }
        let Some(client) = &mut self.client else { return Err(Status::failed_precondition("no connection")) };
        let silence = |_| Status::deadline_exceeded("no answer in time");
        if !self.one_by_one {
            let mut request = Request::new(request);
            request.set_timeout(patience);
            return Ok(timeout(patience, client.claim_many(request)).await.map_err(silence)??.into_inner());
        }
        let Some(item) = request.claims.into_iter().next() else { return Ok(ClaimManyResponse::default()) };
        let mut one = Request::new(ClaimRequest {
            session_id: request.session_id,
            session_revision: request.session_revision,
            instance: item.instance.clone(),
            offer_revision: item.offer_revision,
            nonce: item.nonce,
            memory_bytes: item.memory_bytes,
            recorded_token: item.recorded_token,
            halt_generation: request.halt_generation,
        });
        one.set_timeout(patience);
        let answer = timeout(patience, client.claim(one)).await.map_err(silence)??.into_inner();
        let (token, spec, revision) = (answer.token, answer.spec, answer.revision);
        let result = ClaimResult { instance: item.instance, token, spec, revision, ..ClaimResult::default() };
        Ok(ClaimManyResponse { results: vec![result], session_revision: answer.session_revision })
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

/// Looks at what offers of one model need of this host.
async fn check(context: Arc<Context>, model: String, offers: Vec<Offer>) -> Vec<(Offer, Result<i64, No>)> {
    let looked_at = offers.clone();
    // The model may lie on another host, which may be away: other claims wait for this one.
    let look = move || looked_at.iter().map(|offer| offers::check(&context, offer)).collect::<Vec<_>>();
    match blocking::within(CHECK_DEADLINE, &model, look).await {
        Ok(outcomes) => offers.into_iter().zip(outcomes).collect(),
        Err(error) => {
            let why = format!("model_path \"{}\" can't be looked at: {error}", model.escape_debug());
            offers.into_iter().map(|offer| (offer, Err(No::Unable(why.clone())))).collect()
        }
    }
}

impl Pending {
    fn of_offer(offer: Offer, memory_bytes: i64) -> Self {
        let deployment = offer.spec.as_ref().map_or("", |spec| spec.name.as_str());
        let action = trace::start(&offer.instance, deployment, &offer.traceparent);
        let patience = offer.deadline.as_ref().map_or(CLAIM_DEADLINE, clock::until).min(CLAIM_DEADLINE);
        let item = ClaimItem {
            instance: offer.instance,
            offer_revision: offer.offer_revision,
            memory_bytes,
            ..ClaimItem::default()
        };
        Self { item, halt_generation: offer.halt_generation, action, patience }
    }

    fn of_run(run: Unowned) -> Self {
        let action = info_span!(
            parent: None,
            "instance.reclaim",
            instance = run.instance,
            outcome = tracing::field::Empty,
            error = tracing::field::Empty
        );
        let item = ClaimItem {
            instance: run.instance,
            memory_bytes: run.memory_bytes,
            recorded_token: Some(run.token),
            ..ClaimItem::default()
        };
        Self { item, halt_generation: 0, action, patience: CLAIM_DEADLINE }
    }
}

/// Says why a claim was not made, in its trace and in the log.
fn not_made(item: &ClaimItem, action: &Span, why: &str, message: &str) {
    let text = format!("{why} {message}");
    if is_lost(why) {
        action.record("outcome", format!("lost: {why}"));
    } else {
        action.record("error", text.as_str());
    }
    tracing::debug!(instance = item.instance, "the claim was not made: {text}");
}

/// Whether a claim was refused by the rules of claiming, as all but one are when several nodes race for an offer.
fn is_lost(why: &str) -> bool {
    matches!(
        why,
        reason::ALREADY_CLAIMED
            | reason::OFFER_GONE
            | reason::SESSION_MOVED
            | reason::HALTED
            | reason::NO_CAPACITY
            | reason::NOT_FOUND
            | reason::DELETING
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

fn won(item: ClaimItem, token: Token, result: ClaimResult) -> Claim {
    Claim {
        instance: item.instance,
        token,
        spec: result.spec.unwrap_or_default(),
        revision: result.revision,
        memory_bytes: item.memory_bytes,
        restarts: 0,
        failed: None,
        since: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_race_is_an_outcome_and_a_call_that_broke_is_an_error() {
        assert!([reason::ALREADY_CLAIMED, reason::OFFER_GONE, reason::HALTED].iter().all(|why| is_lost(why)));
        assert!([reason::OUTCOME_UNKNOWN, reason::STORE_UNAVAILABLE, ""].iter().all(|why| !is_lost(why)));
    }

    #[test]
    fn both_can_be_recorded_on_a_start() {
        let _guard = tracing::subscriber::set_default(tracing_subscriber::registry());
        let span = trace::start("tiny-234567", "tiny", "");
        assert!(["outcome", "error"].iter().all(|name| span.has_field(*name)));
    }
}
