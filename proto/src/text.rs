//! Messages as TOML and JSON, with the names of the fields as in the `.proto` files: what the CLI reads and prints.

use crate::DESCRIPTORS;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, EnumDescriptor, Kind, MessageDescriptor, SerializeOptions};
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

/// Reads a message from TOML. Unknown fields are refused; the error names line, column and field. Values of an enum are
/// written without its prefix, in small letters: `on_lease_lost = "stop"`.
pub fn from_toml<M: Message + Default>(name: &str, text: &str) -> Result<M, Error> {
    let descriptor = descriptor(name)?;
    let text = &with_enum_names(&descriptor, text)?;
    let deserializer = toml::Deserializer::parse(text).map_err(|e| Error::Malformed(e.to_string()))?;
    let fields = descriptor.fields().map(|f| f.name().to_owned()).collect::<Vec<_>>();
    let dynamic = DynamicMessage::deserialize(descriptor, deserializer)
        .map_err(|e| Error::Malformed(with_line(text, &fields, &e.to_string())))?;
    dynamic.transcode_to().map_err(|e| Error::Malformed(e.to_string()))
}

/// The text with the values of enums as the contract has them, each on its line. Only fields of the message itself.
fn with_enum_names(descriptor: &MessageDescriptor, text: &str) -> Result<String, Error> {
    let table = toml::de::DeTable::parse(text).map_err(|e| Error::Malformed(e.to_string()))?;
    let mut replaced = text.to_owned();
    let mut values = Vec::new();
    for (key, value) in table.get_ref() {
        let Some(Kind::Enum(of)) = descriptor.get_field_by_name(key.get_ref()).map(|field| field.kind()) else {
            continue;
        };
        let toml::de::DeValue::String(word) = value.get_ref() else { continue };
        let short = Short::of(&of);
        let Some(name) = short.name_of(word) else {
            let line = text[..value.span().start].lines().count().max(1);
            let (key, word, words) = (key.get_ref(), word.escape_debug(), short.words().join(", "));
            return Err(Error::Malformed(format!("line {line}: {key} = \"{word}\" is not known: use one of {words}")));
        };
        values.push((value.span(), format!("\"{name}\"")));
    }
    // From the back, so that the places of those before stay right.
    values.sort_by_key(|(span, _)| std::cmp::Reverse(span.start));
    values.into_iter().for_each(|(span, name)| replaced.replace_range(span, &name));
    Ok(replaced)
}

/// Names of an enum's values, without the enum's own name in front: the contract demands it there.
struct Short(Vec<(String, String)>);

impl Short {
    fn of(of: &EnumDescriptor) -> Self {
        let names: Vec<String> = of.values().map(|value| value.name().to_owned()).collect();
        let prefix = names.first().and_then(|zero| zero.strip_suffix("UNSPECIFIED")).unwrap_or_default();
        let short = |name: &String| name.strip_prefix(prefix).unwrap_or(name).to_lowercase();
        Self(names.iter().map(|name| (short(name), name.clone())).collect())
    }

    fn name_of(&self, word: &str) -> Option<&str> {
        self.0.iter().find(|(short, name)| short == word || name == word).map(|(_, name)| name.as_str())
    }

    fn words(&self) -> Vec<String> {
        self.0.iter().filter(|(short, _)| short != "unspecified").map(|(short, _)| format!("\"{short}\"")).collect()
    }
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
    use crate::v1::{DeploymentSpec, OnLeaseLost};

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
    fn values_of_an_enum_are_words_and_one_that_is_unknown_is_refused_with_those_that_are() {
        let read = |text: &str| from_toml::<DeploymentSpec>("drover.v1.DeploymentSpec", text);
        for text in
            ["on_lease_lost = 'stop'\nname = 'tiny'\n", "name = 'tiny'\non_lease_lost = \"ON_LEASE_LOST_STOP\"\n"]
        {
            let spec = read(text).unwrap();
            assert_eq!((spec.on_lease_lost(), spec.name.as_str()), (OnLeaseLost::Stop, "tiny"));
        }
        assert_eq!(read("on_lease_lost = 'keep'\n").unwrap().on_lease_lost(), OnLeaseLost::Keep);
        let error = read("name = 'tiny'\n\non_lease_lost = 'stopp'\n").unwrap_err().to_string();
        assert_eq!(error, "line 3: on_lease_lost = \"stopp\" is not known: use one of \"keep\", \"stop\"");
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
