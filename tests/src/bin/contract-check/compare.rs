//! PURE: two compiled contracts in, the breaks of the newer one out.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use prost_types::field_descriptor_proto::Label;
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    MethodDescriptorProto, ServiceDescriptorProto,
};

/// One thing that a peer of the older contract relies on and the newer one no longer keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Break {
    /// The full name of the element, as in `drover.v1.Deployment.name`.
    pub subject: String,
    /// What happened to it.
    pub what: String,
}

impl fmt::Display for Break {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.what)
    }
}

/// Everything in `old` that `new` breaks, in the order of the names.
pub fn breaks(old: &FileDescriptorSet, new: &FileDescriptorSet) -> Vec<Break> {
    let (old, new) = (Elements::of(old), Elements::of(new));
    let mut found = Found(Vec::new());
    for (name, message) in &old.messages {
        match new.messages.get(name) {
            Some(now) => compare_messages(&mut found, name, message, now),
            None => found.add(name, "message removed"),
        }
    }
    for (name, values) in &old.enums {
        match new.enums.get(name) {
            Some(now) => compare_enums(&mut found, name, values, now),
            None => found.add(name, "enum removed"),
        }
    }
    for (name, service) in &old.services {
        match new.services.get(name) {
            Some(now) => compare_services(&mut found, name, service, now),
            None => found.add(name, "service removed"),
        }
    }
    found.0
}

struct Found(Vec<Break>);

impl Found {
    fn add(&mut self, subject: &str, what: impl Into<String>) {
        self.0.push(Break { subject: subject.to_owned(), what: what.into() });
    }

    fn changed<T: PartialEq + fmt::Display>(&mut self, subject: &str, what: &str, old: T, new: T) {
        if old != new {
            self.add(subject, format!("{what} changed from {old} to {new}"));
        }
    }
}

/// The elements of a contract by their full names, nested ones included.
#[derive(Default)]
struct Elements<'a> {
    messages: BTreeMap<String, &'a DescriptorProto>,
    enums: BTreeMap<String, &'a EnumDescriptorProto>,
    services: BTreeMap<String, &'a ServiceDescriptorProto>,
}

impl<'a> Elements<'a> {
    fn of(set: &'a FileDescriptorSet) -> Self {
        let mut elements = Self::default();
        for file in &set.file {
            elements.file(file);
        }
        elements
    }

    fn file(&mut self, file: &'a FileDescriptorProto) {
        self.enums.extend(file.enum_type.iter().map(|one| (join(file.package(), one.name()), one)));
        self.services.extend(file.service.iter().map(|one| (join(file.package(), one.name()), one)));
        file.message_type.iter().for_each(|message| self.message(file.package(), message));
    }

    fn message(&mut self, scope: &str, message: &'a DescriptorProto) {
        let name = join(scope, message.name());
        self.enums.extend(message.enum_type.iter().map(|one| (join(&name, one.name()), one)));
        message.nested_type.iter().for_each(|nested| self.message(&name, nested));
        self.messages.insert(name, message);
    }
}

fn join(scope: &str, name: &str) -> String {
    if scope.is_empty() { name.to_owned() } else { format!("{scope}.{name}") }
}

fn compare_messages(found: &mut Found, name: &str, old: &DescriptorProto, new: &DescriptorProto) {
    for field in &old.field {
        let subject = join(name, field.name());
        if let Some(now) = new.field.iter().find(|now| now.number() == field.number()) {
            compare_fields(found, &subject, (old, field), (new, now));
        } else if let Some(now) = new.field.iter().find(|now| now.name() == field.name()) {
            found.changed(&subject, "number", field.number(), now.number());
        } else {
            found.add(&subject, "field removed (keep it and mark it deprecated; `reserved` is not enough)");
        }
    }
    for field in &new.field {
        let subject = join(name, field.name());
        let is_new = !old.field.iter().any(|before| before.number() == field.number());
        if is_new && field.label() == Label::Required {
            found.add(&subject, "a required field was added: older senders do not fill it");
        }
        // The end of a reserved range is exclusive.
        if old.reserved_range.iter().any(|range| (range.start()..range.end()).contains(&field.number())) {
            found.add(&subject, format!("uses the number {}, which was reserved", field.number()));
        }
        if old.reserved_name.iter().any(|reserved| reserved == field.name()) {
            found.add(&subject, "uses a name that was reserved");
        }
    }
}

