//! Starts a proxy process that does not end with its spawner.

use super::{ProxySettings, own_log};
use anyhow::Context as _;
use std::{
    fs::{self, File},
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
};
use tokio::process::{Child, Command};

/// Where the address that was used last is kept, so that the port stays the same when both processes were away.
fn address_file(settings: &ProxySettings) -> PathBuf {
    settings.state_dir.join("proxy.address")
}

/// The address that was used last under these settings.
pub(super) fn remembered(settings: &ProxySettings) -> Option<SocketAddr> {
    let address: SocketAddr = fs::read_to_string(address_file(settings)).ok()?.trim().parse().ok()?;
    (address.ip() == settings.listen.ip()).then_some(address)
}

/// Keeps the address for the next start; a failure costs the port, nothing else.
pub(super) fn remember(settings: &ProxySettings, address: SocketAddr) {
    if remembered(settings) == Some(address) {
        return;
    }
    let path = address_file(settings);
    let written = write_whole(&path, &format!("{address}\n"));
    if let Err(error) = written {
        tracing::warn!(path = %path.display(), %error, "the proxy's address can't be kept");
    }
}

fn write_whole(path: &Path, text: &str) -> std::io::Result<()> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(temporary, path)
}

/// Starts the process. `take_over`: it takes the listener of one that is about to end. It makes a session of its own as its first act; its output goes to `proxy.log`.
pub(super) fn spawn(settings: &ProxySettings, known: Option<SocketAddr>, take_over: bool) -> anyhow::Result<Child> {
    let program = match &settings.executable {
        Some(program) => program.clone(),
        None => std::env::current_exe().context("the running program's path is not known")?,
    };
    fs::create_dir_all(&settings.state_dir)
        .with_context(|| format!("folder {} can't be made", settings.state_dir.display()))?;
    let log = settings.log_file();
    if let Err(error) = own_log::bound(&log, own_log::BYTES_MAX) {
        // A full disk costs the log, not the service.
        tracing::warn!(path = %log.display(), %error, "the proxy's log can't be moved aside");
    }
    let log_file = File::options()
        .create(true)
        .append(true)
        .open(&log)
        .with_context(|| format!("{} can't be opened", log.display()))?;
    let second = log_file.try_clone().context("the log can't be opened twice")?;
    #[allow(clippy::disallowed_methods, reason = "the proxy is the one program besides the shim that the agent starts")]
    let mut command = Command::new(&program);
    command.arg("proxy").arg("--listen").arg(settings.listen.to_string());
    if let Some(port) = known.or_else(|| remembered(settings)).map(|address| address.port()) {
        command.arg("--prefer-port").arg(port.to_string());
    }
    if take_over {
        command.arg("--take-over");
    }
    command.arg("--runtime-dir").arg(absolute(&settings.runtime_dir)?);
    command.arg("--state-dir").arg(absolute(&settings.state_dir)?);
    if let Some(path) = &settings.join_secret_file {
        command.arg("--join-secret-file").arg(absolute(path)?);
    }
    if settings.allow_plaintext {
        command.arg("--allow-plaintext");
    }
    command.arg("--drain-ms").arg(settings.drain.as_millis().to_string());
    command.arg("--log-filter").arg(&settings.log_filter);
    // Settings come as arguments only, so that what the spawner's environment holds can't leak or steer.
    command.env_clear().current_dir("/").kill_on_drop(false);
    command.stdin(Stdio::null()).stdout(log_file).stderr(second);
    let child = command.spawn().with_context(|| format!("{} can't be started", program.display()))?;
    tracing::info!(pid = child.id(), "the proxy was started");
    Ok(child)
}

/// The proxy works in "/", so that it keeps no file system busy.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("{} can't be made absolute", path.display()))
}

/// Why the proxy ended, from its log, for an error's text: the last error, or else the last lines.
pub(super) fn last_words(settings: &ProxySettings) -> String {
    let text = fs::read(settings.log_file()).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(4000)..]).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    match lines.iter().rev().find_map(|line| line.split_once(" ERROR ")) {
        Some((_, error)) => error.to_owned(),
        None => lines[lines.len().saturating_sub(3)..].join("; "),
    }
}
