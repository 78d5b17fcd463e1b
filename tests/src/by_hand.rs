//! Servers that somebody starts by hand, beside the fleet.

use crate::{
    cluster::{Cluster, SOON},
    programs::{eventually, llama_server},
};
use anyhow::Context as _;
use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    process::{Child, Command, Stdio},
};

/// A llama-server started by hand. Ends with this value.
#[derive(Debug)]
pub struct Foreign(Child);

impl Foreign {
    /// A stock one that serves the tiny model. Its socket, below the fleet's folder, is its own: a server that was killed
    /// leaves the file.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(cluster: &Cluster, name: &str, key: &str) -> anyhow::Result<Self> {
        let mut command = Command::new(llama_server()?);
        command.arg("--model").arg(cluster.model()).args(["--api-key", key, "--threads", "1", "--host"]);
        command.arg(cluster.folder().join(format!("{name}.sock")));
        Ok(Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?))
    }

    /// A program of that name which runs a script of bash instead. The script's arguments may show a model.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn script(cluster: &Cluster, name: &str, script: &str, arguments: &[&str]) -> anyhow::Result<Self> {
        let folder = cluster.folder().join(name);
        fs::create_dir(&folder)?;
        let program = folder.join("llama-server");
        fs::copy("/bin/bash", &program)?;
        let mut command = Command::new(program);
        command.args(["-c", script, "bash"]).args(arguments);
        Ok(Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?))
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i64 {
        i64::from(self.0.id())
    }

    /// Whether it lives.
    ///
    /// # Errors
    /// When that can't be told.
    pub fn lives(&mut self) -> anyhow::Result<bool> {
        Ok(self.0.try_wait()?.is_none())
    }

    /// Waits until it has ended; the signal that ended it, if one did.
    ///
    /// # Errors
    /// When it goes on.
    pub async fn signal(&mut self) -> anyhow::Result<Option<i32>> {
        let status = eventually("it has ended", SOON, async || self.0.try_wait()?.context("it lives")).await?;
        Ok(status.signal())
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
