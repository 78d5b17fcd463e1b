//! PURE but for spans and the time of a creation: an action as the transaction that carries it out.

use crate::{
    control::{clock, events, mutant},
    plan::{self, Action, snapshot::Snapshot},
    store::{Compare, Op, keys, pack::Step, records},
};
use drover_proto::store::v1 as record;
use tracing::Span;

/// An action as it is written, and its span, which is open until it is done.
pub(super) struct Written<'a> {
    pub(super) action: &'a Action,
    pub(super) span: Span,
    pub(super) step: Step,
}

impl<'a> Written<'a> {
    pub(super) fn of(snapshot: &Snapshot, action: &'a Action) -> Self {
        let span = tracing::info_span!("plan.commit", action = name(action), object = object(action));
        let cause = cause(snapshot, action);
        drover_telemetry::context::set_parent(&span, &cause);
        let traceparent = match drover_telemetry::context::traceparent_of(&span) {
            none if none.is_empty() => cause,
            own => own,
        };
        let (compare, then) = transaction(snapshot, action, traceparent);
        Self { action, span, step: Step { compare, then } }
    }
}

/// Compares and writes of an action, without the leader's compare.
fn transaction(snapshot: &Snapshot, action: &Action, traceparent: String) -> (Vec<Compare>, Vec<Op>) {
    match action {
        Action::Create { id, deployment, deployment_mod, revision, offer } => {
            let instance = record::Instance {
                deployment: deployment.clone(),
                revision: *revision,
                wanted: true,
                offer: offer.as_ref().map(stored_offer),
                created_at: Some(clock::now()),
                traceparent,
                avoid: Vec::new(),
            };
            let mut compare = vec![
                Compare::CreateRevision(keys::instance(id), 0),
                Compare::ModRevision(keys::deployment(deployment), *deployment_mod),
            ];
            compare.extend(offer.iter().flat_map(|offer| still_joined(snapshot, offer)));
            (compare, vec![records::put(keys::instance(id), &instance, 0)])
        }
        Action::Offer { id, expect, offer } => {
            let mut instance = stored(snapshot, id);
            instance.offer = Some(stored_offer(offer));
            let mut compare =
                vec![Compare::ModRevision(keys::instance(id), *expect), Compare::CreateRevision(keys::claim(id), 0)];
            compare.extend(still_joined(snapshot, offer));
            (compare, vec![records::put(keys::instance(id), &instance, 0)])
        }
        Action::GiveUp { id, expect, claim, status, offer, avoid, .. } => {
            let mut instance = stored(snapshot, id);
            instance.offer = offer.as_ref().map(stored_offer);
            instance.avoid.clone_from(avoid);
            // The claim that was judged, and what was said under it: an owner that gets on meanwhile, or serves, keeps it.
            let mut compare = vec![
                Compare::ModRevision(keys::instance(id), *expect),
                Compare::ModRevision(keys::claim(id), *claim),
                Compare::ModRevision(keys::status(id), *status),
            ];
            if mutant::on(mutant::name::GIVES_UP_BLINDLY) {
                compare.truncate(1);
            }
            compare.extend(offer.iter().flat_map(|offer| still_joined(snapshot, offer)));
            (compare, vec![Op::Delete(keys::claim(id)), records::put(keys::instance(id), &instance, 0)])
        }
        Action::Forgive { id, expect, node } => {
            let mut instance = stored(snapshot, id);
            instance.avoid = plan::avoid::without(&instance, node);
            let compare = vec![Compare::ModRevision(keys::instance(id), *expect)];
            (compare, vec![records::put(keys::instance(id), &instance, 0)])
        }
        Action::Stop { id, expect, .. } => {
            let mut instance = stored(snapshot, id);
            instance.wanted = false;
            instance.offer = None;
            instance.traceparent = traceparent;
            let compare = vec![Compare::ModRevision(keys::instance(id), *expect)];
            (compare, vec![records::put(keys::instance(id), &instance, 0)])
        }
        Action::CloseRun { key, expect } => {
            let key = format!("{}{key}", keys::RUNS);
            (vec![Compare::ModRevision(key.clone(), *expect)], vec![Op::Delete(key)])
        }
        Action::NoteLost { node, expect, at_ms } => {
            let mut record = snapshot.nodes.get(node).map(|n| n.value.clone()).unwrap_or_default();
            record.lost_at = Some(clock::timestamp(*at_ms));
            let compare =
                vec![Compare::ModRevision(keys::node(node), *expect), Compare::CreateRevision(keys::session(node), 0)];
            (compare, vec![records::put(keys::node(node), &record, 0)])
        }
        Action::Collect { id, expect } => {
            let compare =
                vec![Compare::ModRevision(keys::instance(id), *expect), Compare::CreateRevision(keys::claim(id), 0)];
            let then = vec![
                Op::Delete(keys::instance(id)),
                Op::Delete(keys::taken(id)),
                Op::Delete(keys::status(id)),
                Op::DeletePrefix(keys::runs(id)),
                Op::DeletePrefix(keys::events(&format!("instance/{id}"))),
            ];
            (compare, then)
        }
        Action::RemoveDeployment { name, expect } => {
            let compare = vec![Compare::ModRevision(keys::deployment(name), *expect)];
            let then = vec![
                Op::Delete(keys::deployment(name)),
                Op::DeletePrefix(keys::revisions(name)),
                Op::DeletePrefix(keys::events(&format!("deployment/{name}"))),
                Op::DeletePrefix(keys::events(&events::history(name))),
            ];
            (compare, then)
        }
        Action::TrimRevisions { name, expect, keys } => {
            // A deployment made anew under the same name counts its revisions from 1 again.
            let compare = vec![Compare::ModRevision(keys::deployment(name), *expect)];
            (compare, keys.iter().take(64).map(|k| Op::Delete(format!("{}{k}", keys::REVISIONS))).collect())
        }
    }
}

