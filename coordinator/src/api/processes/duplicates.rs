//! PURE. Instances that several llama-servers of the hosts serve, which to keep, and what becomes of the others.

use crate::plan::snapshot::Snapshot;
use drover_proto::v1::{Duplicate, HostProcess, ProcessOwner, Token};
use std::{cmp::Reverse, collections::BTreeMap};

/// The instances among these processes that more than one of them serves, by id.
pub(super) fn duplicates(processes: impl IntoIterator<Item = HostProcess>, snapshot: &Snapshot) -> Vec<Duplicate> {
    let mut by_instance: BTreeMap<String, Vec<HostProcess>> = BTreeMap::new();
    for process in processes {
        // What another agent of the same host keeps is listed by that agent.
        let ours = matches!(process.owner(), ProcessOwner::Owned | ProcessOwner::Stale | ProcessOwner::Unknown);
        if ours && !process.instance.is_empty() {
            by_instance.entry(process.instance.clone()).or_default().push(process);
        }
    }
    let several = by_instance.into_iter().filter(|(_, servers)| servers.len() > 1);
    several.map(|(instance, servers)| duplicate(instance, servers, snapshot)).collect()
}

fn duplicate(instance: String, mut others: Vec<HostProcess>, snapshot: &Snapshot) -> Duplicate {
    others.sort_by_key(|process| Reverse(process.token.unwrap_or_default()));
    let claim = snapshot.token(&instance);
    let claim_node = snapshot.claims.get(&instance).map(|claim| claim.value.node.clone()).unwrap_or_default();
    let tie = others[0].token == others[1].token;
    let keep = (!tie).then(|| others.remove(0));
    // An agent that lists a process keeps it, and ends it when the claim that replaced it is ready; one that is stale anyway.
    let replaced = keep.as_ref().is_some_and(|keep| claim.is_some() && keep.token == claim);
    let ends_by_itself = replaced && others.iter().all(|process| process.owner() != ProcessOwner::Unknown);
    let message = match (&keep, claim) {
        (None, _) => format!(
            "two processes under one token ({}): two agents use one identity (a copied state folder?): stop one of these \
             agents, and then its server",
            shown(others[0].token)
        ),
        (Some(_), Some(claim)) if ends_by_itself => {
            format!("its claim is {claim} of {claim_node}: the others end by themselves once that one is ready")
        }
        (Some(_), Some(claim)) if replaced => format!(
            "its claim is {claim} of {claim_node}: of the others it can't be told whether they are its servers; end them by \
             hand on their host"
        ),
        (Some(keep), Some(claim)) => format!(
            "its claim is {claim} of {claim_node}, which has no process here; the highest token that has one is {}",
            shown(keep.token)
        ),
        (Some(_), None) => {
            "nobody owns it now: the node of the highest token claims it again, or a new claim replaces all \
                            of them; if this lasts, look at the nodes' events"
                .to_owned()
        }
    };
    Duplicate { instance, keep, others, claim, claim_node, ends_by_itself, message }
}

fn shown(token: Option<Token>) -> String {
    token.map_or_else(|| "none".to_owned(), |token| token.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::snapshot::Stored;
    use drover_proto::store::v1 as record;
    use std::sync::Arc;

    fn token(revision: i64) -> Token {
        Token { generation: 1, revision }
    }

    fn process(node: &str, pid: i64, revision: i64, owner: ProcessOwner) -> HostProcess {
        HostProcess {
            node: node.to_owned(),
            pid,
            instance: "m-222222".to_owned(),
            token: (revision > 0).then(|| token(revision)),
            owner: owner.into(),
            ..HostProcess::default()
        }
    }

    /// A store in which b owns the instance under token 9.
    fn owned() -> Snapshot {
        let mut snapshot = Snapshot::default();
        let schema = record::Schema { generation: 1, ..record::Schema::default() };
        snapshot.schema = Some(Arc::new(Stored { value: schema, create_revision: 1, mod_revision: 1 }));
        let claim = record::Claim { node: "b".to_owned(), ..record::Claim::default() };
        let claim = Stored { value: claim, create_revision: 9, mod_revision: 9 };
        snapshot.claims.insert("m-222222".to_owned(), Arc::new(claim));
        snapshot
    }

    fn one(processes: &[HostProcess], snapshot: &Snapshot) -> Duplicate {
        let mut found = duplicates(processes.to_vec(), snapshot);
        assert_eq!(found.len(), 1, "{found:#?}");
        found.remove(0)
    }

    #[test]
    fn the_highest_token_is_kept_and_what_agents_know_of_ends_by_itself() {
        use ProcessOwner::{Owned, Stale, Unknown};
        let (old, new) = (process("a", 1, 5, Owned), process("b", 2, 9, Owned));
        let found = one(&[old.clone(), new.clone()], &owned());
        assert_eq!((found.keep, found.others), (Some(new.clone()), vec![old]));
        assert!(found.ends_by_itself && found.claim == Some(token(9)) && found.claim_node == "b");
        let stale = one(&[process("a", 1, 0, Stale), new.clone()], &owned());
        assert!(stale.ends_by_itself && stale.keep == Some(new.clone()), "one without a record has the lowest token");
        let unknown = one(&[process("a", 1, 5, Unknown), new], &owned());
        assert!(!unknown.ends_by_itself && unknown.message.contains("by hand"), "{}", unknown.message);
    }

    #[test]
    fn two_under_one_token_are_two_agents_of_one_identity_and_none_is_named() {
        let found = one(&[process("a", 1, 9, ProcessOwner::Owned), process("b", 2, 9, ProcessOwner::Owned)], &owned());
        assert!(found.keep.is_none() && found.others.len() == 2 && !found.ends_by_itself);
        assert!(found.message.contains("1.9") && found.message.contains("one identity"), "{}", found.message);
    }

    #[test]
    fn a_claim_without_a_process_and_no_claim_are_said() {
        let (low, high) = (process("a", 1, 5, ProcessOwner::Owned), process("c", 2, 7, ProcessOwner::Owned));
        let found = one(&[low.clone(), high.clone()], &owned());
        assert!(found.message.contains("which has no process here") && !found.ends_by_itself, "{}", found.message);
        let found = one(&[low, high], &Snapshot::default());
        assert!(found.claim.is_none() && found.message.contains("nobody owns it"), "{}", found.message);
    }

    #[test]
    fn one_server_is_none_and_what_others_started_or_keep_is_not_looked_at() {
        let owned_one = process("a", 1, 9, ProcessOwner::Owned);
        let elsewhere = process("b", 1, 9, ProcessOwner::OtherAgent);
        let mut foreign = process("a", 3, 0, ProcessOwner::Foreign);
        foreign.instance.clear();
        assert!(duplicates([owned_one, elsewhere, foreign.clone(), foreign], &owned()).is_empty());
    }
}
