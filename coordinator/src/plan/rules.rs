//! PURE. The rules: what must exist, what must stop, what is to be collected.

use super::{
    Action, Freeze, Input, Plan, Unplaced, avoid,
    holders::Holders,
    place::{self, Rooms},
    progress::{self, Verdict, Why},
    snapshot::{Snapshot, Stored},
};
use drover_proto::{
    ids,
    store::v1 as record,
    v1::{DeploymentSpec, InstanceState},
};
use std::{collections::BTreeSet, sync::Arc};

/// Records of runs that one plan closes.
const RUNS_CLOSED_MAX: usize = 256;

type Member<'a> = (&'a String, &'a Arc<Stored<record::Instance>>);

/// Makes a plan. The same input gives the same plan.
#[must_use]
pub fn plan(input: &Input<'_>) -> Plan {
    let mut plan = Plan::default();
    let mut rooms = Rooms::of(input);
    let holders = Holders::of(input);
    let freeze = Freeze::of(input.snapshot, input.now_ms, input.settings.freeze_share_percent);
    let replacing = Replacing { holders, freeze };
    note_lost(input, &mut plan);
    close_runs(input, &mut plan);
    // Nothing is concluded from a record that can't be read: what it is about stays as it is.
    let readable = |name: &str| !input.snapshot.is_obscure(name);
    for (name, deployment) in input.snapshot.deployments.iter().filter(|(name, _)| readable(name)) {
        let members: Vec<Member<'_>> = input.snapshot.instances_of(name).collect();
        let sized = size(input, name, deployment, &members, &freeze, &mut rooms, &mut plan);
        for (id, instance) in members.iter().filter(|(id, _)| !sized.stopped.contains(id.as_str())) {
            tend(input, id, instance, &replacing, &mut rooms, &mut plan);
        }
        let stopping = !sized.stopped.is_empty() || members.iter().any(|(_, i)| !i.value.wanted);
        if !stopping && let Some(action) = make_way(input, name, deployment, &sized.old, &replacing, &rooms, &plan) {
            plan.actions.push(action);
        }
        if deployment.value.deleting && members.is_empty() {
            plan.actions.push(Action::RemoveDeployment { name: name.clone(), expect: deployment.mod_revision });
        } else {
            trim(input, name, deployment, &members, &mut plan);
        }
    }
    // An instance without a deployment is what a half-restored store would show: nobody wants it.
    for (id, instance) in &input.snapshot.instances {
        let deployment = &instance.value.deployment;
        if !input.snapshot.deployments.contains_key(deployment) && readable(deployment) {
            if instance.value.wanted {
                plan.actions.push(stop(id, instance, "DeploymentGone"));
            } else {
                tend(input, id, instance, &replacing, &mut rooms, &mut plan);
            }
        }
    }
    // What no node can take may fit those of which it is not known yet what runs on them.
    if !plan.unplaced.is_empty()
        && let Some(ms) = place::inventory_in_ms(input)
    {
        plan.wake_in(ms);
    }
    plan
}

fn stop(id: &str, instance: &Stored<record::Instance>, reason: &'static str) -> Action {
    Action::Stop { id: id.to_owned(), expect: instance.mod_revision, reason }
}

/// What decides on giving to others what was owned.
struct Replacing<'a> {
    holders: Holders<'a>,
    freeze: Freeze,
}

/// Notes since when nodes are lost: in the store, so that a change of leader changes nothing.
fn note_lost(input: &Input<'_>, plan: &mut Plan) {
    let lost = input.snapshot.nodes.iter().filter(|(name, _)| !input.snapshot.sessions.contains_key(*name));
    let news = lost.filter(|(_, node)| node.value.lost_at.is_none());
    plan.actions.extend(news.map(|(name, node)| Action::NoteLost {
        node: name.clone(),
        expect: node.mod_revision,
        at_ms: input.now_ms,
    }));
}

/// Closes what has ended unreported: only an owner reports, and its node says itself that it runs there no more.
fn close_runs(input: &Input<'_>, plan: &mut Plan) {
    let ended = input.snapshot.runs.iter().filter(|(key, run)| {
        let instance = key.split('/').next().unwrap_or_default();
        input.snapshot.denies(&run.value.node, instance)
    });
    let close = |(key, run): (&String, &Arc<Stored<record::Run>>)| Action::CloseRun {
        key: key.clone(),
        expect: run.mod_revision,
    };
    plan.actions.extend(ended.take(RUNS_CLOSED_MAX).map(close));
}

