//! PURE. Placement: which nodes may claim an instance, best first.

use super::{Input, Offer, snapshot::Snapshot};
use drover_proto::{limits, store::v1 as record, v1::DeploymentSpec};
use std::collections::BTreeMap;

/// What this plan itself has promised so far, so that one plan does not offer the same room many times.
#[derive(Debug, Default)]
pub(super) struct Promised {
    bytes: BTreeMap<String, i64>,
    instances: BTreeMap<String, usize>,
}

/// Size of a model file on a node; `None` when it is not there, `Some(0)` when that is not known.
fn model_size(node: &record::Node, path: &str) -> Option<i64> {
    let models = node.models.as_ref()?;
    let found = models.files.iter().find(|f| names_file(path, &f.path, &models.roots));
    found.map(|f| f.size_bytes).or(models.truncated.then_some(0))
}

/// Whether a deployment's model_path means this file of a node with these roots.
pub(crate) fn names_file(path: &str, file: &str, roots: &[String]) -> bool {
    if path.starts_with('/') {
        return path == file;
    }
    roots.iter().any(|root| {
        file.strip_prefix(root.trim_end_matches('/')).is_some_and(|rest| rest.strip_prefix('/') == Some(path))
    })
}

/// Memory that an instance needs on a node, in bytes: what the deployment says, else the file and an overhead.
fn need_bytes(spec: &DeploymentSpec, file_bytes: i64) -> i64 {
    spec.memory_bytes.unwrap_or(file_bytes + limits::defaults::MEMORY_OVERHEAD_BYTES)
}

/// A small mixing function (splitmix64's finaliser): the order among equals, from the seed.
pub(super) fn mix(seed: u64, text: &str) -> u64 {
    let mut z =
        text.bytes().fold(seed ^ 0x9e37_79b9_7f4a_7c15, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Instances of a deployment that a node owns or that are promised to it by offers that still stand.
fn replicas_on(snapshot: &Snapshot, deployment: &str, node: &str) -> usize {
    let owned = |id: &str| snapshot.claims.get(id).is_some_and(|c| c.value.node == node);
    snapshot.instances_of(deployment).filter(|(id, i)| i.value.wanted && owned(id)).count()
}

/// The best nodes for an instance, or what each lacks. Filter first, then score; the first candidate's room is promised.
pub(super) fn offer(
    input: &Input<'_>,
    deployment: &str,
    spec: &DeploymentSpec,
    id: &str,
    promised: &mut Promised,
) -> Result<Offer, String> {
    let snapshot = input.snapshot;
    let mut fit = Vec::new();
    let mut lacks = Vec::new();
    for (name, node) in &snapshot.nodes {
        let node = &node.value;
        if !snapshot.sessions.contains_key(name) {
            lacks.push(format!("{name} is not connected"));
            continue;
        }
        if let Some((key, value)) = spec.node_labels.iter().find(|(k, v)| node.labels.get(*k) != Some(v)) {
            lacks.push(format!("{name} does not bear the label {key}={value}"));
            continue;
        }
        let Some(file_bytes) = model_size(node, &spec.model_path) else {
            lacks.push(format!("{name} has no model file {}", spec.model_path));
            continue;
        };
        let need = need_bytes(spec, file_bytes);
        let capacity = node.capacity.as_ref().map_or(0, |c| c.memory_bytes);
        let free = capacity - snapshot.reserved_bytes(name) - promised.bytes.get(name).copied().unwrap_or(0);
        if free < need {
            lacks.push(format!("{name} has {free} bytes of memory left, {need} are needed"));
            continue;
        }
        let replicas = replicas_on(snapshot, deployment, name)
            + promised.instances.get(&format!("{deployment}/{name}")).copied().unwrap_or(0);
        // Spread first, then the share of memory that stays free (in thousandths), then chance.
        let free_share = (free - need).saturating_mul(1000) / capacity.max(1);
        fit.push((replicas, -free_share, mix(input.seed, &format!("{id}/{name}")), name.clone(), need));
    }
    fit.sort();
    let Some((_, _, _, best, need)) = fit.first() else {
        return Err(if lacks.is_empty() { "no node has ever joined".to_owned() } else { lacks.join("; ") });
    };
    *promised.bytes.entry(best.clone()).or_default() += need;
    *promised.instances.entry(format!("{deployment}/{best}")).or_default() += 1;
    Ok(Offer {
        candidates: fit.iter().take(input.settings.candidates.max(1)).map(|(_, _, _, name, _)| name.clone()).collect(),
        deadline_ms: input.now_ms + input.settings.offer_deadline_ms,
        halt_generation: snapshot.halt_generation(),
    })
}
