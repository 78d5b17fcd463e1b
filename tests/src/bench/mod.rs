//! Benchmarks. Each measures the thing itself and its bare counterpart side by side in one run, and prints both.

mod cpu;
pub mod start;
