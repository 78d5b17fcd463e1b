//! The instances of this node: one supervisor each, a pure state machine inside.
//!
//! Owns: the directories below `<state_dir>/instances`, starts, probes, stops, adoption. [`registry`] is what others talk
//! to. Must never: start what no claim covers, signal a process whose identity was not verified, or know coordinators.

pub mod adopt;
pub mod arguments;
pub mod board;
pub mod claim;
pub mod context;
pub mod handle;
pub mod health;
pub mod leases;
pub mod machine;
pub mod registry;
pub mod routes;
pub mod run;
pub mod session;
pub mod state;
pub mod supervisor;
pub mod trace;
pub mod traces;
pub mod turns;
