//! The cycle of the elected coordinator: observe (a snapshot) → plan (pure) → commit (guarded transactions, many actions each).
//!
//! Carrying out decides nothing: what a plan says is written if the records are as the plan saw them, else left for the
//! next plan. Actions share transactions; where that fails each has its own. The next plan waits until the view has seen everything that this one wrote.

use super::{
    clock,
    events::{self, Events},
    leader::{Leadership, Term, guarded},
    view::View,
};
use crate::{
    plan::{self, Action, Input, Plan, snapshot::Snapshot},
    store::{
        Compare, Error, Op, Store, keys,
        pack::{Step, pack},
        records,
    },
};
use drover_proto::{store::v1 as record, v1::Severity};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use std::{collections::BTreeMap, time::Duration};
use tokio_util::sync::CancellationToken;
use tracing::Span;

/// Transactions of one plan under way at the same time.
const CONCURRENT: usize = 16;
/// Longest wait for the view to see what was written, before planning anyway (each write is guarded).
const CATCH_UP: Duration = Duration::from_secs(5);
/// Longest time without a new plan.
const IDLE: Duration = Duration::from_secs(10);
/// Pause after a plan of which something failed, or nothing could be carried out.
const RETRY: Duration = Duration::from_millis(500);

/// What the cycle works with.
#[derive(Debug)]
pub struct Cycle {
    /// The store.
    pub store: Store,
    /// The view.
    pub view: View,
    /// Events.
    pub events: Events,
    /// Settings of planning.
    pub settings: plan::Settings,
    /// Source of ids.
    pub seed: u64,
    /// What could not be placed and why, by deployment; shown by the API of this coordinator.
    pub unplaced: tokio::sync::watch::Sender<BTreeMap<String, String>>,
}

impl Cycle {
    /// Runs until `stop`, planning whenever this coordinator leads.
    pub async fn run(mut self, mut leadership: Leadership, stop: CancellationToken) {
        let work = async {
            loop {
                let term = match leadership.wait_for(Option::is_some).await {
                    Ok(term) => *term,
                    Err(_) => return,
                };
                let Some(term) = term else { continue };
                let mut over = leadership.clone();
                tokio::select! {
                    () = self.lead(term) => {}
                    _ = over.wait_for(|now| *now != Some(term)) => {}
                }
                // What finds no node is the next leader's to tell.
                self.unplaced.send_replace(BTreeMap::new());
            }
        };
        tokio::select! {
            // First, since the view ends with it, and work without a view would not wait for anything.
            biased;
            () = stop.cancelled() => {}
            () = work => {}
        }
    }

    async fn lead(&mut self, term: Term) {
        let mut snapshots = self.view.subscribe();
        let mut unclaimed_since = BTreeMap::new();
        let mut reached = term.revision;
        loop {
            // A new leader sees all that the one before has written: those writes compare the key that it replaced.
            if let Err(behind) = self.view.at_least(reached, CATCH_UP).await {
                tracing::warn!(%behind, "planning waits for the view");
                continue;
            }
            let snapshot = snapshots.borrow_and_update().clone();
            let now_ms = clock::now_ms();
            note_unclaimed(&snapshot, now_ms, &mut unclaimed_since);
            self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let plan = plan::plan(&Input {
                snapshot: &snapshot,
                now_ms,
                leading_since_ms: term.since_ms,
                unclaimed_since_ms: &unclaimed_since,
                seed: self.seed,
                settings: &self.settings,
            });
            self.tell_unplaced(&plan);
            let (written, failed) = self.commit(&term, &snapshot, &plan).await;
            reached = reached.max(written);
            if failed {
                tokio::time::sleep(RETRY).await;
                continue;
            }
            let pause = if plan.actions.is_empty() {
                plan.wake_at_ms
                    .map_or(IDLE, |at| Duration::from_millis(u64::try_from(at - clock::now_ms()).unwrap_or(0) + 1))
            } else if written == 0 {
                // Nothing is as the plan saw it: the same plan would come again until the view has changed.
                RETRY
            } else {
                continue;
            };
            let _ = tokio::time::timeout(pause, snapshots.changed()).await;
        }
    }

    fn tell_unplaced(&self, plan: &Plan) {
        let now: BTreeMap<String, String> =
            plan.unplaced.iter().map(|u| (u.deployment.clone(), u.why.clone())).collect();
        self.unplaced.send_if_modified(|before| {
            for (name, why) in &now {
                if before.get(name) != Some(why) {
                    let message = format!("no node can take an instance: {why}");
                    self.events.record(format!("deployment/{name}"), "Unplaced", Severity::Warning, message);
                }
            }
            let changed = *before != now;
            *before = now;
            changed
        });
    }

