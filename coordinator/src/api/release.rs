//! The forced release of a claim: an operator's word that a node holds an instance in vain.
//!
//! It only deletes the claim, and only the one that was looked at: whoever owns the instance next makes a claim of its own,
//! by the one transaction that makes claims, under a higher token. What runs under the old one is a run without a claim.

use crate::{
    control::{clock, events::Events, store_status, view::View},
    plan::{
        avoid,
        snapshot::{Snapshot, Stored},
    },
    store::{Compare, Op, Store, Txn, keys, records},
};
use drover_proto::{
    ids,
    status::{invalid_field, reason, with_reason},
    store::v1 as record,
    v1::{InstanceState, ReleaseClaimRequest, ReleaseClaimResponse, Severity, Token},
};
use std::time::Duration;
use tonic::{Code, Status};

/// How often it is tried when the instance's record is written meanwhile.
const ATTEMPTS: usize = 4;
/// Longest wait for the view to show what was written.
const CATCH_UP: Duration = Duration::from_secs(2);

/// Releases claims.
#[derive(Debug, Clone)]
pub(super) struct Release {
    pub(super) store: Store,
    pub(super) view: View,
    pub(super) events: Events,
    pub(super) delays: avoid::Delays,
}

/// A claim as it stands, and its instance.
struct Standing {
    claim: Stored<record::Claim>,
    instance: Stored<record::Instance>,
    token: Token,
}

impl Release {
    pub(super) async fn release(
        &self,
        who: &str,
        request: ReleaseClaimRequest,
    ) -> Result<ReleaseClaimResponse, Status> {
        let id = &request.instance;
        ids::check_instance_id(id).map_err(|e| invalid_field("instance", e.to_string()))?;
        let why = super::processes::why(&request.reason)?;
        for _ in 0..ATTEMPTS {
            let snapshot = self.view.snapshot();
            let Standing { claim, instance, token } = self.standing(&snapshot, id).await?;
            if request.token.is_some_and(|named| named != token) {
                let named = request.token.unwrap_or_default();
                let what = format!("the claim on {id} is {}, not {named}: look at it again", held(&claim, token));
                return Err(with_reason(Code::Aborted, reason::ALREADY_CLAIMED, what));
            }
            let (node, now_ms) = (&claim.value.node, clock::now_ms());
            let because = format!("its claim was released by {who}{why}");
            let avoid = avoid::with(&instance.value, node, because, now_ms, self.delays);
            let avoided_until = avoid.iter().find(|avoid| avoid.node == *node).and_then(|avoid| avoid.until);
            let changed = record::Instance { offer: None, avoid, ..instance.value };
            let compare = vec![
                Compare::ModRevision(keys::claim(id), claim.mod_revision),
                Compare::ModRevision(keys::instance(id), instance.mod_revision),
                Compare::ModRevision(keys::SCHEMA.to_owned(), snapshot.schema.as_ref().map_or(0, |s| s.mod_revision)),
            ];
            let then = vec![Op::Delete(keys::claim(id)), records::put(keys::instance(id), &changed, 0)];
            let outcome = self.store.txn(Txn { compare, then, otherwise: vec![] }).await.map_err(store_status)?;
            if !outcome.succeeded {
                // One of them was written meanwhile.
                continue;
            }
            let known = snapshot.statuses.get(id).filter(|status| status.value.token == Some(token));
            let state = known.map_or(InstanceState::Claimed, |status| status.value.state());
            let message = format!("claim {} is released by {who}{why}; it was {}", held(&claim, token), word(state));
            self.events.record_on_node(Some(node), id, "ClaimReleased", Severity::Warning, message);
            let _ = self.view.at_least(outcome.revision, CATCH_UP).await;
            return Ok(ReleaseClaimResponse {
                node: node.clone(),
                token: Some(token),
                state: state.into(),
                held_ms: held_ms(&claim, now_ms),
                avoided_until,
            });
        }
        let what = format!("{id} was written by others {ATTEMPTS} times in a row: try again");
        Err(with_reason(Code::Unavailable, reason::STORE_UNAVAILABLE, what))
    }

    /// Read from the store itself: a view that lags must not say who holds what.
    async fn standing(&self, snapshot: &Snapshot, id: &str) -> Result<Standing, Status> {
        let read = Txn { then: vec![Op::Get(keys::instance(id)), Op::Get(keys::claim(id))], ..Txn::default() };
        let reads = self.store.txn(read).await.map_err(store_status)?.reads;
        let read = |n: usize| reads.get(n).and_then(|read| read.first());
        let Some(instance) = read(0) else { return Err(super::convert::no_instance(id)) };
        let Some(claim) = read(1) else {
            let what = format!("nobody holds a claim on {id}: there is nothing to release");
            return Err(with_reason(Code::FailedPrecondition, reason::NOT_CLAIMED, what));
        };
        let token = Token { generation: snapshot.generation(), revision: claim.mod_revision };
        let claim = records::stored(claim).map_err(store_status)?;
        Ok(Standing { claim, instance: records::stored(instance).map_err(store_status)?, token })
    }
}

