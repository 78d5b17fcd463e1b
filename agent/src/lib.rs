//! The agent.

pub mod proxy;
