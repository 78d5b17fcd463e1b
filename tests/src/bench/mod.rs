//! Benchmarks. Each measures the thing itself and its bare counterpart side by side in one run, and prints both.

pub mod adopt;
pub mod claims;
mod cpu;
mod idle;
pub mod overhead;
pub mod start;
