//! The cycle of the elected coordinator: observe (a snapshot) → plan (pure) → commit (guarded transactions, many actions each).
//!
//! Carrying out decides nothing: what a plan says is written if the records are as the plan saw them, else left for the
//! next plan. Actions share transactions; where that fails each has its own. The next plan waits until the view has seen everything that this one wrote.

mod written;

use super::{
    clock,
    events::{self, Events},
    leader::{self, Leadership, Term, guarded},
    mutant,
    seen::{Rate, Seen},
    view::View,
};
use crate::{
    plan::{self, Action, Freeze, Input, Plan, snapshot::Snapshot},
    store::{
        Error, Op, Store, keys,
        pack::{Step, pack},
        records,
    },
};
use drover_proto::{
    store::v1 as record,
    v1::{Severity, Token},
};
use futures::{FutureExt as _, StreamExt as _, future::BoxFuture, stream};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use written::{Written, name};

/// Transactions of one plan under way at the same time.
const CONCURRENT: usize = 16;
/// Operations of one transaction about what finds no node; one has room for 128.
const OPS_TOGETHER: usize = 100;
/// Longest wait for the view to see what was written, before planning anyway (each write is guarded).
const CATCH_UP: Duration = Duration::from_secs(5);
/// Longest time without a new plan.
const IDLE: Duration = Duration::from_secs(10);
/// Pause after a plan of which something failed, or nothing could be carried out.
const RETRY: Duration = Duration::from_millis(500);
/// Looking and planning take at most one part in so many of this coordinator's time: the next plan waits as many times as long
/// as the last one took, but for no longer than [`REST_MAX`]. What happens after a while without changes is planned at once.
const REST: u32 = 10;
const REST_MAX: Duration = Duration::from_millis(250);

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
    /// How many replacements may begin.
    pub replace_rate: Rate,
    /// Source of ids.
    pub seed: u64,
}

impl Cycle {
    /// Runs until `stop`, planning whenever this coordinator leads.
    pub async fn run(mut self, mut leadership: Leadership, stop: CancellationToken) {
        if mutant::on(mutant::name::NO_FREEZE) {
            self.settings.freeze_share_percent = 100;
        }
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
        let mut seen = Seen::default();
        let mut reached = term.revision;
        let (created, mut term, mut unsettled) = (term.revision, term, false);
        loop {
            if unsettled {
                // Until it is known what became of the last plan, another one would do some of it twice.
                match leader::settle(&self.store, created, term.schema).await {
                    Ok(revision) => (term.revision, reached, unsettled) = (revision, reached.max(revision), false),
                    Err(error) => {
                        tracing::warn!(%error, "planning waits until it is known what has become of the last plan");
                        tokio::time::sleep(RETRY).await;
                        continue;
                    }
                }
            }
            // A new leader sees all that the one before has written: those writes compare the key that it replaced.
            if let Err(behind) = self.view.at_least(reached, CATCH_UP).await {
                tracing::warn!(%behind, "planning waits for the view");
                continue;
            }
            let begun = Instant::now();
            let snapshot = snapshots.borrow_and_update().clone();
            let replacements = seen.replacements(self.replace_rate);
            let freeze = Freeze::of(&snapshot, clock::now_ms(), self.settings.freeze_share_percent);
            let was_frozen = seen.frozen;
            let durations = seen.note(&snapshot, term.since, self.view.live_since(), freeze);
            self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let plan = plan::plan(&Input {
                snapshot: &snapshot,
                now_ms: clock::now_ms(),
                settled_for_ms: durations.settled_ms,
                unclaimed_for_ms: &durations.unclaimed_ms,
                joined_for_ms: &durations.joined_ms,
                held_for: &durations.held,
                replacements,
                seed: self.seed,
                settings: &self.settings,
            });
            seen.replaced(plan.replacements);
            let rested = begun + (begun.elapsed() * REST).min(REST_MAX);
            self.tell_frozen(freeze, was_frozen);
            let told = self.tell_unplaced(&term, &snapshot, &plan);
            let (told, done) = tokio::join!(told, self.commit(&term, &snapshot, &plan));
            let Done { written, failed, unknown } = done.and(told);
            reached = reached.max(written);
            unsettled = unknown && !mutant::on(mutant::name::ACTING_ON_UNKNOWN_OUTCOME);
            if failed {
                tokio::time::sleep(RETRY).await;
                continue;
            }
            let pause = if plan.actions.is_empty() && written == 0 {
                plan.wake_in_ms.map_or(IDLE, |ms| Duration::from_millis(u64::try_from(ms).unwrap_or(0) + 1))
            } else if written == 0 {
                // Nothing is as the plan saw it: the same plan would come again until the view has changed.
                RETRY
            } else {
                Duration::ZERO
            };
            if !pause.is_zero() {
                let _ = tokio::time::timeout(pause, snapshots.changed()).await;
            }
            if rested > Instant::now() {
                tokio::time::sleep_until(rested).await;
            }
        }
    }