/// Whether clients get answers from an instance; the least first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Serving {
    /// Nothing answers.
    No,
    /// A run without a standing claim was ready when it was last heard of.
    Perhaps,
    /// Its owner says so.
    Ready,
}

impl Serving {
    fn of(snapshot: &Snapshot, id: &str) -> Self {
        match snapshot.state(id) {
            InstanceState::Ready => Self::Ready,
            _ if snapshot.answering(id).is_some() => Self::Perhaps,
            _ => Self::No,
        }
    }
}

/// What sizing a deployment has led to.
struct Sized<'a> {
    /// Instances that this plan stops.
    stopped: BTreeSet<&'a str>,
    /// Instances of an older revision that go on serving for now.
    old: Vec<Member<'a>>,
}

/// Brings the number of wanted instances to what was asked, and moves them to the present revision of the spec.
fn size<'a>(
    input: &Input<'a>,
    name: &'a str,
    deployment: &Arc<Stored<record::Deployment>>,
    members: &[Member<'a>],
    freeze: &Freeze,
    rooms: &mut Rooms<'a>,
    plan: &mut Plan,
) -> Sized<'a> {
    let snapshot = input.snapshot;
    let asked = if deployment.value.deleting { 0 } else { usize::try_from(deployment.value.replicas).unwrap_or(0) };
    let wanted = members.iter().filter(|(_, i)| i.value.wanted);
    let (mut current, mut old): (Vec<Member<'a>>, Vec<Member<'a>>) =
        wanted.copied().partition(|(_, i)| i.value.revision == deployment.value.revision);
    let mut stopped = BTreeSet::new();

    // Those that serve least go first, then by id.
    let serving = |(id, _): &Member<'_>| Serving::of(snapshot, id);
    current.sort_by_cached_key(|member| (serving(member), member.0));
    old.sort_by_cached_key(|member| (serving(member), member.0));

    let surplus = current.len().saturating_sub(asked);
    let reason = if deployment.value.deleting { "Deleted" } else { "ScaledDown" };
    for (id, instance) in current.drain(..surplus) {
        stopped.insert(id.as_str());
        plan.actions.push(stop(id, instance, reason));
    }

    if let Some(spec) = spec_of(snapshot, name, deployment.value.revision) {
        for n in current.len()..asked {
            let id = fresh_id(input, name, n);
            let offer = offer_unless_halted(input, name, spec, &id, None, None, rooms);
            let offer = offer.map_err(|why| unplaced(plan, name, why)).ok();
            plan.actions.push(Action::Create {
                id,
                deployment: name.to_owned(),
                deployment_mod: deployment.mod_revision,
                revision: deployment.value.revision,
                offer,
            });
        }
    }

    // Old ones go as new ones become ready, so that as many serve as were asked for; what does not serve goes at once. One that
    // may answer without a claim goes when enough serve without it: it does not count as serving, and is not nothing either.
    let ready = |members: &[Member<'_>]| members.iter().filter(|member| serving(member) == Serving::Ready).count();
    let in_all = ready(&current) + ready(&old);
    let mut spare = in_all.saturating_sub(asked);
    let reason = if deployment.value.deleting { "Deleted" } else { "Replaced" };
    old.retain(|member| {
        let (id, instance) = member;
        let serving = serving(member);
        let goes = match serving {
            Serving::No => true,
            _ if asked > 0 && freeze.frozen() => false,
            Serving::Perhaps => in_all >= asked,
            Serving::Ready => spare > 0 || asked == 0,
        };
        if goes {
            spare -= usize::from(serving == Serving::Ready && spare > 0);
            stopped.insert(id.as_str());
            plan.actions.push(stop(id, instance, reason));
        }
        !goes
    });
    Sized { stopped, old }
}

