use super::*;
use crate::plan::snapshot::{Map, Stored};
use drover_proto::{
    store::v1 as record,
    v1::{OnLeaseLost, Token},
};
use std::sync::Arc;

fn put<T>(map: &mut Map<T>, key: &str, value: T, mod_revision: i64) {
    map.insert(key.to_owned(), Arc::new(Stored { value, create_revision: mod_revision, mod_revision }));
}

fn spec(name: &str, model: &str, slots: Option<i32>) -> DeploymentSpec {
    DeploymentSpec { name: name.to_owned(), model: model.to_owned(), slots, ..DeploymentSpec::default() }
}

fn deployment(snapshot: &mut Snapshot, spec: DeploymentSpec, created_s: i64) {
    let name = spec.name.clone();
    let created_at = Some(prost_types::Timestamp { seconds: created_s, nanos: 0 });
    let key = format!("{name}/{:020}", 1);
    put(&mut snapshot.revisions, &key, record::Revision { spec: Some(spec.clone()), ..Default::default() }, 1);
    let value = record::Deployment { spec: Some(spec), revision: 1, created_at, ..Default::default() };
    put(&mut snapshot.deployments, &name, value, 1);
}

/// An instance claimed at revision 7 by node "a", whose owner reported a state under a token.
fn instance(snapshot: &mut Snapshot, deployment: &str, id: &str, state: InstanceState, token: i64) {
    let value = record::Instance { deployment: deployment.to_owned(), revision: 1, wanted: true, ..Default::default() };
    put(&mut snapshot.instances, id, value, 2);
    put(&mut snapshot.claims, id, record::Claim { node: "a".to_owned(), ..Default::default() }, 7);
    let token = Some(Token { generation: 0, revision: token });
    put(&mut snapshot.statuses, id, record::Status { token, state: state.into(), ..Default::default() }, 8);
}

fn fleet() -> Snapshot {
    let mut snapshot = Snapshot::default();
    let node = record::Node { proxy_address: "127.0.0.1:7410".to_owned(), ..Default::default() };
    put(&mut snapshot.nodes, "a", node, 1);
    snapshot
}

fn ids(routes: &Routes, model: &str) -> Vec<String> {
    routes[model].backends.iter().map(|b| b.instance.clone()).collect()
}

#[test]
fn ready_wanted_instances_are_routed_under_their_models_name() {
    let mut snapshot = fleet();
    deployment(&mut snapshot, spec("one", "", Some(3)), 20);
    deployment(&mut snapshot, spec("two", "shared", None), 20);
    deployment(&mut snapshot, spec("three", "shared", None), 10);
    instance(&mut snapshot, "one", "one-aaaaaa", InstanceState::Ready, 7);
    instance(&mut snapshot, "two", "two-aaaaaa", InstanceState::Ready, 7);
    instance(&mut snapshot, "three", "three-aaaaaa", InstanceState::Ready, 7);
    let routes = routes(&snapshot);
    assert_eq!(routes.keys().collect::<Vec<_>>(), ["one", "shared"]);
    assert_eq!(ids(&routes, "shared"), ["three-aaaaaa", "two-aaaaaa"]);
    assert_eq!(routes["shared"].created_s, 10);
    let expected = Backend {
        instance: "one-aaaaaa".to_owned(),
        node: "a".to_owned(),
        proxy_address: "127.0.0.1:7410".to_owned(),
        slots: 3,
        embeddings: false,
        unowned: false,
    };
    assert_eq!(routes["one"].backends, [expected]);
    assert_eq!(routes["shared"].backends[0].slots, 4);
}

#[test]
fn what_is_not_ready_under_its_standing_claim_is_not_routed_but_its_model_exists() {
    let mut snapshot = fleet();
    deployment(&mut snapshot, spec("one", "", None), 0);
    instance(&mut snapshot, "one", "one-aaaaaa", InstanceState::Loading, 7);
    instance(&mut snapshot, "one", "one-bbbbbb", InstanceState::Ready, 6);
    instance(&mut snapshot, "one", "one-cccccc", InstanceState::Ready, 7);
    instance(&mut snapshot, "one", "one-dddddd", InstanceState::Ready, 7);
    instance(&mut snapshot, "one", "one-ffffff", InstanceState::Draining, 7);
    snapshot.claims.remove("one-cccccc");
    let unwanted = record::Instance { deployment: "one".to_owned(), revision: 1, ..Default::default() };
    put(&mut snapshot.instances, "one-dddddd", unwanted, 9);
    assert_eq!(ids(&routes(&snapshot), "one"), Vec::<String>::new());
    put(&mut snapshot.nodes, "a", record::Node::default(), 9);
    instance(&mut snapshot, "one", "one-gggggg", InstanceState::Ready, 7);
    assert_eq!(ids(&routes(&snapshot), "one"), Vec::<String>::new(), "a node without a proxy can't be reached");
}