fn held_ms(claim: &Stored<record::Claim>, now_ms: i64) -> i64 {
    claim.value.made_at.as_ref().map_or(0, |at| now_ms.saturating_sub(clock::millis(at)).max(0))
}

/// A claim, for people: its token, its holder and its age.
fn held(claim: &Stored<record::Claim>, token: Token) -> String {
    let age = match held_ms(claim, clock::now_ms()) {
        0 => String::new(),
        ms => format!(", held for {} s", ms / 1000),
    };
    format!("{token} of {}{age}", claim.value.node)
}

fn word(state: InstanceState) -> String {
    state.as_str_name().trim_start_matches("INSTANCE_STATE_").to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{memory::Memory, schema};
    use drover_proto::status::reason_of;
    use std::sync::Arc;
    use tokio_util::sync::CancellationToken;

    const ID: &str = "m-222222";

    async fn release() -> Release {
        let store: Store = Arc::new(Memory::start(1));
        schema::open(&store, None).await.unwrap();
        let view = View::start(store.clone(), CancellationToken::new());
        let (events, _) = Events::start(store.clone(), "coordinator/test".to_owned());
        let delays = avoid::Delays { first_ms: 60_000, max_ms: 600_000 };
        let offer = Some(record::Offer { candidates: vec!["a".to_owned()], ..record::Offer::default() });
        let instance = record::Instance { wanted: true, offer, ..record::Instance::default() };
        let then = vec![records::put(keys::instance(ID), &instance, 0)];
        store.txn(Txn { then, ..Txn::default() }).await.unwrap();
        Release { store, view, events, delays }
    }

    impl Release {
        async fn claimed_by(&self, node: &str) -> Token {
            let made_at = Some(clock::timestamp(clock::now_ms() - 5000));
            let claim = record::Claim { node: node.to_owned(), made_at, ..record::Claim::default() };
            let then = vec![records::put(keys::claim(ID), &claim, 0)];
            let revision = self.store.txn(Txn { then, ..Txn::default() }).await.unwrap().revision;
            self.view.at_least(revision, CATCH_UP).await.unwrap();
            Token { generation: self.view.snapshot().generation(), revision }
        }

        async fn asked(&self, token: Option<Token>) -> Result<ReleaseClaimResponse, Status> {
            let request = ReleaseClaimRequest { instance: ID.to_owned(), token, reason: "it hangs".to_owned() };
            self.release("an operator", request).await
        }

        async fn instance(&self) -> record::Instance {
            records::decode(&self.store.get(&keys::instance(ID)).await.unwrap().unwrap()).unwrap()
        }
    }

    #[tokio::test]
    async fn the_claim_that_stands_goes_and_its_holder_is_avoided() {
        let release = release().await;
        let token = release.claimed_by("a").await;
        let answer = release.asked(Some(token)).await.unwrap();
        assert_eq!((answer.node.as_str(), answer.token, answer.state()), ("a", Some(token), InstanceState::Claimed));
        assert!((5000..600_000).contains(&answer.held_ms), "{answer:?}");
        assert!(release.store.get(&keys::claim(ID)).await.unwrap().is_none());
        let instance = release.instance().await;
        assert!(instance.wanted && instance.offer.is_none(), "an offer that was made before serves no more");
        assert_eq!(instance.avoid[0].node, "a");
        assert!(instance.avoid[0].why.contains("released by an operator, because: it hangs"), "{instance:?}");
        let again = release.asked(None).await.unwrap_err();
        assert_eq!((again.code(), reason_of(&again).as_deref()), (Code::FailedPrecondition, Some(reason::NOT_CLAIMED)));
    }

    #[tokio::test]
    async fn another_claim_than_the_one_meant_stands_and_is_named() {
        let release = release().await;
        let token = release.claimed_by("b").await;
        let before = release.instance().await;
        let refused = release.asked(Some(Token { revision: 1, ..token })).await.unwrap_err();
        assert_eq!(refused.code(), Code::Aborted);
        let named = format!("is {token} of b, held for 5 s, not 1.1");
        assert!(refused.message().contains(&named), "{}", refused.message());
        assert!(release.store.get(&keys::claim(ID)).await.unwrap().is_some());
        assert_eq!(release.instance().await, before);
        assert!(release.asked(None).await.is_ok(), "without a token whichever stands is meant");
    }

    #[tokio::test]
    async fn an_instance_that_is_not_there_is_told_and_so_is_a_bad_id() {
        let release = release().await;
        let ask = async |instance: &str| {
            let request = ReleaseClaimRequest { instance: instance.to_owned(), ..ReleaseClaimRequest::default() };
            release.release("an operator", request).await.unwrap_err().code()
        };
        assert_eq!(ask("m-333333").await, Code::NotFound);
        assert_eq!(ask("no id").await, Code::InvalidArgument);
    }
}
