//! Claims of this node, one call after the other: each names the session revision that the one before has returned. What
//! waits meanwhile is claimed together by the next one.
//!
//! A claim whose outcome is not known is not repeated: the session is resumed, which settles it, and the set of claims
//! that comes with it tells.

mod pending;

use super::{
    identity::Identity,
    offers::No,
    remote::{Coordinator, Coordinators},
};
use crate::{
    instance::{
        context::Context,
        registry::{Registry, Unowned},
    },
    mutant,
};
use drover_proto::{
    limits,
    status::{reason, reason_of},
    v1::{ClaimManyRequest, ClaimManyResponse, ClaimRequest, ClaimResult, Offer, Severity},
    world,
};
use drover_telemetry::context::traceparent_of;
use futures::future::join_all;
use pending::{CLAIM_DEADLINE, Pending, cannot_see, is_lost, not_made, outcome_unknown, won};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};
use tonic::{Code, Status};
use tracing::{Span, info_span};

/// Longest wait for a session to be resumed before the next claim.
const RESUME_DEADLINE: Duration = Duration::from_secs(5);
/// A reason that goes on is told again after this time: what is told goes into a ring of events, and is not to fall out of
/// it while somebody still waits for the instance.
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// Instances whose last refusal is remembered, so that it is not told with every offer.
const REFUSALS_MAX: usize = 1024;

/// Runs that this node has and that no claim covers, after a set of claims was applied. Only the latest counts.
#[derive(Debug, Clone, Default)]
pub struct Again {
    /// Number of the session that the set came with.
    pub session: u64,
    /// The runs.
    pub runs: Vec<Unowned>,
}

/// Makes claims.
#[derive(Debug)]
pub struct Claims {
    registry: Arc<Registry>,
    coordinators: Arc<dyn Coordinators>,
    identity: Arc<Identity>,
    client: Option<Box<dyn Coordinator>>,
    /// The coordinator of this connection is an older one, which takes one claim a call.
    one_by_one: bool,
    /// Where that connection was begun, as the session's coordinator was then.
    session_at: usize,
    /// Where the next connection begins, when it is not with the session's coordinator.
    next: Option<usize>,
    /// The coordinator of this connection.
    at: usize,
    refusals: BTreeMap<String, (String, Instant)>,
}

impl Claims {
    /// Claims for this registry through these coordinators.
    #[must_use]
    pub fn new(registry: Arc<Registry>, coordinators: Arc<dyn Coordinators>, identity: Arc<Identity>) -> Self {
        Self {
            registry,
            coordinators,
            identity,
            client: None,
            one_by_one: false,
            session_at: 0,
            next: None,
            at: 0,
            refusals: BTreeMap::new(),
        }
    }

