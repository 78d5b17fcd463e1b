//! `drover-agent down`: ends everything that agents of a state directory have left running, after the agent has ended.

use crate::{
    config::{Places, socket_of},
    host::processes::{self, Found, Living},
    instance::adopt,
    lock, proxy,
};
use anyhow::{Context as _, bail, ensure};
use drover_shim::{
    durable,
    record::{self, Directory, Record},
};
use std::{fs, time::Duration};
use tokio::time::{Instant, sleep, timeout};

/// How long an agent that is about to end is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// Between SIGTERM and SIGKILL, and then again for the end.
const GRACE: Duration = Duration::from_secs(10);
/// How often a shim is looked at that has not ended yet.
const SHIM_POLL: Duration = Duration::from_millis(10);
/// How long requests in flight at the proxy are waited for.
const PROXY_DRAIN: Duration = Duration::from_secs(1);

/// Ends all servers of a state directory, then its proxy. What could not be ended is named in the error; nothing is
/// touched whose identity does not match its record.
pub async fn down(places: &Places) -> anyhow::Result<()> {
    let _lock = lock::take(&places.state_dir, LOCK_PATIENCE).await?;
    let folder = places.state_dir.join("instances");
    let mut ends = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        let instance = entry.file_name().to_string_lossy().into_owned();
        ends.push(end(Directory::new(entry.path()), socket_of(&places.runtime_dir, &instance), instance));
    }
    let mut problems: Vec<String> =
        futures::future::join_all(ends).await.into_iter().filter_map(Result::err).map(|e| format!("{e:#}")).collect();
    if let Err(error) = proxy::client::end_at(&places.runtime_dir, PROXY_DRAIN).await {
        problems.push(format!("proxy: {error:#}"));
    }
    if problems.is_empty() { Ok(()) } else { bail!("not everything could be ended: {}", problems.join("; ")) }
}

async fn end(directory: Directory, socket: std::path::PathBuf, instance: String) -> anyhow::Result<()> {
    let mut deadline = Instant::now() + GRACE;
    loop {
        match record::read::<Record>(&directory.record()) {
            Ok(record) => match processes::find(&record) {
                Found::Living(living) => {
                    end_process(&living).await.with_context(|| instance.clone())?;
                    deadline = Instant::now() + GRACE;
                }
                Found::Gone | Found::Other(_) => {}
                Found::Unknown(why) => bail!("{instance}: {why}"),
            },
            Err(durable::Error::Missing(_)) => {}
            Err(error) => bail!("{instance}: {error}: its server, if it runs, was not touched"),
        }
        if adopt::remove(&directory, &socket) {
            return Ok(());
        }
        // Its shim makes the end durable, or is in the middle of a start and records another process in a moment.
        ensure!(Instant::now() < deadline, "{instance}: its shim has not ended");
        sleep(SHIM_POLL).await;
    }
}

async fn end_process(living: &Living) -> anyhow::Result<()> {
    living.terminate()?;
    if timeout(GRACE, living.ended()).await.is_ok() {
        return Ok(());
    }
    living.kill_tree()?;
    timeout(GRACE, living.ended()).await.with_context(|| format!("pid {} has not ended", living.pid()))
}