    /// Tells when replacement freezes, and when it goes on.
    fn tell_frozen(&self, freeze: Freeze, before: bool) {
        let now = freeze.frozen();
        if before == now {
            return;
        }
        let share = self.settings.freeze_share_percent;
        let (reason, severity, message) = if now {
            let message = format!(
                "{freeze}, more than {share} %: nothing is replaced until they come back, or `drover freeze override` says so"
            );
            ("Frozen", Severity::Error, message)
        } else if freeze.over {
            ("Thawed", Severity::Warning, format!("{freeze}: replacement goes on, as an operator has said"))
        } else {
            ("Thawed", Severity::Info, format!("{freeze}: replacement goes on"))
        };
        self.events.record(events::FLEET.to_owned(), reason, severity, message);
    }

    /// Writes what finds no node and why, where it has changed, for every replica to show; on the lease of the term, so that it is
    /// gone when nobody leads who could take it back.
    async fn tell_unplaced(&self, term: &Term, snapshot: &Snapshot, plan: &Plan) -> Done {
        let now: BTreeMap<&str, &str> = plan.unplaced.iter().map(|u| (u.deployment.as_str(), u.why.as_str())).collect();
        let before = |name: &str| snapshot.unplaced.get(name).map(|stored| stored.value.why.as_str());
        let news: Vec<_> = now.iter().filter(|(name, why)| before(name) != Some(**why)).collect();
        let put = |(name, why): &(&&str, &&str)| {
            let why = (**why).to_owned();
            records::put(keys::unplaced(name), &record::Unplaced { why }, term.lease)
        };
        let over = snapshot.unplaced.keys().filter(|name| !now.contains_key(name.as_str()));
        let over: Vec<Op> = over.map(|name| Op::Delete(keys::unplaced(name))).collect();
        let ops: Vec<Op> = news.iter().map(put).chain(over).collect();
        let mut done = Done::default();
        for some in ops.chunks(OPS_TOGETHER) {
            let step = Step { compare: Vec::new(), then: some.to_vec() };
            done = done.and(match self.store.txn(guarded(term, step)).await {
                Ok(outcome) if outcome.succeeded => Done { written: outcome.revision, ..Done::default() },
                // Another one leads.
                Ok(_) => Done::default(),
                Err(error) => {
                    tracing::warn!(%error, "what finds no node could not be told");
                    // Written again as it is then: there is nothing to settle.
                    Done { failed: true, ..Done::default() }
                }
            });
        }
        if !done.failed {
            for (name, why) in news {
                let message = format!("no node can take an instance: {why}");
                self.events.record(format!("deployment/{name}"), "Unplaced", Severity::Warning, message);
            }
        }
        done
    }

