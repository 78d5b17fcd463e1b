//! Who made the spans: the OTLP resource of a life.

use crate::EPOCH_ATTRIBUTE;
use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, KeyValue, any_value::Value},
    resource::v1::Resource,
};
use prost::Message as _;

/// The resource: `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` win over what the program says of itself. Its attributes
/// are sorted, so that two encodings of it are the same bytes.
pub(crate) fn of(program: &str, instance: &str, version: &str, epoch: &str) -> Resource {
    let own = [("service.name", program), ("service.instance.id", instance), ("service.version", version)];
    let built = opentelemetry_sdk::Resource::builder().build();
    let mut attributes: Vec<KeyValue> = own
        .iter()
        .filter(|(key, _)| !names(&built, key))
        .chain([&(EPOCH_ATTRIBUTE, epoch)])
        .map(|(key, value)| text(key, value))
        .collect();
    let others = built.iter().filter(|(key, value)| {
        let made_up = key.as_str() == "service.name" && value.as_str().starts_with("unknown_service");
        !made_up && key.as_str() != EPOCH_ATTRIBUTE
    });
    attributes.extend(others.map(|(key, value)| text(key.as_str(), &value.as_str())));
    attributes.sort_by(|a, b| a.key.cmp(&b.key));
    let resource = Resource { attributes, ..Default::default() };
    if resource.encoded_len() > crate::mapped::RESOURCE_BYTES_MAX {
        let attributes = own.iter().chain([&(EPOCH_ATTRIBUTE, epoch)]).map(|(key, value)| text(key, value)).collect();
        return Resource { attributes, ..Default::default() };
    }
    resource
}

/// The resource of a life whose own can't be read any more.
pub(crate) fn unknown(epoch: &str) -> Resource {
    let attributes = vec![text(EPOCH_ATTRIBUTE, epoch), text("service.name", "unknown_service:drover")];
    Resource { attributes, ..Default::default() }
}

fn names(resource: &opentelemetry_sdk::Resource, key: &str) -> bool {
    let value = resource.iter().find(|(k, _)| k.as_str() == key).map(|(_, value)| value.as_str());
    value.is_some_and(|value| !value.starts_with("unknown_service"))
}

fn text(key: &str, value: &str) -> KeyValue {
    let value = AnyValue { value: Some(Value::StringValue(value.to_owned())) };
    KeyValue { key: key.to_owned(), value: Some(value), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resource_names_program_and_life_and_always_encodes_to_the_same_bytes() {
        let resource = of("drover-agent", "a", "1", "e");
        let keys: Vec<_> = resource.attributes.iter().map(|a| a.key.as_str()).collect();
        assert!(keys.is_sorted(), "{keys:?}");
        for key in ["drover.epoch", "service.instance.id", "service.name", "service.version"] {
            assert_eq!(keys.iter().filter(|k| **k == key).count(), 1, "{key} in {keys:?}");
        }
        assert_eq!(of("drover-agent", "a", "1", "e").encode_to_vec(), resource.encode_to_vec());
    }
}
