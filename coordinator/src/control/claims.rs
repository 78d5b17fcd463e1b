//! Claims: made by one transaction of the store, and by nothing else.
//!
//! The transaction is that of the design ("Claiming"): for each instance it compares the offer, that there is no claim and
//! that the offer has not served before; once for all of them the session at the revision that the *request* names, the
//! schema, and the halt as read. Several claims of one node share it, and so their token. When it fails, those that what it
//! read shows lost are left out and it is tried for the others: it has written nothing, so the session is still to be at
//! the revision of the request, which is never read again.

mod batch;

use super::{
    events::Events,
    mutant,
    view::{Behind, View},
};
use crate::store::{self, Store};
use batch::Batch;
use drover_proto::{
    limits,
    status::reason,
    v1::{ClaimItem, ClaimManyRequest, ClaimManyResponse, ClaimRequest, ClaimResponse, ClaimResult, Severity, Token},
};
use std::{collections::BTreeSet, time::Duration};
use tracing::Span;

/// Longest wait for this coordinator's view to reach what the request refers to.
const CATCH_UP: Duration = Duration::from_secs(2);

/// Why no claim was made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is lost; `reason` is one of `drover_proto::status::reason`.
    #[error("{message}")]
    Refused {
        /// Word for programs.
        reason: String,
        /// For people.
        message: String,
    },
    /// This coordinator does not know enough yet.
    #[error(transparent)]
    Behind(#[from] Behind),
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// Why one claim was not made.
#[derive(Debug)]
struct Refused {
    reason: &'static str,
    message: String,
}

fn refused(reason: &'static str, message: impl Into<String>) -> Refused {
    Refused { reason, message: message.into() }
}

impl From<Refused> for Error {
    fn from(Refused { reason, message }: Refused) -> Self {
        Self::Refused { reason: reason.to_owned(), message }
    }
}

/// Makes claims.
#[derive(Debug, Clone)]
pub struct Claims {
    store: Store,
    view: View,
    events: Events,
}

impl Claims {
    /// Over this store and view.
    #[must_use]
    pub fn new(store: Store, view: View, events: Events) -> Self {
        Self { store, view, events }
    }

    /// Claims an instance for a node, in the trace of `traceparent`.
    pub async fn claim(&self, node: &str, request: &ClaimRequest, traceparent: &str) -> Result<ClaimResponse, Error> {
        let item = ClaimItem {
            instance: request.instance.clone(),
            offer_revision: request.offer_revision,
            nonce: request.nonce.clone(),
            memory_bytes: request.memory_bytes,
            recorded_token: request.recorded_token,
            traceparent: traceparent.to_owned(),
        };
        let one = ClaimManyRequest {
            session_id: request.session_id.clone(),
            session_revision: request.session_revision,
            halt_generation: request.halt_generation,
            claims: vec![item],
        };
        let answer = self.claim_many(node, &one).await?;
        let session_revision = answer.session_revision;
        match answer.results.into_iter().next() {
            Some(ClaimResult { token: Some(token), spec, revision, .. }) => {
                Ok(ClaimResponse { token: Some(token), session_revision, spec, revision })
            }
            Some(ClaimResult { reason, message, .. }) => Err(Error::Refused { reason, message }),
            // There is a result for each claim of the request.
            None => Err(refused(reason::OFFER_GONE, "the claim has no result").into()),
        }
    }

    /// Claims several instances for a node. `Err` when nothing was made for a reason that they share, and when it is not
    /// known whether it was.
    pub async fn claim_many(&self, node: &str, request: &ClaimManyRequest) -> Result<ClaimManyResponse, Error> {
        check_form(&request.claims)?;
        let spans: Vec<Span> = request.claims.iter().map(|item| span(node, item)).collect();
        let offered = request.claims.iter().map(|item| item.offer_revision).max().unwrap_or(0);
        self.view.at_least(request.session_revision.max(offered), CATCH_UP).await?;
        let (snapshot, shares) = self.view.shared().borrow().clone();
        let mut batch = Batch::check(&snapshot, &shares, node, request)?;
        let mut session_revision = request.session_revision;
        while !batch.is_settled() {
            let outcome = match self.store.txn(batch.transaction()?).await {
                Err(store::Error::OutcomeUnknown(_)) if mutant::on(mutant::name::ACTS_ON_UNKNOWN_OUTCOME) => {
                    store::TxnOutcome { succeeded: true, revision: snapshot.revision + 1, reads: vec![] }
                }
                outcome => outcome?,
            };
            if outcome.succeeded {
                session_revision = outcome.revision;
                let generation = mutant::told_generation(snapshot.generation());
                batch.made(Token { generation, revision: outcome.revision });
            } else {
                // What is lost leaves the batch, so this ends.
                batch.lost(&outcome.reads)?;
            }
        }
        let results = batch.into_results();
        for ((item, result), span) in request.claims.iter().zip(&results).zip(spans) {
            let Some(token) = result.token else { continue };
            let again = item.recorded_token.is_some();
            let what = if again { "ReClaimed" } else { "Claimed" };
            // A node that is back claims again all that it has: that it is back is told once.
            let on = (!again).then_some(node);
            let message = format!("by {node} with token {token}");
            span.in_scope(|| self.events.record_on_node(on, &item.instance, what, Severity::Info, message));
        }
        Ok(ClaimManyResponse { results, session_revision })
    }
}

fn span(node: &str, item: &ClaimItem) -> Span {
    let span = tracing::info_span!("node.claim", node, instance = item.instance);
    drover_telemetry::context::set_parent(&span, &item.traceparent);
    span
}

/// What is wrong with a request whatever the store holds.
fn check_form(items: &[ClaimItem]) -> Result<(), Error> {
    let invalid = |what: String| Err(refused(reason::INVALID_FIELD, what).into());
    let (count, max) = (items.len(), limits::CLAIMS_PER_CALL_MAX);
    if !(1..=max).contains(&count) {
        return invalid(format!("claims: {count} are named, 1 to {max} are allowed: spread them over several calls"));
    }
    let mut named = BTreeSet::new();
    match items.iter().enumerate().find(|(_, item)| !named.insert(&item.instance)) {
        Some((n, item)) => invalid(format!(
            "claims[{n}].instance = \"{}\" is named by an earlier claim of this call: claim it once",
            item.instance
        )),
        None => Ok(()),
    }
}