/// That the candidates of an offer have the sessions that the plan saw: one that has joined anew since may be about to claim
/// again what runs on it, which needs the room that is offered.
fn still_joined<'a>(snapshot: &'a Snapshot, offer: &'a plan::Offer) -> impl Iterator<Item = Compare> + 'a {
    offer.candidates.iter().map(|node| {
        let created = snapshot.sessions.get(node).map_or(0, |session| session.create_revision);
        Compare::CreateRevision(keys::session(node), created)
    })
}

/// The instance's record as the plan saw it; the transaction compares its revision.
fn stored(snapshot: &Snapshot, id: &str) -> record::Instance {
    snapshot.instances.get(id).map(|i| i.value.clone()).unwrap_or_default()
}

fn stored_offer(offer: &plan::Offer) -> record::Offer {
    record::Offer {
        candidates: offer.candidates.clone(),
        deadline: Some(clock::timestamp(offer.deadline_ms)),
        halt_generation: offer.halt_generation,
    }
}

/// W3C traceparent of the call that an action goes back to.
fn cause(snapshot: &Snapshot, action: &Action) -> String {
    let of_deployment = |name: &str| snapshot.deployments.get(name).map(|d| d.value.traceparent.clone());
    let of_instance = |id: &str| snapshot.instances.get(id);
    let found = match action {
        Action::Create { deployment, .. } => of_deployment(deployment),
        Action::Offer { id, .. } | Action::GiveUp { id, .. } => of_instance(id).map(|i| i.value.traceparent.clone()),
        Action::Stop { id, .. } | Action::Collect { id, .. } => {
            of_instance(id).and_then(|i| of_deployment(&i.value.deployment))
        }
        Action::RemoveDeployment { name, .. } => of_deployment(name),
        Action::NoteLost { .. } | Action::CloseRun { .. } | Action::Forgive { .. } | Action::TrimRevisions { .. } => {
            None
        }
    };
    found.unwrap_or_default()
}

