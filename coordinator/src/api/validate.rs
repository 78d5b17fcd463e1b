//! PURE. What a deployment may say. Every violation names field, value and way out; all are reported at once.

use crate::plan::snapshot::Snapshot;
use drover_proto::{
    arguments, ids, limits,
    v1::{DeploymentSpec, OnLeaseLost},
};
use std::path::{Component, Path};

type Violations = Vec<(String, String)>;

/// Checks a spec by itself and against what the connected nodes have. Empty: it is good.
pub(super) fn spec(spec: &DeploymentSpec, snapshot: &Snapshot) -> Violations {
    let mut bad = Violations::new();
    let mut say = |field: &str, what: String| bad.push((format!("spec.{field}"), what));
    if let Err(e) = ids::check_deployment_name(&spec.name) {
        say("name", e.to_string());
    }
    if spec.model.len() > 200 || spec.model.chars().any(|c| c.is_control() || c.is_whitespace()) {
        say(
            "model",
            format!("\"{}\" is no model name: use up to 200 characters without white space", spec.model.escape_debug()),
        );
    }
    let numbers = [
        (
            "replicas",
            spec.replicas.map(i64::from),
            i64::from(limits::REPLICAS_MAX),
            "; to run none and keep the deployment, scale it to 0",
        ),
        ("context_tokens", spec.context_tokens.map(i64::from), i64::from(limits::CONTEXT_TOKENS_MAX), ""),
        ("slots", spec.slots.map(i64::from), i64::from(limits::SLOTS_MAX), ""),
        ("threads", spec.threads.map(i64::from), i64::from(limits::THREADS_MAX), ""),
        ("memory_bytes", spec.memory_bytes, limits::MEMORY_BYTES_MAX, ""),
        ("drain_timeout_ms", spec.drain_timeout_ms, limits::DURATION_MS_MAX, ""),
        ("stop_grace_ms", spec.stop_grace_ms, limits::DURATION_MS_MAX, ""),
        ("load_timeout_ms", spec.load_timeout_ms, limits::DURATION_MS_MAX, ""),
    ];
    for (field, value, max, hint) in numbers {
        if let Some(value) = value
            && !(1..=max).contains(&value)
        {
            say(field, format!("{value} is not allowed: use 1 to {max}, or leave it out for the default{hint}"));
        }
    }
    if let Some(layers) = spec.gpu_layers
        && !(0..=10_000).contains(&layers)
    {
        say("gpu_layers", format!("{layers} is not allowed: use 0 to 10000, or leave it out for the default"));
    }
    if OnLeaseLost::try_from(spec.on_lease_lost).is_err() {
        let value = spec.on_lease_lost;
        say(
            "on_lease_lost",
            format!(
                "{value} is not known: use ON_LEASE_LOST_KEEP (1) or ON_LEASE_LOST_STOP (2), or leave it out for the default"
            ),
        );
    }
    if spec.arguments.len() > limits::ARGUMENTS_MAX {
        say("arguments", format!("{} words are too many: use at most {}", spec.arguments.len(), limits::ARGUMENTS_MAX));
    } else if let Err(e) = arguments::check(&spec.arguments) {
        say("arguments", e);
    }
    if spec.node_labels.len() > limits::LABELS_MAX {
        say(
            "node_labels",
            format!("{} labels are too many: use at most {}", spec.node_labels.len(), limits::LABELS_MAX),
        );
    }
    let labels = spec.node_labels.iter().map(|(name, value)| name.len() + value.len());
    let bytes = spec.arguments.iter().map(String::len).chain(labels).sum::<usize>();
    if bytes > limits::WORDS_BYTES_MAX {
        let max = limits::WORDS_BYTES_MAX;
        say("arguments", format!("and node_labels have {bytes} bytes together: use at most {max}"));
    }
    if let Err(what) = model_path(&spec.model_path, snapshot) {
        say("model_path", what);
    }
    bad
}

