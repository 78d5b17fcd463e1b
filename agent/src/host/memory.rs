//! Memory of the host, as the kernel counts it.

use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Memory of the host, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// All there is.
    pub total_bytes: u64,
    /// What may be used without swapping (MemAvailable).
    pub available_bytes: u64,
}

/// Reads the host's memory.
pub fn read() -> anyhow::Result<Memory> {
    let kind = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(kind)?;
    Ok(Memory { total_bytes: system.total_memory(), available_bytes: system.available_memory() })
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_host_has_memory() {
        let memory = super::read().unwrap();
        assert!(memory.total_bytes >= memory.available_bytes && memory.available_bytes > 0, "{memory:?}");
    }
}