/// Where the fleet has no room for old and new side by side, one old instance at a time makes way: one whose node can take
/// a new one when the old ones there are gone. Else, under a halt and in the grace period, in which nodes that were lost with
/// the store may come back and give room, the old ones go on serving.
fn make_way(
    input: &Input<'_>,
    name: &str,
    deployment: &Stored<record::Deployment>,
    old: &[Member<'_>],
    replacing: &Replacing<'_>,
    rooms: &Rooms<'_>,
    plan: &Plan,
) -> Option<Action> {
    let snapshot = input.snapshot;
    let waits = plan.unplaced.last().is_some_and(|u| u.deployment == name && !u.owned);
    if !waits || snapshot.halted() || !input.settled() || replacing.freeze.frozen() {
        return None;
    }
    let spec = spec_of(snapshot, name, deployment.value.revision)?;
    let claims = || old.iter().filter_map(|member| Some((member, &snapshot.claims.get(member.0)?.value)));
    let makes_room = |node: &str| {
        let theirs = claims().filter(|(_, claim)| claim.node == node).map(|(_, claim)| claim.memory_bytes);
        place::fits_when_freed(input, spec, node, theirs.fold(0, i64::saturating_add), rooms)
    };
    let ((id, instance), _) = claims().find(|(_, claim)| makes_room(&claim.node))?;
    Some(stop(id, instance, "MakesRoom"))
}

/// Offers what nobody owns, collects what nobody wants.
fn tend<'a>(
    input: &Input<'a>,
    id: &str,
    instance: &'a Stored<record::Instance>,
    replacing: &Replacing<'_>,
    rooms: &mut Rooms<'a>,
    plan: &mut Plan,
) {
    let snapshot = input.snapshot;
    if let Some(claim) = snapshot.claims.get(id) {
        return look_after(input, id, instance, claim, replacing, rooms, plan);
    }
    if !instance.value.wanted {
        plan.actions.push(Action::Collect { id: id.to_owned(), expect: instance.mod_revision });
        return;
    }
    let was_owned = snapshot.taken.contains_key(id);
    let wait = replacing.holders.wait_ms(input, id, instance);
    let frozen = was_owned && replacing.freeze.frozen() && input.offer_left_ms(&instance.value) == 0;
    if wait > 0 && !frozen {
        return plan.wake_in(wait);
    }
    if frozen {
        let why = format!("nothing is replaced while {}: `drover freeze` shows the way out", replacing.freeze);
        return unplaced(plan, &instance.value.deployment, why);
    }
    if was_owned && plan.replacements >= input.replacements.now {
        return plan.wake_in(input.replacements.next_in_ms);
    }
    let deployment = &instance.value.deployment;
    let Some(spec) = spec_of(snapshot, deployment, instance.value.revision) else { return };
    match offer_unless_halted(input, deployment, spec, id, Some(instance), None, rooms) {
        Ok(offer) => {
            plan.replacements += usize::from(was_owned);
            plan.actions.push(Action::Offer { id: id.to_owned(), expect: instance.mod_revision, offer });
        }
        Err(why) => {
            unplaced(plan, deployment, why);
            if let Some(ms) = place::avoided_for_ms(input, &instance.value) {
                plan.wake_in(ms);
            }
        }
    }
}

/// What has an owner is left to it, as long as it gets somewhere.
fn look_after<'a>(
    input: &Input<'a>,
    id: &str,
    instance: &'a Stored<record::Instance>,
    claim: &Stored<record::Claim>,
    replacing: &Replacing<'_>,
    rooms: &mut Rooms<'a>,
    plan: &mut Plan,
) {
    let node = claim.value.node.as_str();
    let why = match progress::judge(input, id, &instance.value, claim) {
        Verdict::Stands => return,
        Verdict::In(ms) => return plan.wake_in(ms),
        Verdict::Forgive => {
            let (id, node) = (id.to_owned(), node.to_owned());
            return plan.actions.push(Action::Forgive { id, expect: instance.mod_revision, node });
        }
        Verdict::GiveUp(why) => why,
    };
    // As everything that moves work: not by a fresh leader, not under a freeze or a halt, and not all at once.
    if !input.settled() {
        return plan.wake_in(input.settings.grace_ms.saturating_sub(input.settled_for_ms));
    }
    if !instance.value.wanted {
        return plan.actions.push(give_up(input, id, instance, claim, &why, None));
    }
    if replacing.freeze.frozen() || input.snapshot.halted() {
        return;
    }
    if plan.replacements >= input.replacements.now {
        return plan.wake_in(input.replacements.next_in_ms);
    }
    let deployment = &instance.value.deployment;
    let Some(spec) = spec_of(input.snapshot, deployment, instance.value.revision) else { return };
    match offer_unless_halted(input, deployment, spec, id, Some(instance), Some(node), rooms) {
        Ok(offer) => {
            plan.replacements += 1;
            plan.actions.push(give_up(input, id, instance, claim, &why, Some(offer)));
        }
        Err(lacks) => {
            if plan.unplaced.last().is_none_or(|u| u.deployment != *deployment) {
                let why = format!("{id} stays with {node}: {}; no other node can take it: {lacks}", why.lasting());
                plan.unplaced.push(Unplaced { deployment: deployment.clone(), why, owned: true });
            }
            if let Some(ms) = place::avoided_for_ms(input, &instance.value) {
                plan.wake_in(ms);
            }
        }
    }
}

