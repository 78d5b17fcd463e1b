//! What was asked of a fleet, held against what it has come to.

use crate::world::Sim;
use drover_coordinator::plan::snapshot::Snapshot;
use drover_proto::v1::InstanceState;

/// What is still missing to what was asked for.
pub fn lacks(sim: &Sim) -> Option<String> {
    let state: Snapshot = sim.judge(|checker, _| checker.state().clone());
    let live: Vec<_> = sim
        .hosts
        .iter()
        .flat_map(|host| host.live().into_iter().map(|(id, token, ready)| (host.node.clone(), id, token, ready)))
        .collect();
    if state.leader.is_none() {
        return Some("nobody leads".to_owned());
    }
    for host in &sim.hosts {
        let Some(session) = state.sessions.get(&host.node) else {
            return Some(format!("{} has no session", host.node));
        };
        if session.value.session_id != host.session_id() {
            return Some(format!("{} knows another session than the store", host.node));
        }
    }
    let mut claimed = 0;
    for (name, deployment) in &state.deployments {
        if deployment.value.deleting {
            return Some(format!("{name} is not gone yet"));
        }
        let of = state.instances_of(name).filter(|(_, i)| i.value.wanted).collect::<Vec<_>>();
        let right = of.iter().filter(|(_, i)| i.value.revision == deployment.value.revision).count();
        if i32::try_from(right).ok() != Some(deployment.value.replicas) || of.len() != right {
            return Some(format!(
                "{name}: {right} of {} instances are wanted, {} in all",
                deployment.value.replicas,
                of.len()
            ));
        }
        for (id, _) in of {
            let Some(claim) = state.claims.get(id) else { return Some(format!("{id} is not claimed")) };
            if state.state(id) != InstanceState::Ready {
                return Some(format!("{id} is {}", state.state(id).as_str_name()));
            }
            let token = state.token(id);
            let there: Vec<_> = live.iter().filter(|(_, of, _, _)| of == id).collect();
            let right =
                matches!(there[..], [(node, _, on_disk, true)] if *node == claim.value.node && Some(*on_disk) == token);
            if !right {
                return Some(format!("{id} is claimed by {} under {token:?}; there live {there:?}", claim.value.node));
            }
            claimed += 1;
        }
    }
    if live.len() != claimed {
        return Some(format!("{} servers live, {claimed} are asked for: {live:?}", live.len()));
    }
    // Records of older runs whose end nobody could report are left to the full reconcile.
    let lost =
        state.claims.keys().find(|id| !state.token(id).is_some_and(|t| state.runs.contains_key(&format!("{id}/{t}"))));
    if let Some(id) = lost {
        return Some(format!("the run of {id} has no record"));
    }
    if state.instances.len() != claimed || state.claims.len() != claimed {
        let (instances, claims) = (state.instances.len(), state.claims.len());
        return Some(format!("{claimed} are asked for; there are {instances} instances and {claims} claims"));
    }
    None
}