/// What the owner under a token reported last, kept with the run.
fn ran(snapshot: &mut Snapshot, id: &str, node: &str, token: i64, ready: bool) {
    let record = record::Node { proxy_address: format!("{node}:7410"), ..Default::default() };
    put(&mut snapshot.nodes, node, record, 1);
    let run = record::Run {
        node: node.to_owned(),
        token: Some(Token { generation: 0, revision: token }),
        ready,
        ..Default::default()
    };
    put(&mut snapshot.runs, &format!("{id}/0.{token}"), run, token);
}

#[test]
fn a_server_whose_claim_has_vanished_is_routed_until_something_better_is_ready() {
    let mut snapshot = fleet();
    deployment(&mut snapshot, spec("one", "", None), 0);
    let routed = |snapshot: &Snapshot| {
        let backend = |b: &Backend| (b.node.clone(), b.unowned);
        routes(snapshot)["one"].backends.iter().map(backend).collect::<Vec<_>>()
    };
    instance(&mut snapshot, "one", "one-aaaaaa", InstanceState::Ready, 7);
    ran(&mut snapshot, "one-aaaaaa", "a", 7, true);
    assert_eq!(routed(&snapshot), [("a".to_owned(), false)]);
    snapshot.claims.clear();
    assert_eq!(routed(&snapshot), [("a".to_owned(), true)], "unowned but answering");
    let mut ends = snapshot.clone();
    let spec = DeploymentSpec { on_lease_lost: OnLeaseLost::Stop.into(), ..spec("one", "", None) };
    for key in snapshot.revisions.keys() {
        Arc::make_mut(&mut ends.revisions[key]).value.spec = Some(spec.clone());
    }
    assert_eq!(routed(&ends), [], "it has ended with its lease");
    // Another node takes it over: its report replaces the status, and says nothing of the server on a.
    let claim = record::Claim { node: "b".to_owned(), ..Default::default() };
    put(&mut snapshot.claims, "one-aaaaaa", claim, 9);
    ran(&mut snapshot, "one-aaaaaa", "b", 9, false);
    let report = |snapshot: &mut Snapshot, state: InstanceState| {
        let token = Some(Token { generation: 0, revision: 9 });
        put(
            &mut snapshot.statuses,
            "one-aaaaaa",
            record::Status { token, state: state.into(), ..Default::default() },
            10,
        );
    };
    report(&mut snapshot, InstanceState::Loading);
    assert_eq!(routed(&snapshot), [("a".to_owned(), true)], "b loads");
    report(&mut snapshot, InstanceState::Ready);
    assert_eq!(routed(&snapshot), [("b".to_owned(), false)]);
    report(&mut snapshot, InstanceState::Backoff);
    assert_eq!(routed(&snapshot), [("a".to_owned(), true)], "b's has ended, a's has not");
    // Its node is back and says what it runs.
    let session = record::Session { session_id: "s".to_owned(), ..Default::default() };
    put(&mut snapshot.sessions, "a", session, 11);
    let told = |inventory_of: &str, instances: &[&str]| record::Node {
        proxy_address: "a:7410".to_owned(),
        inventory_of: inventory_of.to_owned(),
        unclaimed: instances
            .iter()
            .map(|i| record::UnclaimedRun { instance: (*i).to_owned(), memory_bytes: 1 })
            .collect(),
        ..Default::default()
    };
    for (node, answers) in [(told("", &[]), true), (told("s", &["one-aaaaaa"]), true), (told("s", &[]), false)] {
        put(&mut snapshot.nodes, "a", node, 12);
        assert_eq!(!routed(&snapshot).is_empty(), answers, "{:?}", snapshot.nodes["a"]);
    }
}

#[test]
fn a_deployment_that_is_being_deleted_is_no_model_any_more() {
    let mut snapshot = fleet();
    deployment(&mut snapshot, spec("one", "", None), 0);
    instance(&mut snapshot, "one", "one-aaaaaa", InstanceState::Ready, 7);
    let mut deleted = snapshot.deployments["one"].value.clone();
    deleted.deleting = true;
    put(&mut snapshot.deployments, "one", deleted, 9);
    assert!(routes(&snapshot).is_empty());
}

#[test]
fn embeddings_and_generation_go_only_to_those_that_serve_them() {
    let mut snapshot = fleet();
    deployment(&mut snapshot, spec("chat", "both", None), 0);
    deployment(&mut snapshot, DeploymentSpec { embeddings: true, ..spec("embed", "both", None) }, 0);
    instance(&mut snapshot, "chat", "chat-aaaaaa", InstanceState::Ready, 7);
    instance(&mut snapshot, "embed", "embed-aaaaaa", InstanceState::Ready, 7);
    let routes = routes(&snapshot);
    let chosen = |embeddings| routes["both"].backends_for(embeddings)[0].instance.as_str();
    assert_eq!((chosen(true), chosen(false)), ("embed-aaaaaa", "chat-aaaaaa"));
    assert!(routes["both"].serves(true) && routes["both"].serves(false));
    snapshot.deployments.remove("embed");
    snapshot.instances.remove("embed-aaaaaa");
    let only_chat = &super::routes(&snapshot)["both"];
    assert!(only_chat.serves(false) && !only_chat.serves(true) && only_chat.backends_for(true).is_empty());
}
