//! Programs under test: where they are, how they are started and ended, and what is left of them.

use anyhow::{Context as _, anyhow};
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};
use tokio::time::{Instant, sleep};

/// How often a condition is asked for.
const POLL: Duration = Duration::from_millis(20);

/// Path of one of our programs. Built by `tests/run`, which says where they are.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let folder = std::env::var_os("DROVER_TEST_BIN_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/debug"), PathBuf::from);
    folder.join(name)
}

/// Path of the stock llama-server.
///
/// # Errors
/// When the environment does not name it.
pub fn llama_server() -> anyhow::Result<PathBuf> {
    std::env::var_os("DROVER_LLAMA_SERVER")
        .map(PathBuf::from)
        .context("DROVER_LLAMA_SERVER is not set: start the tests with tests/run, which gets llama-server")
}

/// Waits until `condition` gives a value.
///
/// # Errors
/// When it does not within `within`; the error says what was waited for and what the condition said last.
pub async fn eventually<T, F>(what: &str, within: Duration, mut condition: F) -> anyhow::Result<T>
where
    F: AsyncFnMut() -> anyhow::Result<T>,
{
    let deadline = Instant::now() + within;
    loop {
        match condition().await {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => {
                return Err(error.context(format!("{what}: not within {} s", within.as_secs())));
            }
            Err(_) => sleep(POLL).await,
        }
    }
}

/// A running program of ours. Killed when dropped.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    log: PathBuf,
    ready: PathBuf,
}

impl Running {
    /// Starts `program` with `arguments` and `environment`; `--ready-file` is added, output goes to `<folder>/<name>.log`.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(
        program: &Path,
        name: &str,
        folder: &Path,
        arguments: &[String],
        environment: &[(String, String)],
    ) -> anyhow::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let ready = folder.join(format!("{name}.ready"));
        let _ = fs::remove_file(&ready);
        let output = File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(program);
        command.args(arguments).arg("--ready-file").arg(&ready);
        command.envs(environment.iter().cloned());
        for inherited in ["OTEL_EXPORTER_OTLP_ENDPOINT", "DROVER_JOIN_SECRET_FILE", "DROVER_CONFIG"] {
            if !environment.iter().any(|(key, _)| key == inherited) {
                command.env_remove(inherited);
            }
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("starting {}: was it built? (tests/run does)", program.display()))?;
        Ok(Self { name: name.to_owned(), child, log, ready })
    }

    /// Waits until it has written its ready file; returns what it says.
    ///
    /// # Errors
    /// When it ends, or takes too long; with the end of its log.
    pub async fn ready(&mut self, within: Duration) -> anyhow::Result<serde_json::Value> {
        let what = format!("{} is ready", self.name);
        let outcome = eventually(&what, within, async || match self.child.try_wait()? {
            // Nothing is to be waited for any more.
            Some(status) => Ok(Err(anyhow!("it has ended with {status}"))),
            None => Ok(Ok(serde_json::from_slice(&fs::read(&self.ready)?)?)),
        })
        .await;
        outcome.flatten().with_context(|| format!("its log ends with:\n{}", self.log_tail()))
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    /// Its whole log.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        signal::kill(Pid::from_raw(i32::try_from(self.pid())?), signal)
            .with_context(|| format!("{signal} to {}", self.name))
    }

    /// Halts it (SIGSTOP) and waits until every thread of it stands still; what it has started goes on.
    ///
    /// # Errors
    /// When it has ended, or does not stop.
    pub async fn pause(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGSTOP)?;
        let threads = Path::new("/proc").join(self.pid().to_string()).join("task");
        eventually(&format!("{} is halted", self.name), Duration::from_secs(5), async || {
            for thread in fs::read_dir(&threads)? {
                let Ok(stat) = fs::read_to_string(thread?.path().join("stat")) else { continue };
                // The name stands in parentheses and may hold anything; the state follows.
                let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
                anyhow::ensure!(state == Some('T'), "a thread is in state {state:?}");
            }
            Ok(())
        })
        .await
    }

    /// Lets it go on after [`Running::pause`].
    ///
    /// # Errors
    /// When it has ended.
    pub fn resume(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// SIGKILL, and waits for the end.
    ///
    /// # Errors
    /// When it can't be waited for.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, and waits for the end.
    ///
    /// # Errors
    /// When it does not end in time; with the end of its log.
    pub async fn terminate(&mut self, within: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        let what = format!("{} ends after SIGTERM", self.name);
        let ended = eventually(&what, within, async || self.child.try_wait()?.context("it still runs")).await;
        ended.with_context(|| format!("its log ends with:\n{}", self.log_tail()))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// A process that has `needle` in its command line or environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Process id.
    pub pid: i32,
    /// Command line.
    pub command: String,
}

/// Every process, ourselves excepted, whose command line or environment contains `needle`.
#[must_use]
pub fn processes_with(needle: &str) -> Vec<Found> {
    let me = std::process::id();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let contains = |bytes: &[u8]| bytes.windows(needle.len()).any(|w| w == needle.as_bytes());
    entries
        .flatten()
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            let found = pid != me && !command.is_empty() && (contains(&command) || contains(&environment));
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            Some(Found { pid: i32::try_from(pid).ok()?, command }).filter(|_| found)
        })
        .collect()
}

/// The llama-servers whose command line contains `needle`.
#[must_use]
pub fn servers_with(needle: &str) -> Vec<Found> {
    let is_server = |f: &Found| f.command.split(' ').next().is_some_and(|program| program.ends_with("llama-server"));
    processes_with(needle).into_iter().filter(is_server).collect()
}
