//! What the end-to-end tests, fault runs and benchmarks share: real parts, started and ended as an operator would.
//!
//! Owns: a whole fleet on one machine ([`cluster`]), its parts ([`etcd`], [`programs`]), what they use ([`measure`]),
//! clients and nodes by hand ([`gateway`], [`load`], [`node`]), what is done to them ([`faults`], [`link`]) and who judges
//! ([`judge`], [`checker`], [`servers`]). Must never: look into the programs under test but through what they offer to
//! everybody.

pub mod alone;
pub mod by_hand;
pub mod checker;
pub mod cluster;
pub mod collector;
pub mod etcd;
pub mod faults;
pub mod gateway;
pub mod judge;
pub mod link;
pub mod load;
pub mod measure;
pub mod node;
pub mod programs;
pub mod servers;
