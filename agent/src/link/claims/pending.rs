//! PURE but for spans. A claim on its way: what is asked for, what an answer or its absence means, what it has brought.

use crate::{
    clock,
    instance::{claim::Claim, registry::Unowned, trace},
};
use drover_proto::{
    status::{reason, reason_of},
    v1::{ClaimItem, ClaimResult, Offer, Token},
};
use std::time::Duration;
use tonic::{Code, Status};
use tracing::{Span, info_span};

/// Longest wait for the answer of a claim.
pub(super) const CLAIM_DEADLINE: Duration = Duration::from_secs(5);
/// A claim that is about to be made: its room is reserved.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) item: ClaimItem,
    /// Halt generation under which it was offered.
    pub(super) halt_generation: u64,
    /// The start or the re-claim that it is part of.
    pub(super) action: Span,
    /// How long its answer is worth waiting for.
    pub(super) patience: Duration,
}

impl Pending {
    pub(super) fn of_offer(offer: Offer, memory_bytes: i64) -> Self {
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

    pub(super) fn of_run(run: Unowned) -> Self {
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
pub(super) fn not_made(item: &ClaimItem, action: &Span, why: &str, message: &str) {
    let text = format!("{why} {message}");
    if is_lost(why) {
        action.record("outcome", format!("lost: {why}"));
    } else {
        action.record("error", text.as_str());
    }
    tracing::debug!(instance = item.instance, "the claim was not made: {text}");
}

/// Whether a claim was refused by the rules of claiming, as all but one are when several nodes race for an offer.
pub(super) fn is_lost(why: &str) -> bool {
    matches!(
        why,
        reason::ALREADY_CLAIMED
            | reason::OFFER_GONE
            | reason::SESSION_MOVED
            | reason::HALTED
            | reason::NO_CAPACITY
            | reason::AVOIDED
            | reason::NOT_FOUND
            | reason::DELETING
    )
}

/// Whether the coordinator did nothing since it can't see the store, or lags behind it: another one may do it.
pub(super) fn cannot_see(status: &Status) -> bool {
    status.code() == Code::Unavailable && reason_of(status).as_deref() == Some(reason::STORE_UNAVAILABLE)
}

/// Whether a call may have taken effect though it has failed.
pub(super) fn outcome_unknown(status: &Status) -> bool {
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

pub(super) fn won(item: ClaimItem, token: Token, result: ClaimResult) -> Claim {
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
