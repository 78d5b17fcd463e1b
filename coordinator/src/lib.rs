//! Drover's coordinator. Any number of equal replicas serve the API, agent sessions, OTLP and the gateway; one of them,
//! elected through the store, reconciles.
//!
//! Arrows go down only: [`api`] → [`control`] → [`plan`], [`store`]. Nothing under [`plan`] does I/O.

pub mod api;
pub mod audit;
pub mod config;
pub mod control;
pub mod gateway;
pub mod invariants;
pub mod plan;
pub mod serve;
mod stall;
pub mod store;
pub mod web;