    /// Claims what is offered and what runs here, until one of both sources is closed. What runs here comes first. When all
    /// of it was tried once, the number of its session goes to `reconciled`.
    pub async fn work(
        mut self,
        mut offers: mpsc::Receiver<Box<Offer>>,
        mut unowned: watch::Receiver<Again>,
        reconciled: watch::Sender<u64>,
    ) {
        let mut taken = Vec::new();
        loop {
            tokio::select! {
                biased;
                changed = unowned.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let Again { session, runs } = unowned.borrow_and_update().clone();
                    for some in runs.chunks(limits::CLAIMS_PER_CALL_MAX) {
                        let mut pending = Vec::new();
                        for run in some {
                            pending.extend(self.again(run.clone()).await);
                        }
                        self.claim_all(pending).await;
                    }
                    reconciled.send_replace(session);
                }
                count = offers.recv_many(&mut taken, limits::CLAIMS_PER_CALL_MAX) => {
                    if count == 0 {
                        return;
                    }
                    let pending = self.take_up(taken.drain(..).map(|offer| *offer).collect()).await;
                    self.claim_all(pending).await;
                }
            }
        }
    }

    async fn claim_all(&mut self, mut pending: Vec<Pending>) {
        while !pending.is_empty() {
            let rest = if self.one_by_one { pending.split_off(1) } else { Vec::new() };
            pending = self.claim(pending).await;
            pending.extend(rest);
        }
    }

    /// Checks offers, and reserves room for those that this node can take.
    async fn take_up(&mut self, offers: Vec<Offer>) -> Vec<Pending> {
        let mut pending = Vec::new();
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
            match self.registry.reserve(&offer.instance, offer.offer_revision, memory_bytes).await {
                Ok(true) => pending.push(Pending::of_offer(offer, memory_bytes)),
                Ok(false) => {}
                Err(why) => self.decline(&offer.instance, why),
            }
        }
        pending
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
        let (mut moved, mut others) = (false, self.coordinators.count() - 1);
        loop {
            let session = self.identity.session();
            let spans: Vec<Span> = pending
                .iter_mut()
                .map(|one| {
                    let span = info_span!(parent: &one.action, "claim", session_revision = session.revision);
                    one.item.nonce = format!("{:032x}", world::random_u128());
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
            if self.registry.context().session.has_passed() {
                return self.not_asked(&pending).await;
            }
            // An offer that runs out meanwhile is refused alone: it must not cut the wait for the others short.
            let patience = pending.iter().map(|one| one.patience).max().unwrap_or(CLAIM_DEADLINE);
            let outcome = self.call(request, patience).await;
            drop(spans);
            let failure = match outcome {
                Ok(response) => {
                    self.identity.moved(&session.id, response.session_revision);
                    self.settle(&session.id, pending, response.results).await;
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
            if cannot_see(&failure) && others > 0 {
                tracing::info!("claims go on at another coordinator: {}", failure.message());
                others -= 1;
                self.leave();
                continue;
            }
            if why == reason::SESSION_MOVED && !std::mem::replace(&mut moved, true) {
                // A newer revision may be known already; else a resume brings it.
                if self.identity.session().revision > session.revision || self.identity.resume(RESUME_DEADLINE).await {
                    continue;
                }
            }
            self.failed(&pending, &why, &failure).await;
            return Vec::new();
        }
    }

    /// The session's time was over before the coordinator was asked: nothing new is claimed then.
    async fn not_asked(&mut self, pending: &[Pending]) -> Vec<Pending> {
        for Pending { item, action, .. } in pending {
            not_made(item, action, reason::SESSION_MOVED, "this node has no session now");
            self.registry.release(&item.instance).await;
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
        if !is_lost(why) {
            self.leave();
        }
        if unknown {
            self.identity.resume(RESUME_DEADLINE).await;
        }
    }

    /// What became of each.
    async fn settle(&mut self, session: &str, pending: Vec<Pending>, results: Vec<ClaimResult>) {
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
            self.registry.claimed(session, won(item, token, result), action).await;
        }
    }

    /// Leaves the coordinator of this connection: the next claim is made at the next one.
    fn leave(&mut self) {
        if !mutant::on(mutant::name::CLAIMS_STAY) {
            self.client = None;
            self.next = Some(self.at.wrapping_add(1));
        }
    }

    async fn call(&mut self, request: ClaimManyRequest, patience: Duration) -> Result<ClaimManyResponse, Status> {
        // The coordinator of the session has the store, or it would have handed the session over; and its view has seen
        // the session's revision.
        let session_at = self.identity.session().coordinator;
        if session_at != self.session_at {
            (self.client, self.session_at, self.next) = (None, session_at, None);
        }
        if self.client.is_none() {
            let first = self.next.take().unwrap_or(session_at);
            // Nothing was sent: this is no unknown outcome.
            let connected = self.coordinators.connect(first % self.coordinators.count()).await;
            let (at, client) = connected.map_err(|e| Status::failed_precondition(e.to_string()))?;
            (self.at, self.client) = (at, Some(client));
            self.one_by_one = false;
        }
        let Some(client) = &mut self.client else { return Err(Status::failed_precondition("no connection")) };
        let silence = |_| Status::deadline_exceeded("no answer in time");
        if !self.one_by_one {
            return timeout(patience, client.claim_many(request, patience)).await.map_err(silence)?;
        }
        let Some(item) = request.claims.into_iter().next() else { return Ok(ClaimManyResponse::default()) };
        let one = ClaimRequest {
            session_id: request.session_id,
            session_revision: request.session_revision,
            instance: item.instance.clone(),
            offer_revision: item.offer_revision,
            nonce: item.nonce,
            memory_bytes: item.memory_bytes,
            recorded_token: item.recorded_token,
            halt_generation: request.halt_generation,
        };
        let answer = timeout(patience, client.claim(one, patience)).await.map_err(silence)??;
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
    match context.machine.look_at_offers(&context, &model, &offers).await {
        Ok(outcomes) => offers.into_iter().zip(outcomes).collect(),
        Err(error) => {
            let why = format!("model_path \"{}\" can't be looked at: {error}", model.escape_debug());
            offers.into_iter().map(|offer| (offer, Err(No::Unable(why.clone())))).collect()
        }
    }
}
