//! PURE. The rules: what must exist, what must stop, what is to be collected.

use super::{
    Action, Input, Plan, Unplaced,
    place::{self, Rooms},
    snapshot::{Snapshot, Stored, millis},
};
use drover_proto::{
    ids,
    store::v1 as record,
    v1::{DeploymentSpec, InstanceState},
};
use std::{collections::BTreeSet, sync::Arc};

type Member<'a> = (&'a String, &'a Arc<Stored<record::Instance>>);

/// Makes a plan. The same input gives the same plan.
#[must_use]
pub fn plan(input: &Input<'_>) -> Plan {
    let mut plan = Plan::default();
    let mut rooms = Rooms::of(input);
    for (name, deployment) in &input.snapshot.deployments {
        let members: Vec<Member<'_>> = input.snapshot.instances_of(name).collect();
        let sized = size(input, name, deployment, &members, &mut rooms, &mut plan);
        for (id, instance) in members.iter().filter(|(id, _)| !sized.stopped.contains(id.as_str())) {
            tend(input, id, instance, &mut rooms, &mut plan);
        }
        let stopping = !sized.stopped.is_empty() || members.iter().any(|(_, i)| !i.value.wanted);
        if !stopping && let Some(action) = make_way(input, name, deployment, &sized.old, &rooms, &plan) {
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
        if !input.snapshot.deployments.contains_key(&instance.value.deployment) {
            if instance.value.wanted {
                plan.actions.push(stop(id, instance, "DeploymentGone"));
            } else {
                tend(input, id, instance, &mut rooms, &mut plan);
            }
        }
    }
    plan
}

fn stop(id: &str, instance: &Stored<record::Instance>, reason: &'static str) -> Action {
    Action::Stop { id: id.to_owned(), expect: instance.mod_revision, reason }
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
    rooms: &mut Rooms<'a>,
    plan: &mut Plan,
) -> Sized<'a> {
    let snapshot = input.snapshot;
    let asked = if deployment.value.deleting { 0 } else { usize::try_from(deployment.value.replicas).unwrap_or(0) };
    let wanted = members.iter().filter(|(_, i)| i.value.wanted);
    let (mut current, mut old): (Vec<Member<'a>>, Vec<Member<'a>>) =
        wanted.copied().partition(|(_, i)| i.value.revision == deployment.value.revision);
    let mut stopped = BTreeSet::new();

    // Those that serve least go first: not ready before ready, then by id.
    let serves = |(id, _): &Member<'_>| snapshot.state(id) == InstanceState::Ready;
    current.sort_by_cached_key(|member| (serves(member), member.0));
    old.sort_by_cached_key(|member| (serves(member), member.0));

    let surplus = current.len().saturating_sub(asked);
    let reason = if deployment.value.deleting { "Deleted" } else { "ScaledDown" };
    for (id, instance) in current.drain(..surplus) {
        stopped.insert(id.as_str());
        plan.actions.push(stop(id, instance, reason));
    }

    if let Some(spec) = spec_of(snapshot, name, deployment.value.revision) {
        for n in current.len()..asked {
            let id = fresh_id(input, name, n);
            let offer = offer_unless_halted(input, name, spec, &id, None, rooms);
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

    // Old ones go as new ones become ready, so that as many serve as were asked for; what does not serve goes at once.
    let ready = |members: &[Member<'_>]| members.iter().filter(|member| serves(member)).count();
    let mut spare = (ready(&current) + ready(&old)).saturating_sub(asked);
    let reason = if deployment.value.deleting { "Deleted" } else { "Replaced" };
    old.retain(|member| {
        let (id, instance) = member;
        let serves = serves(member);
        let goes = !serves || spare > 0 || asked == 0;
        if goes {
            spare -= usize::from(serves && spare > 0);
            stopped.insert(id.as_str());
            plan.actions.push(stop(id, instance, reason));
        }
        !goes
    });
    Sized { stopped, old }
}

/// Where the fleet has no room for old and new side by side, one old instance at a time makes way: one whose node can take
/// a new one when the old ones there are gone. Else, and under a halt, the old ones go on serving.
fn make_way(
    input: &Input<'_>,
    name: &str,
    deployment: &Stored<record::Deployment>,
    old: &[Member<'_>],
    rooms: &Rooms<'_>,
    plan: &Plan,
) -> Option<Action> {
    let snapshot = input.snapshot;
    let waits = plan.unplaced.last().is_some_and(|u| u.deployment == name);
    if !waits || snapshot.halted() {
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
    rooms: &mut Rooms<'a>,
    plan: &mut Plan,
) {
    let snapshot = input.snapshot;
    if snapshot.claims.contains_key(id) {
        return;
    }
    if !instance.value.wanted {
        plan.actions.push(Action::Collect { id: id.to_owned(), expect: instance.mod_revision });
        return;
    }
    if let Some(until) = not_before(input, id, instance)
        && until > input.now_ms
    {
        plan.wake_at_ms = Some(plan.wake_at_ms.map_or(until, |at| at.min(until)));
        return;
    }
    let deployment = &instance.value.deployment;
    let Some(spec) = spec_of(snapshot, deployment, instance.value.revision) else { return };
    match offer_unless_halted(input, deployment, spec, id, Some(instance), rooms) {
        Ok(offer) => plan.actions.push(Action::Offer { id: id.to_owned(), expect: instance.mod_revision, offer }),
        Err(why) => unplaced(plan, deployment, why),
    }
}

/// The earliest time at which an unclaimed instance may be offered (again).
fn not_before(input: &Input<'_>, id: &str, instance: &Stored<record::Instance>) -> Option<i64> {
    let standing = instance.value.offer.as_ref().and_then(|o| o.deadline.as_ref()).map(millis);
    let Some(taken) = input.snapshot.taken.get(id) else { return standing };
    // It was owned: its server may still run. Its node gets time to come back before anything is replaced: one time to
    // live after a change of leader, and one when it has a session again but has not re-claimed yet.
    let mut until = standing.unwrap_or(0).max(input.leading_since_ms + input.settings.grace_ms);
    if input.snapshot.sessions.contains_key(&taken.value.node) {
        let since = input.unclaimed_since_ms.get(id).copied().unwrap_or(input.now_ms);
        until = until.max(since + input.settings.grace_ms);
    }
    Some(until)
}

fn offer_unless_halted<'a>(
    input: &Input<'a>,
    deployment: &'a str,
    spec: &DeploymentSpec,
    id: &str,
    instance: Option<&'a Stored<record::Instance>>,
    rooms: &mut Rooms<'a>,
) -> Result<super::Offer, String> {
    if input.snapshot.halted() {
        return Err("claiming is halted".to_owned());
    }
    place::offer(input, deployment, spec, id, instance, rooms)
}

fn unplaced(plan: &mut Plan, deployment: &str, why: String) {
    // Deployments are planned one after the other.
    if plan.unplaced.last().is_none_or(|u| u.deployment != deployment) {
        plan.unplaced.push(Unplaced { deployment: deployment.to_owned(), why });
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