fn give_up(
    input: &Input<'_>,
    id: &str,
    instance: &Stored<record::Instance>,
    claim: &Stored<record::Claim>,
    why: &Why,
    offer: Option<super::Offer>,
) -> Action {
    let (node, why) = (claim.value.node.clone(), why.to_string());
    Action::GiveUp {
        id: id.to_owned(),
        expect: instance.mod_revision,
        claim: claim.mod_revision,
        status: input.snapshot.statuses.get(id).map_or(0, |status| status.mod_revision),
        avoid: avoid::with(&instance.value, &node, why.clone(), input.now_ms, input.settings.avoid),
        node,
        why,
        offer,
    }
}

fn offer_unless_halted<'a>(
    input: &Input<'a>,
    deployment: &'a str,
    spec: &DeploymentSpec,
    id: &str,
    instance: Option<&'a Stored<record::Instance>>,
    owner: Option<&str>,
    rooms: &mut Rooms<'a>,
) -> Result<super::Offer, String> {
    if input.snapshot.halted() {
        return Err("claiming is halted".to_owned());
    }
    place::offer(input, deployment, spec, id, instance, owner, rooms)
}

fn unplaced(plan: &mut Plan, deployment: &str, why: String) {
    // Deployments are planned one after the other. What nobody has comes before what somebody has in vain.
    plan.unplaced.pop_if(|u| u.deployment == deployment && u.owned);
    if plan.unplaced.last().is_none_or(|u| u.deployment != deployment) {
        plan.unplaced.push(Unplaced { deployment: deployment.to_owned(), why, owned: false });
    }
}

fn spec_of<'a>(snapshot: &'a Snapshot, deployment: &str, revision: u64) -> Option<&'a DeploymentSpec> {
    snapshot.revisions.get(&format!("{deployment}/{revision:020}"))?.value.spec.as_ref()
}

/// An id that no instance of the snapshot bears.
fn fresh_id(input: &Input<'_>, deployment: &str, n: usize) -> String {
    let mut salt = 0;
    loop {
        let text = format!("{deployment}/{n}/{}/{salt}", input.snapshot.revision);
        let id = ids::instance_id(deployment, place::mix(input.seed, &text));
        if !input.snapshot.instances.contains_key(&id) {
            return id;
        }
        salt += 1;
    }
}

/// Revisions that neither the deployment nor any instance uses, beyond those kept for going back.
fn trim(
    input: &Input<'_>,
    name: &str,
    deployment: &Stored<record::Deployment>,
    members: &[Member<'_>],
    plan: &mut Plan,
) {
    let prefix = format!("{name}/");
    let all: Vec<&String> = input
        .snapshot
        .revisions
        .range(prefix.clone()..)
        .map(|(k, _)| k)
        .take_while(|k| k.starts_with(&prefix))
        .collect();
    let extra = all.len().saturating_sub(input.settings.revisions_kept.max(1));
    let used = |key: &str| {
        let number = key.rsplit('/').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(u64::MAX);
        number == deployment.value.revision || members.iter().any(|(_, i)| i.value.revision == number)
    };
    let keys: Vec<String> = all.into_iter().take(extra).filter(|k| !used(k)).cloned().collect();
    if !keys.is_empty() {
        plan.actions.push(Action::TrimRevisions { name: name.to_owned(), expect: deployment.mod_revision, keys });
    }
}
