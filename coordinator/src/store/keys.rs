//! Names of keys. All are relative to `/drover/`, which the backends add.

use drover_proto::v1::Token;

/// What this store is.
pub const SCHEMA: &str = "schema";
/// Whether claiming is stopped.
pub const HALT: &str = "halt";
/// An operator's word on the freeze of replacement.
pub const FREEZE: &str = "freeze";
/// The elected coordinator.
pub const LEADER: &str = "leader";
/// All deployments.
pub const DEPLOYMENTS: &str = "deployments/";
/// All revisions of specs.
pub const REVISIONS: &str = "revisions/";
/// All deployments of which some instance finds no node.
pub const UNPLACED: &str = "unplaced/";
/// All instances.
pub const INSTANCES: &str = "instances/";
/// All marks of the last claim made.
pub const TAKEN: &str = "taken/";
/// All sessions.
pub const SESSIONS: &str = "sessions/";
/// All claims.
pub const CLAIMS: &str = "claims/";
/// All runs.
pub const RUNS: &str = "runs/";
/// All states of instances.
pub const STATUS: &str = "status/";
/// All nodes.
pub const NODES: &str = "nodes/";
/// All commands to nodes.
pub const COMMANDS: &str = "commands/";
/// All answers to commands.
pub const ANSWERS: &str = "answers/";
/// All events.
pub const EVENTS: &str = "events/";

/// A deployment.
#[must_use]
pub fn deployment(name: &str) -> String {
    format!("{DEPLOYMENTS}{name}")
}
/// One revision of a deployment's spec; zero-padded so that keys sort by number.
#[must_use]
pub fn revision(name: &str, number: u64) -> String {
    format!("{REVISIONS}{name}/{number:020}")
}
/// All revisions of a deployment's spec.
#[must_use]
pub fn revisions(name: &str) -> String {
    format!("{REVISIONS}{name}/")
}
/// Why some instance of a deployment finds no node.
#[must_use]
pub fn unplaced(deployment: &str) -> String {
    format!("{UNPLACED}{deployment}")
}
/// An instance.
#[must_use]
pub fn instance(id: &str) -> String {
    format!("{INSTANCES}{id}")
}
/// The last claim made on an instance.
#[must_use]
pub fn taken(id: &str) -> String {
    format!("{TAKEN}{id}")
}
/// A node's session.
#[must_use]
pub fn session(node: &str) -> String {
    format!("{SESSIONS}{node}")
}
/// The claim on an instance.
#[must_use]
pub fn claim(id: &str) -> String {
    format!("{CLAIMS}{id}")
}
/// A run of an instance.
#[must_use]
pub fn run(id: &str, token: &Token) -> String {
    format!("{RUNS}{id}/{token}")
}
/// All runs of an instance.
#[must_use]
pub fn runs(id: &str) -> String {
    format!("{RUNS}{id}/")
}
/// The state of an instance.
#[must_use]
pub fn status(id: &str) -> String {
    format!("{STATUS}{id}")
}
/// A node.
#[must_use]
pub fn node(name: &str) -> String {
    format!("{NODES}{name}")
}
/// A command to a node.
#[must_use]
pub fn command(node: &str, id: &str) -> String {
    format!("{COMMANDS}{node}/{id}")
}
/// The answer to a command.
#[must_use]
pub fn answer(node: &str, id: &str) -> String {
    format!("{ANSWERS}{node}/{id}")
}
/// One place in the ring of events of an object ("instance/<id>").
#[must_use]
pub fn event(object: &str, slot: u64) -> String {
    format!("{EVENTS}{object}/{slot:04}")
}
/// The ring of events of an object.
#[must_use]
pub fn events(object: &str) -> String {
    format!("{EVENTS}{object}/")
}
