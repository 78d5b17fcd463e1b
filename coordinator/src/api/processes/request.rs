//! PURE. What a request to stop is about.

use drover_proto::{ids, status::invalid_field, v1::StopProcessRequest};
use tonic::Status;

/// What a request is about.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum What<'a> {
    /// An instance.
    Instance(&'a str),
    /// A process of a node.
    Process(&'a str, i64),
    /// Whatever bears a name.
    Name(&'a str),
    /// Everything of a node.
    Node(&'a str),
}

/// Refuses what is about nothing, or about more than one thing.
#[allow(clippy::result_large_err)] // tonic's own type
pub(super) fn what(request: &StopProcessRequest) -> Result<What<'_>, Status> {
    let (instance, node, name) = (request.instance.as_str(), request.node.as_str(), request.name.as_str());
    let given = [!instance.is_empty(), !node.is_empty(), !name.is_empty()];
    if given.iter().filter(|given| **given).count() > 1 {
        return Err(invalid_field(
            "instance",
            "is one of three: give an instance, a node (with a pid or all), or a name",
        ));
    }
    if node.is_empty() && request.pid != 0 {
        return Err(invalid_field("node", "is empty: a pid is one of a node; name that too"));
    }
    if node.is_empty() && request.all {
        return Err(invalid_field("node", "is empty: say of which node all are to stop"));
    }
    match (instance, node, name) {
        ("", "", "") => {
            Err(invalid_field("instance", "is empty: give an instance, a node with a pid or all, or a name"))
        }
        (id, "", "") => {
            ids::check_instance_id(id).map_err(|e| invalid_field("instance", e.to_string()))?;
            Ok(What::Instance(id))
        }
        ("", "", name) if request.replace => {
            Err(invalid_field("replace", format!("is of no use with name: {name} is stopped as a whole")))
        }
        ("", "", name) => Ok(What::Name(name)),
        (_, node, _) => {
            ids::check_node_name(node).map_err(|e| invalid_field("node", e.to_string()))?;
            match (request.pid, request.all) {
                (0, true) => Ok(What::Node(node)),
                (0, false) => Err(invalid_field("pid", "is missing: name a process of the node, or all")),
                (_, true) => Err(invalid_field("all", "is given together with a pid: name one or the other")),
                (pid, false) if i32::try_from(pid).is_ok_and(|pid| pid > 0) => Ok(What::Process(node, pid)),
                (pid, false) => Err(invalid_field("pid", format!("{pid} is not allowed: use the id of a process"))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(instance: &str, node: &str, pid: i64, name: &str, all: bool) -> StopProcessRequest {
        let (instance, node, name) = (instance.to_owned(), node.to_owned(), name.to_owned());
        StopProcessRequest { instance, node, pid, name, all, ..StopProcessRequest::default() }
    }

    #[test]
    fn a_request_is_about_one_thing() {
        let cases = [
            (request("tiny-222222", "", 0, "", false), What::Instance("tiny-222222")),
            (request("", "a", 7, "", false), What::Process("a", 7)),
            (request("", "", 0, "tiny", false), What::Name("tiny")),
            (request("", "a", 0, "", true), What::Node("a")),
        ];
        for (request, expected) in &cases {
            assert_eq!(&what(request).unwrap(), expected);
        }
    }

    #[test]
    fn anything_else_is_refused_with_the_field() {
        let replaced = StopProcessRequest { replace: true, ..request("", "", 0, "tiny", false) };
        let cases = [
            (request("", "", 0, "", false), "instance"),
            (request("", "", 0, "", true), "node"),
            (request("", "", 7, "", false), "node"),
            (request("", "", 7, "tiny", false), "node"),
            (request("tiny-222222", "", 0, "", true), "node"),
            (request("tiny-222222", "a", 7, "", false), "instance"),
            (request("", "a", 7, "tiny", false), "instance"),
            (request("Tiny", "", 0, "", false), "instance"),
            (request("", "a", 0, "", false), "pid"),
            (request("", "a", -1, "", false), "pid"),
            (request("", "a", 1 << 40, "", false), "pid"),
            (request("", "a", 7, "", true), "all"),
            (request("", "A/b", 7, "", false), "node"),
            (replaced, "replace"),
        ];
        for (request, field) in &cases {
            let status = what(request).unwrap_err();
            assert!(status.message().contains(field), "{request:?}: {}", status.message());
        }
    }
}
