//! What the shim and the agent must agree on, and the shim's own work.
//!
//! A shim stands beside one llama-server: it records the process before that executes its first instruction, drains its
//! log and makes its end durable, while agents come and go. Owns: the files of an instance's directory ([`record`]), the
//! identity of a process ([`identity`]), the log files ([`logs`]). Must never: talk to a network, know what a deployment
//! is, or decide that a server should end.

pub mod clock;
pub mod durable;
pub mod failpoint;
pub mod identity;
pub mod keep;
pub mod logs;
pub mod record;
pub mod start;
pub mod sys;

pub use start::Refusal;
