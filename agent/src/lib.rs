//! The agent of one GPU host: claims instances, supervises their llama-servers, measures the host.
//!
//! [`link`] speaks with the coordinators, [`instance`] keeps the servers, [`proxy`] is the host's data plane as a process
//! of its own, [`host`] and [`model`] know the machine and its files, [`orphans`] what runs that nobody keeps. The agent may end at any time: what it has started
//! goes on, and the next agent takes it back.

pub mod blocking;
pub mod check;
pub mod clock;
pub mod config;
pub mod down;
pub mod host;
pub mod instance;
pub mod link;
pub mod lock;
pub mod model;
pub mod mutant;
pub mod orphans;
pub mod proxy;
pub mod serve;
