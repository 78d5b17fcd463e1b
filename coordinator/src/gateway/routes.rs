//! PURE. From a snapshot to who serves which model.

use crate::{control::mutant, plan::snapshot::Snapshot};
use drover_proto::{
    limits::defaults,
    v1::{DeploymentSpec, InstanceState},
};
use std::collections::BTreeMap;

/// The models that exist, by the name that clients use.
pub type Routes = BTreeMap<String, Model>;

/// A model with at least one deployment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Model {
    /// When its oldest deployment was made, in seconds since 1970.
    pub created_s: i64,
    /// Some deployment of it generates text.
    pub generates: bool,
    /// Some deployment of it serves embeddings.
    pub embeds: bool,
    /// Instances that may be sent requests, by id.
    pub backends: Vec<Backend>,
}

/// An instance that may be sent requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// Its id.
    pub instance: String,
    /// Node that it runs on.
    pub node: String,
    /// Proxy of that node, "host:port".
    pub proxy_address: String,
    /// Requests that it works on at the same time; at least 1.
    pub slots: u32,
    /// It serves embeddings and nothing that generates.
    pub embeddings: bool,
    /// No claim covers its server: nobody vouches for it, and it answered when it was last heard of.
    pub unowned: bool,
}

impl Model {
    /// Those for embeddings, or those for generating. Never the other kind: a llama-server started for embeddings may end
    /// when it is asked to generate.
    #[must_use]
    pub fn backends_for(&self, embeddings: bool) -> Vec<&Backend> {
        self.backends.iter().filter(|backend| backend.embeddings == embeddings).collect()
    }

    /// Whether some deployment does what is asked for, ready or not.
    #[must_use]
    pub fn serves(&self, embeddings: bool) -> bool {
        if embeddings { self.embeds } else { self.generates }
    }
}

/// The name that clients use for what a spec describes.
fn model_of(spec: &DeploymentSpec) -> &str {
    if spec.model.is_empty() { &spec.name } else { &spec.model }
}

/// The routes of a snapshot.
#[must_use]
pub fn routes(snapshot: &Snapshot) -> Routes {
    let mut routes = Routes::new();
    for stored in snapshot.deployments.values().filter(|d| !d.value.deleting) {
        let Some(spec) = &stored.value.spec else { continue };
        let created_s = stored.value.created_at.as_ref().map_or(0, |time| time.seconds);
        let model = routes.entry(model_of(spec).to_owned()).or_insert(Model { created_s, ..Model::default() });
        model.created_s = model.created_s.min(created_s);
        model.embeds |= spec.embeddings;
        model.generates |= !spec.embeddings;
    }
    for (id, stored) in snapshot.instances.iter().filter(|(_, i)| i.value.wanted) {
        let Some((name, unowned)) = server_of(snapshot, id) else { continue };
        let (Some(node), Some(spec)) = (snapshot.nodes.get(name), snapshot.spec_of(&stored.value)) else { continue };
        let Some(model) = routes.get_mut(model_of(spec)) else { continue };
        if node.value.proxy_address.is_empty() {
            continue;
        }
        model.backends.push(Backend {
            instance: id.clone(),
            node: name.to_owned(),
            proxy_address: node.value.proxy_address.clone(),
            slots: spec.slots.and_then(|n| u32::try_from(n).ok()).unwrap_or(defaults::SLOTS.unsigned_abs()).max(1),
            embeddings: spec.embeddings,
            unowned,
        });
    }
    routes
}

/// The node whose server answers for an instance, and whether it does so without being its owner: losing a session is not losing
/// the process, so one that was ready goes on until its owner, whoever that becomes, has a better one.
fn server_of<'a>(snapshot: &'a Snapshot, id: &str) -> Option<(&'a str, bool)> {
    if snapshot.state(id) == InstanceState::Ready {
        return Some((&snapshot.claims.get(id)?.value.node, false));
    }
    if mutant::on(mutant::name::ROUTES_BY_CLAIM_ONLY) {
        return None;
    }
    snapshot.answering(id).map(|run| (run.node.as_str(), true))
}

#[cfg(test)]
#[path = "tests/routes.rs"]
mod tests;
