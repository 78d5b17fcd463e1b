//! Free space.

use std::{io, path::Path};

/// Bytes that this program may still write on the file system of `path`.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(path)?;
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion, reason = "the types differ between platforms")]
    Ok(u64::from(stat.blocks_available()).saturating_mul(stat.fragment_size() as u64))
}