fn compare_fields(
    found: &mut Found,
    subject: &str,
    (old_message, old): (&DescriptorProto, &FieldDescriptorProto),
    (new_message, new): (&DescriptorProto, &FieldDescriptorProto),
) {
    found.changed(subject, "name", old.name(), new.name());
    if old.name() == new.name() {
        found.changed(subject, "JSON name", old.json_name(), new.json_name());
    }
    found.changed(subject, "type", type_of(old), type_of(new));
    found.changed(subject, "label", label_of(old), label_of(new));
    found.changed(subject, "oneof", oneof_of(old_message, old), oneof_of(new_message, new));
    if (old.label(), old.r#type(), type_of(old)) == (new.label(), new.r#type(), type_of(new)) {
        found.changed(subject, "presence", presence_of(old), presence_of(new));
    }
    found.changed(subject, "default", old.default_value(), new.default_value());
}

fn type_of(field: &FieldDescriptorProto) -> String {
    match field.type_name() {
        "" => field.r#type().as_str_name().trim_start_matches("TYPE_").to_lowercase(),
        named => named.trim_start_matches('.').to_owned(),
    }
}

fn label_of(field: &FieldDescriptorProto) -> &'static str {
    match field.label() {
        Label::Repeated => "repeated",
        Label::Required => "required",
        Label::Optional => "singular",
    }
}

fn presence_of(field: &FieldDescriptorProto) -> &'static str {
    if field.proto3_optional() { "explicit (optional)" } else { "implicit" }
}

/// The oneof that a field belongs to. The ones that `optional` makes up are not in the source.
fn oneof_of<'a>(message: &'a DescriptorProto, field: &FieldDescriptorProto) -> &'a str {
    let index = field.oneof_index.filter(|_| !field.proto3_optional()).and_then(|index| usize::try_from(index).ok());
    index.and_then(|index| message.oneof_decl.get(index)).map_or("none", |oneof| oneof.name())
}

fn compare_enums(found: &mut Found, name: &str, old: &EnumDescriptorProto, new: &EnumDescriptorProto) {
    for value in &old.value {
        let subject = join(name, value.name());
        if let Some(now) = new.value.iter().find(|now| now.name() == value.name()) {
            found.changed(&subject, "number", value.number(), now.number());
        } else if let Some(now) = new.value.iter().find(|now| now.number() == value.number()) {
            found.changed(&subject, "name", value.name(), now.name());
        } else {
            found.add(&subject, "value removed");
        }
    }
    let old_names: BTreeSet<&str> = old.value.iter().map(|value| value.name()).collect();
    for value in new.value.iter().filter(|value| !old_names.contains(value.name())) {
        // Both ends of an enum's reserved range are inclusive.
        let number_reserved =
            old.reserved_range.iter().any(|range| (range.start()..=range.end()).contains(&value.number()));
        if number_reserved || old.reserved_name.iter().any(|reserved| reserved == value.name()) {
            found.add(&join(name, value.name()), "uses a number or name that was reserved");
        }
    }
}

fn compare_services(found: &mut Found, name: &str, old: &ServiceDescriptorProto, new: &ServiceDescriptorProto) {
    for method in &old.method {
        let subject = join(name, method.name());
        let Some(now) = new.method.iter().find(|now| now.name() == method.name()) else {
            found.add(&subject, "method removed");
            continue;
        };
        found.changed(&subject, "request", request_of(method), request_of(now));
        found.changed(&subject, "response", response_of(method), response_of(now));
    }
}

fn request_of(method: &MethodDescriptorProto) -> String {
    streamed(method.client_streaming(), method.input_type())
}

fn response_of(method: &MethodDescriptorProto) -> String {
    streamed(method.server_streaming(), method.output_type())
}

fn streamed(is_stream: bool, message: &str) -> String {
    format!("{}{}", if is_stream { "stream " } else { "" }, message.trim_start_matches('.'))
}
