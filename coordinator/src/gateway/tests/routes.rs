use super::*;
use crate::plan::snapshot::{Map, Stored};
use drover_proto::{store::v1 as record, v1::Token};
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
