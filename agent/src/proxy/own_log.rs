//! The proxy's own log: standard error, which its spawner has pointed at a file that this module keeps bounded.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// Largest log, in bytes; as much again is kept in `proxy.log.1`.
pub(super) const BYTES_MAX: u64 = 4 << 20;
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// Logs to standard error.
pub(super) fn init(filter: &str) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|error| anyhow::anyhow!("log_filter = \"{filter}\": {error}"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        // Told on standard error, which is the very file that can't be written: that would panic.
        .log_internal_errors(false)
        .try_init()
        .map_err(|error| anyhow::anyhow!("the log can't be opened: {error}"))
}

/// Moves the log's content aside whenever it has grown too large.
pub(super) async fn keep_bounded(path: PathBuf) {
    loop {
        tokio::time::sleep(CHECK_INTERVAL).await;
        if let Err(error) = bound(&path, BYTES_MAX) {
            tracing::debug!(%error, "the proxy's log can't be bounded");
        }
    }
}

/// Copies the log aside and empties it when it is too large. It is not renamed: standard error stays open on its inode.
pub(super) fn bound(path: &Path, bytes_max: u64) -> io::Result<()> {
    let length = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if length > bytes_max {
        fs::copy(path, path.with_extension("log.1"))?;
        File::options().write(true).open(path)?.set_len(0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_log_that_has_grown_too_large_is_moved_aside_and_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("proxy.log");
        bound(&path, 10).unwrap();
        let mut log = File::options().create(true).append(true).open(&path).unwrap();
        log.write_all(b"0123456789ab").unwrap();
        bound(&path, 10).unwrap();
        log.write_all(b"next").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"next");
        assert_eq!(fs::read(folder.path().join("proxy.log.1")).unwrap(), b"0123456789ab");
    }
}
