//! One agent for each state directory: an exclusive lock on a file in it, held for as long as the agent lives.

use anyhow::{Context as _, bail};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use std::{
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    time::Duration,
};

/// Held by the one agent of a state directory.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "the lock lasts as long as the file is open")] Flock<File>);

/// Takes the lock; waits for at most `patience` for an agent that is about to end.
pub async fn take(state_dir: &Path, patience: Duration) -> anyhow::Result<Lock> {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        let path = state_dir.join("lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .with_context(|| path.display().to_string())?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                // Only for the message below: on a full disk what runs must be taken back all the same.
                let _ = file.set_len(0).and_then(|()| file.write_all(std::process::id().to_string().as_bytes()));
                return Ok(Lock(file));
            }
            Err((mut file, Errno::EWOULDBLOCK)) => {
                if tokio::time::Instant::now() >= deadline {
                    let mut pid = String::new();
                    let _ = file.rewind().and_then(|()| file.read_to_string(&mut pid));
                    bail!(
                        "state_dir = {}: another agent uses it (pid {}): end that one, or give this one a state_dir of its own",
                        state_dir.display(),
                        pid.trim()
                    );
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err((_, error)) => bail!("{}: {error}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    #[tokio::test]
    async fn a_second_agent_is_refused_and_told_the_first_one_s_pid() {
        let place = tempfile::tempdir().unwrap();
        let first = super::take(place.path(), std::time::Duration::ZERO).await.unwrap();
        let error = super::take(place.path(), std::time::Duration::ZERO).await.unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        drop(first);
        super::take(place.path(), std::time::Duration::ZERO).await.unwrap();
    }
}