    /// Returns the highest revision written and whether anything failed for a reason that time may mend.
    async fn commit(&self, term: &Term, snapshot: &Snapshot, plan: &Plan) -> (i64, bool) {
        let written = plan.actions.iter().map(|action| Written::of(snapshot, action)).collect();
        let runs = pack(written, 1, |written: &Written<'_>| &written.step);
        gathered(runs.iter().map(|run| self.carry_out(term, snapshot, run)).collect()).await
    }

    /// Actions that share a transaction. When the records are not as the plan saw them for one of them, each is tried for
    /// itself: that one is left for the next plan.
    fn carry_out<'a>(
        &'a self,
        term: &'a Term,
        snapshot: &'a Snapshot,
        run: &'a [Written<'a>],
    ) -> BoxFuture<'a, (i64, bool)> {
        async move {
            let together = Step::join(run.iter().map(|written| &written.step));
            match self.store.txn(guarded(term, together)).await {
                Ok(outcome) if outcome.succeeded => {
                    for written in run {
                        written.span.in_scope(|| self.tell(snapshot, written.action));
                    }
                    (outcome.revision, false)
                }
                Ok(_) | Err(Error::Rejected(_)) if run.len() > 1 => {
                    gathered(run.chunks(1).map(|one| self.carry_out(term, snapshot, one)).collect()).await
                }
                Ok(_) => (0, false),
                Err(error) => {
                    let actions: Vec<_> = run.iter().map(|written| name(written.action)).collect();
                    tracing::warn!(%error, ?actions, "a step of the plan was not carried out");
                    (0, true)
                }
            }
        }
        .boxed()
    }

    fn tell(&self, snapshot: &Snapshot, action: &Action) {
        let info = Severity::Info;
        match action {
            Action::Create { id, deployment, offer, .. } => {
                let to = offer.as_ref().map_or("nobody yet".to_owned(), |o| o.candidates.join(", "));
                self.events.record(
                    format!("instance/{id}"),
                    "Created",
                    info,
                    format!("for {deployment}; offered to {to}"),
                );
            }
            // An offer in vain is made again every few seconds: told once, it does not push the reasons for it out of the ring.
            Action::Offer { id, offer, .. } if offered_before(snapshot, id, offer) => {}
            Action::Offer { id, offer, .. } => {
                let to = offer.candidates.join(", ");
                self.events.record(format!("instance/{id}"), "Offered", info, format!("to {to}"));
            }
            Action::Stop { id, reason, .. } => {
                let node = snapshot.claims.get(id).map(|claim| claim.value.node.as_str());
                self.events.record_on_node(node, id, reason, info, "wanted no more".to_owned());
            }
            Action::RemoveDeployment { name, .. } => {
                self.events.record(events::FLEET.to_owned(), "Removed", info, format!("deployment {name} is gone"));
            }
            Action::Collect { .. } | Action::TrimRevisions { .. } => {}
        }
    }
}

/// Does several transactions, a few at a time: the highest revision written, and whether one has failed.
async fn gathered(steps: Vec<BoxFuture<'_, (i64, bool)>>) -> (i64, bool) {
    stream::iter(steps)
        .buffer_unordered(CONCURRENT)
        .fold((0, false), |(revision, failed), (r, f)| async move { (revision.max(r), failed || f) })
        .await
}

/// An action as it is written, and its span, which is open until it is done.
struct Written<'a> {
    action: &'a Action,
    span: Span,
    step: Step,
}

impl<'a> Written<'a> {
    fn of(snapshot: &Snapshot, action: &'a Action) -> Self {
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
            };
            let compare = vec![
                Compare::CreateRevision(keys::instance(id), 0),
                Compare::ModRevision(keys::deployment(deployment), *deployment_mod),
            ];
            (compare, vec![records::put(keys::instance(id), &instance, 0)])
        }
        Action::Offer { id, expect, offer } => {
            let mut instance = stored(snapshot, id);
            instance.offer = Some(stored_offer(offer));
            let compare =
                vec![Compare::ModRevision(keys::instance(id), *expect), Compare::CreateRevision(keys::claim(id), 0)];
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
        Action::Offer { id, .. } => of_instance(id).map(|i| i.value.traceparent.clone()),
        Action::Stop { id, .. } | Action::Collect { id, .. } => {
            of_instance(id).and_then(|i| of_deployment(&i.value.deployment))
        }
        Action::RemoveDeployment { name, .. } => of_deployment(name),
        Action::TrimRevisions { .. } => None,
    };
    found.unwrap_or_default()
}

/// Whether the offer before went to the same nodes, in whatever order.
fn offered_before(snapshot: &Snapshot, id: &str, offer: &plan::Offer) -> bool {
    let sorted = |nodes: &[String]| {
        let mut nodes = nodes.to_vec();
        nodes.sort();
        nodes
    };
    let before = snapshot.instances.get(id).and_then(|i| i.value.offer.as_ref());
    before.is_some_and(|before| sorted(&before.candidates) == sorted(&offer.candidates))
}

fn name(action: &Action) -> &'static str {
    match action {
        Action::Create { .. } => "create",
        Action::Offer { .. } => "offer",
        Action::Stop { .. } => "stop",
        Action::Collect { .. } => "collect",
        Action::RemoveDeployment { .. } => "remove_deployment",
        Action::TrimRevisions { .. } => "trim_revisions",
    }
}

fn object(action: &Action) -> &str {
    match action {
        Action::Create { id, .. } | Action::Offer { id, .. } | Action::Stop { id, .. } | Action::Collect { id, .. } => {
            id
        }
        Action::RemoveDeployment { name, .. } | Action::TrimRevisions { name, .. } => name,
    }
}

/// Remembers since when what was owned before is seen without a claim.
fn note_unclaimed(snapshot: &Snapshot, now_ms: i64, since: &mut BTreeMap<String, i64>) {
    since.retain(|id, _| snapshot.instances.contains_key(id) && !snapshot.claims.contains_key(id));
    for id in snapshot.instances.keys() {
        if snapshot.taken.contains_key(id) && !snapshot.claims.contains_key(id) {
            since.entry(id.clone()).or_insert(now_ms);
        }
    }
}