/// The path by itself, and whether any connected node could serve it. Without connected nodes, only by itself.
fn model_path(path: &str, snapshot: &Snapshot) -> Result<(), String> {
    if path.is_empty() {
        return Err("is empty: name a GGUF file, absolute or relative to a node's model root".to_owned());
    }
    if path.len() > 4096 || path.contains('\0') {
        return Err("is no path: use at most 4096 bytes without NUL".to_owned());
    }
    if Path::new(path).components().any(|c| matches!(c, Component::ParentDir)) {
        return Err(format!("\"{path}\" contains \"..\": name the file directly, below a model root"));
    }
    let connected: Vec<_> = snapshot
        .nodes
        .iter()
        .filter(|(name, _)| snapshot.sessions.contains_key(*name))
        .filter_map(|(name, node)| Some((name, node.value.models.as_ref()?)))
        .collect();
    if connected.is_empty() {
        return Ok(());
    }
    let below = |root: &String| Path::new(path).starts_with(root);
    if path.starts_with('/') && !connected.iter().any(|(_, models)| models.roots.iter().any(below)) {
        let roots: Vec<String> =
            connected.iter().take(5).map(|(name, models)| format!("{name}: {}", models.roots.join(", "))).collect();
        return Err(format!(
            "\"{path}\" lies outside the model roots of every node ({}): move the file below one, or add a root to the nodes' configuration",
            roots.join("; ")
        ));
    }
    let has = |models: &drover_proto::v1::ModelInventory| {
        models.truncated || models.files.iter().any(|f| crate::plan::names_file(path, &f.path, &models.roots))
    };
    if !connected.iter().any(|(_, models)| has(models)) {
        return Err(format!(
            "no connected node has \"{path}\" below its model roots: put the file there (nodes look every few seconds), or correct the path"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::snapshot::Stored;
    use drover_proto::{
        store::v1 as record,
        v1::{ModelFile, ModelInventory},
    };
    use std::sync::Arc;

    fn good() -> DeploymentSpec {
        DeploymentSpec { name: "tiny".to_owned(), model_path: "tiny.gguf".to_owned(), ..DeploymentSpec::default() }
    }

    fn stored<T>(value: T) -> Arc<Stored<T>> {
        Arc::new(Stored { value, create_revision: 1, mod_revision: 1 })
    }

    fn one_node() -> Snapshot {
        let mut snapshot = Snapshot::default();
        let models = ModelInventory {
            roots: vec!["/models".to_owned()],
            files: vec![ModelFile { path: "/models/tiny.gguf".to_owned(), size_bytes: 5 }],
            truncated: false,
        };
        let node = record::Node { models: Some(models), ..record::Node::default() };
        snapshot.nodes.insert("a".to_owned(), stored(node));
        snapshot.sessions.insert("a".to_owned(), stored(record::Session::default()));
        snapshot
    }

    #[test]
    fn every_bad_field_is_named_with_its_value_and_the_way_out() {
        let cases: Vec<(&str, &str, DeploymentSpec)> = vec![
            ("spec.name", "Bad_Name", DeploymentSpec { name: "Bad_Name".to_owned(), ..good() }),
            ("spec.replicas", "-1", DeploymentSpec { replicas: Some(-1), ..good() }),
            ("spec.replicas", "scale it to 0", DeploymentSpec { replicas: Some(0), ..good() }),
            ("spec.on_lease_lost", "7 is not known", DeploymentSpec { on_lease_lost: 7, ..good() }),
            ("spec.context_tokens", "0", DeploymentSpec { context_tokens: Some(0), ..good() }),
            ("spec.slots", "-4", DeploymentSpec { slots: Some(-4), ..good() }),
            ("spec.memory_bytes", "-5", DeploymentSpec { memory_bytes: Some(-5), ..good() }),
            ("spec.gpu_layers", "-1", DeploymentSpec { gpu_layers: Some(-1), ..good() }),
            (
                "spec.arguments",
                "--rpc",
                DeploymentSpec { arguments: vec!["--rpc".to_owned(), "x:1".to_owned()], ..good() },
            ),
            (
                "spec.arguments",
                "have 65537 bytes together",
                DeploymentSpec { node_labels: [("x".to_owned(), "y".repeat(65_536))].into(), ..good() },
            ),
            ("spec.model_path", "is empty", DeploymentSpec { model_path: String::new(), ..good() }),
            ("spec.model_path", "/etc/passwd", DeploymentSpec { model_path: "/etc/passwd".to_owned(), ..good() }),
            ("spec.model_path", "..", DeploymentSpec { model_path: "/models/../etc/x".to_owned(), ..good() }),
            (
                "spec.model_path",
                "absent.gguf",
                DeploymentSpec { model_path: "/models/absent.gguf".to_owned(), ..good() },
            ),
        ];
        for (field, text, case) in cases {
            let bad = spec(&case, &one_node());
            assert_eq!(bad.len(), 1, "{field}: {bad:?}");
            assert_eq!(bad[0].0, field);
            assert!(bad[0].1.contains(text), "{field}: {}", bad[0].1);
        }
        assert_eq!(spec(&good(), &one_node()), vec![]);
        assert_eq!(spec(&DeploymentSpec { model_path: "/models/tiny.gguf".to_owned(), ..good() }, &one_node()), vec![]);
    }

    #[test]
    fn without_connected_nodes_a_path_is_taken_on_trust() {
        let path = DeploymentSpec { model_path: "/anywhere/x.gguf".to_owned(), ..good() };
        assert_eq!(spec(&path, &Snapshot::default()), vec![]);
    }
}
