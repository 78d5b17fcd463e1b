//! Tests that look at, or end, whatever runs on a host: in a PID namespace of their own, so that neither they nor the tests
//! beside them meet the other's processes. Linux's `unshare` (util-linux) makes it; whoever is not root gets a user
//! namespace with it.

use anyhow::{Context as _, ensure};
use std::process::Command;

/// Set within the namespace.
const INSIDE: &str = "DROVER_TEST_ALONE";

/// Runs the test of this name in a process of its own that sees no processes but those it starts. When it ends, so do they.
///
/// # Errors
/// When the test fails, or no namespace can be made.
pub fn run(test: &str, body: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    if std::env::var_os(INSIDE).is_some() {
        return tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(body);
    }
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    if !nix::unistd::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    // A shell is the namespace's first process: it takes care of those that lose their parent.
    command.args(["bash", "-c", "\"$@\"; exit $?", "bash"]).arg(std::env::current_exe()?);
    command.args(["--exact", test, "--nocapture"]).env(INSIDE, "1");
    let status = command.status().context("unshare (package util-linux) can't be run")?;
    ensure!(status.success(), "{test}, in a namespace of its own, ended with {status}: see above");
    Ok(())
}
