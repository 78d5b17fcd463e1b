//! The gRPC services: check, call, answer. Decisions are made elsewhere.

mod convert;
mod deployments;
mod events;
mod fleet;
mod logs;
mod node;
mod nodes;
mod page;
mod processes;
mod release;
mod runtime;
mod validate;

pub use fleet::Fleet;
pub use node::Node;
pub use runtime::Elsewhere;
