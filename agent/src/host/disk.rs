//! Free space, and whether files can be written at all.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

/// Bytes that this program may still write on the file system of `path`.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = nix::sys::statvfs::statvfs(path)?;
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion, reason = "the types differ between platforms")]
    Ok(u64::from(stat.blocks_available()).saturating_mul(stat.fragment_size() as u64))
}

/// Makes a file in a folder and removes it. Asked of the disk itself: one that has failed is read-only without saying so.
///
/// # Errors
/// Why it can't be made or removed.
pub fn takes_files(folder: &Path) -> io::Result<()> {
    // Named so that it is known for a leftover should this program be killed here.
    let probe = folder.join(format!(".probe.{}.tmp", std::process::id()));
    File::create(&probe)?;
    fs::remove_file(probe)
}
