//! Messages as TOML and JSON, with the names of the fields as in the `.proto` files: what the CLI reads and prints.

use crate::DESCRIPTORS;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};
use std::sync::LazyLock;

/// Every message of the contract.
static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    // The bytes are made by our own build script in the same build.
    #[allow(clippy::expect_used)]
    DescriptorPool::decode(DESCRIPTORS).expect("the embedded descriptors are those that the build wrote")
});

/// Why a text could not be read as a message.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The contract has no message of that name.
    #[error("the contract has no message {0}")]
    UnknownMessage(String),
    /// The text does not fit the message; says where and which field.
    #[error("{0}")]
    Malformed(String),
}

fn descriptor(name: &str) -> Result<MessageDescriptor, Error> {
    POOL.get_message_by_name(name).ok_or_else(|| Error::UnknownMessage(name.to_owned()))
}

fn options() -> SerializeOptions {
    SerializeOptions::new().use_proto_field_name(true).stringify_64_bit_integers(false).skip_default_fields(false)
}

/// A message as a JSON value; `name` is its full name ("drover.v1.Deployment"). Fields without a value are shown with
/// their default, so that a program that reads it finds every field.
pub fn to_json(name: &str, message: &impl Message) -> Result<serde_json::Value, Error> {
    let mut dynamic = DynamicMessage::new(descriptor(name)?);
    dynamic.transcode_from(message).map_err(|e| Error::Malformed(e.to_string()))?;
    dynamic
        .serialize_with_options(serde_json::value::Serializer, &options())
        .map_err(|e| Error::Malformed(e.to_string()))
}

/// Reads a message from TOML. Unknown fields are refused; the error names line, column and field.
pub fn from_toml<M: Message + Default>(name: &str, text: &str) -> Result<M, Error> {
    let descriptor = descriptor(name)?;
    let deserializer = toml::Deserializer::parse(text).map_err(|e| Error::Malformed(e.to_string()))?;
    let fields = descriptor.fields().map(|f| f.name().to_owned()).collect::<Vec<_>>();
    let dynamic = DynamicMessage::deserialize(descriptor, deserializer)
        .map_err(|e| Error::Malformed(with_line(text, &fields, &e.to_string())))?;
    dynamic.transcode_to().map_err(|e| Error::Malformed(e.to_string()))
}

/// The deserializer places an unknown field at the beginning of its table; this finds its line, and says what is allowed.
fn with_line(text: &str, fields: &[String], error: &str) -> String {
    let named = error.split_once("unrecognized field name '").and_then(|(_, rest)| rest.split_once('\''));
    let Some((key, _)) = named else { return error.trim_end().to_owned() };
    let is_key = |line: &str| {
        let line = line.trim_start_matches(['[', ' ', '\t', '"']);
        line.strip_prefix(key).is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
    };
    let line = text.lines().position(is_key).map_or_else(String::new, |n| format!("line {}: ", n + 1));
    format!("{line}unknown field \"{key}\"; the fields are {}", fields.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::DeploymentSpec;

    #[test]
    fn a_deployment_is_read_from_toml_and_shown_as_json() {
        let spec: DeploymentSpec = from_toml(
            "drover.v1.DeploymentSpec",
            "name = 'tiny'\nmodel_path = 'tiny.gguf'\nreplicas = 2\nmemory_bytes = 1000000\n[node_labels]\nzone = 'a'\n",
        )
        .unwrap();
        assert_eq!((spec.name.as_str(), spec.replicas, spec.memory_bytes), ("tiny", Some(2), Some(1_000_000)));
        let json = to_json("drover.v1.DeploymentSpec", &spec).unwrap();
        assert_eq!(json["memory_bytes"], 1_000_000);
        assert_eq!(json["node_labels"]["zone"], "a");
    }

    #[test]
    fn an_unknown_field_is_refused_by_name_and_line() {
        let error =
            from_toml::<DeploymentSpec>("drover.v1.DeploymentSpec", "name = 'tiny'\nreplcas = 2\n").unwrap_err();
        let text = error.to_string();
        assert!(text.contains("replcas"), "{text}");
        assert!(text.contains("line 2"), "{text}");
    }
}