    /// Returns the highest revision written and whether anything failed for a reason that time may mend.
    async fn commit(&self, term: &Term, snapshot: &Snapshot, plan: &Plan) -> Done {
        let written = plan.actions.iter().map(|action| Written::of(snapshot, action)).collect();
        let runs = pack(written, Term::COMPARES, |written: &Written<'_>| &written.step);
        gathered(runs.iter().map(|run| self.carry_out(term, snapshot, run)).collect()).await
    }

    /// Actions that share a transaction. When the records are not as the plan saw them for one of them, each is tried for
    /// itself: that one is left for the next plan.
    fn carry_out<'a>(&'a self, term: &'a Term, snapshot: &'a Snapshot, run: &'a [Written<'a>]) -> BoxFuture<'a, Done> {
        async move {
            let together = Step::join(run.iter().map(|written| &written.step));
            match self.store.txn(guarded(term, together)).await {
                Ok(outcome) if outcome.succeeded => {
                    for written in run {
                        written.span.in_scope(|| self.tell(snapshot, written.action));
                    }
                    Done { written: outcome.revision, ..Done::default() }
                }
                Ok(_) | Err(Error::Rejected(_)) if run.len() > 1 => {
                    gathered(run.chunks(1).map(|one| self.carry_out(term, snapshot, one)).collect()).await
                }
                Ok(_) => Done::default(),
                Err(error) => {
                    let actions: Vec<_> = run.iter().map(|written| name(written.action)).collect();
                    tracing::warn!(%error, ?actions, "a step of the plan was not carried out");
                    Done { failed: true, unknown: matches!(error, Error::OutcomeUnknown(_)), ..Done::default() }
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
            Action::GiveUp { id, node, claim, why, offer, avoid, .. } => {
                let message = given_up(snapshot, id, node, *claim, why, offer.as_ref(), avoid);
                self.events.record_on_node(Some(node), id, "GivenUp", Severity::Warning, message);
            }
            Action::Forgive { id, node, .. } => {
                let message = format!("{node} has served it for a while: what it failed with before is forgiven");
                self.events.record_on_node(Some(node), id, "Forgiven", info, message);
            }
            Action::Stop { id, reason, .. } => {
                let node = snapshot.claims.get(id).map(|claim| claim.value.node.as_str());
                self.events.record_on_node(node, id, reason, info, "wanted no more".to_owned());
            }
            Action::RemoveDeployment { name, .. } => {
                self.events.record(events::FLEET.to_owned(), "Removed", info, format!("deployment {name} is gone"));
            }
            // That its session has ended is told by who has looked after it.
            Action::NoteLost { .. }
            | Action::CloseRun { .. }
            | Action::Collect { .. }
            | Action::TrimRevisions { .. } => {}
        }
    }
}

/// What has become of transactions.
#[derive(Debug, Default)]
struct Done {
    /// The highest revision written.
    written: i64,
    /// One has failed for a reason that time may mend.
    failed: bool,
    /// Of one it is not known whether it has taken effect.
    unknown: bool,
}

impl Done {
    fn and(self, other: Self) -> Self {
        Self {
            written: self.written.max(other.written),
            failed: self.failed || other.failed,
            unknown: self.unknown || other.unknown,
        }
    }
}

/// Does several transactions, a few at a time.
async fn gathered(steps: Vec<BoxFuture<'_, Done>>) -> Done {
    stream::iter(steps).buffer_unordered(CONCURRENT).fold(Done::default(), |all, one| async move { all.and(one) }).await
}

/// What is told of a claim that was given up: who had it, under which token, for how long, why, and who is asked now.
fn given_up(
    snapshot: &Snapshot,
    id: &str,
    node: &str,
    claim: i64,
    why: &str,
    offer: Option<&plan::Offer>,
    avoid: &[record::Avoid],
) -> String {
    let token = Token { generation: snapshot.generation(), revision: claim };
    let made_at = snapshot.claims.get(id).and_then(|claim| claim.value.made_at.as_ref());
    let age = made_at.map(|at| format!(", {} s old", clock::now_ms().saturating_sub(clock::millis(at)).max(0) / 1000));
    let delay_s = avoid.iter().find(|avoid| avoid.node == node).map_or(0, |avoid| avoid.delay_ms / 1000);
    let next = match offer {
        Some(offer) => format!("offered to {}; {node} is avoided for it for {delay_s} s", offer.candidates.join(", ")),
        None => "it is wanted no more".to_owned(),
    };
    format!("claim {token} of {node}{}: {why}; {next}", age.unwrap_or_default())
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
