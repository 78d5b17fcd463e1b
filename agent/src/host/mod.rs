//! What the host is and has: processes, memory, disk, machine, GPUs. The only module that knows /proc and signals.
//!
//! Must never: know what an instance is, or decide what ends.

pub mod cgroup;
pub mod disk;
pub mod gpus;
pub mod machine;
pub mod memory;
pub mod processes;
pub mod scan;
pub mod tree;