pub(super) fn name(action: &Action) -> &'static str {
    match action {
        Action::Create { .. } => "create",
        Action::Offer { .. } => "offer",
        Action::GiveUp { .. } => "give_up",
        Action::Forgive { .. } => "forgive",
        Action::Stop { .. } => "stop",
        Action::NoteLost { .. } => "note_lost",
        Action::CloseRun { .. } => "close_run",
        Action::Collect { .. } => "collect",
        Action::RemoveDeployment { .. } => "remove_deployment",
        Action::TrimRevisions { .. } => "trim_revisions",
    }
}

fn object(action: &Action) -> &str {
    match action {
        Action::Create { id, .. }
        | Action::Offer { id, .. }
        | Action::GiveUp { id, .. }
        | Action::Forgive { id, .. }
        | Action::Stop { id, .. }
        | Action::Collect { id, .. } => id,
        Action::NoteLost { node, .. } => node,
        Action::CloseRun { key, .. } => key,
        Action::RemoveDeployment { name, .. } | Action::TrimRevisions { name, .. } => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Backend as _, Txn, memory::Memory};
    use drover_proto::v1::InstanceState;

    const ID: &str = "m-222222";

    async fn put<M: prost::Message>(store: &Memory, key: String, value: &M) -> i64 {
        let txn = Txn { then: vec![records::put(key, value, 0)], ..Txn::default() };
        store.txn(txn).await.unwrap().revision
    }

    /// Writes the status or the claim anew after a claim was judged, and gives it up; whether that took effect, and what is
    /// left.
    async fn given_up(rewritten: &[&str]) -> (bool, usize) {
        let store = Memory::start(1);
        let (claim, mut status) = (record::Claim::default(), record::Status::default());
        let instance = record::Instance { wanted: true, ..record::Instance::default() };
        let mut snapshot = Snapshot::default();
        let expect = put(&store, keys::instance(ID), &instance).await;
        let stored = std::sync::Arc::new(plan::snapshot::Stored {
            value: instance,
            create_revision: expect,
            mod_revision: expect,
        });
        snapshot.instances.insert(ID.to_owned(), stored);
        let claimed = put(&store, keys::claim(ID), &claim).await;
        let reported = put(&store, keys::status(ID), &status).await;
        if rewritten.contains(&"status") {
            status.set_state(InstanceState::Ready);
            put(&store, keys::status(ID), &status).await;
        }
        if rewritten.contains(&"claim") {
            let gone = Txn { then: vec![Op::Delete(keys::claim(ID))], ..Txn::default() };
            store.txn(gone).await.unwrap();
            put(&store, keys::claim(ID), &record::Claim { node: "b".to_owned(), ..claim }).await;
        }
        let avoid = vec![record::Avoid { node: "a".to_owned(), ..record::Avoid::default() }];
        let offer = Some(plan::Offer { candidates: vec!["b".to_owned()], deadline_ms: 9, halt_generation: 0 });
        let action = Action::GiveUp {
            id: ID.to_owned(),
            expect,
            claim: claimed,
            status: reported,
            node: "a".to_owned(),
            why: "it did nothing".to_owned(),
            offer,
            avoid: avoid.clone(),
        };
        let Step { compare, then } = Written::of(&snapshot, &action).step;
        let done = store.txn(Txn { compare, then, otherwise: vec![] }).await.unwrap().succeeded;
        let after: record::Instance = records::decode(&store.get(&keys::instance(ID)).await.unwrap().unwrap()).unwrap();
        assert_eq!((after.offer.is_some(), after.avoid == avoid), (done, done), "one with the other");
        (done, store.list(keys::CLAIMS).await.unwrap().items.len())
    }

    #[tokio::test]
    async fn an_owner_that_gets_on_meanwhile_keeps_its_claim_and_so_does_the_next_one() {
        assert_eq!(given_up(&[]).await, (true, 0));
        assert_eq!(given_up(&["status"]).await, (false, 1), "it has become ready");
        assert_eq!(given_up(&["claim"]).await, (false, 1), "it is another's by now");
    }
}
