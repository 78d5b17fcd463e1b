//! A real etcd for a test: a child process with its own ports, data and log, gone when dropped.
//!
//! It stays in the test's process group, so whatever ends the test by force (nextest's time limit, Ctrl-C) ends it as well.

use anyhow::{Context, bail, ensure};
use nix::{
    sys::{
        signal::{self, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use rand::RngExt;
use std::{
    fs::File,
    net::TcpListener,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

/// How long etcd may take to answer that it is healthy, on a loaded machine.
const HEALTHY_WITHIN: Duration = Duration::from_secs(30);
/// How often its health is asked for meanwhile.
const POLL: Duration = Duration::from_millis(20);
/// Starts tried, each with another port, when a port turned out to be taken.
const STARTS: usize = 5;

/// A running (or stopped, or killed) etcd of one member.
#[derive(Debug)]
pub struct Etcd {
    child: Option<Child>,
    port: u16,
    extra: Vec<String>,
    /// Data and log. Declared last: it is removed after the process.
    folder: TempDir,
}

impl Etcd {
    /// Starts one and waits until it is healthy. The program is `etcd` of PATH, or `DROVER_ETCD`.
    ///
    /// # Errors
    /// When it can't be started or does not become healthy; with the end of its log.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(&[]).await
    }

    /// As [`Etcd::start`], with more arguments, as in `["--quota-backend-bytes", "4194304"]`.
    ///
    /// # Errors
    /// As [`Etcd::start`].
    pub async fn start_with(extra: &[&str]) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("drover-etcd-").tempdir().context("a folder for etcd")?;
        let extra = extra.iter().map(ToString::to_string).collect();
        let mut etcd = Self { child: None, port: 0, extra, folder };
        for left in (0..STARTS).rev() {
            etcd.port = free_port()?;
            match etcd.run().await {
                Ok(()) => return Ok(etcd),
                Err(error) if left > 0 && etcd.log().contains("address already in use") => {
                    eprintln!("port {} was taken meanwhile, another is tried: {error:#}", etcd.port);
                }
                Err(error) => return Err(error),
            }
        }
        bail!("no free port found in {STARTS} attempts")
    }

    /// Client addresses, as coordinators take them.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        vec![format!("http://127.0.0.1:{}", self.port)]
    }

    /// Runs `etcdctl` (of PATH, or `DROVER_ETCDCTL`), which links none of the product; what it printed.
    ///
    /// # Errors
    /// When it can't be run or fails.
    pub fn ctl(&self, words: &[&str]) -> anyhow::Result<String> {
        let output = etcdctl(&self.endpoints()[0]).args(words).output().context("etcdctl")?;
        ensure!(output.status.success(), "etcdctl {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        // Records are no text: of those the words in them can be found.
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// All keys below `/drover/`, without that prefix.
    ///
    /// # Errors
    /// As [`Etcd::ctl`].
    pub fn keys(&self) -> anyhow::Result<Vec<String>> {
        let text = self.ctl(&["get", "--prefix", "/drover/", "--keys-only"])?;
        Ok(text.lines().filter_map(|line| line.strip_prefix("/drover/")).map(str::to_owned).collect())
    }

    /// Process id, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Folder of its data and log.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What it logged since the last start.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// One of its own figures, as `/metrics` gives them: "etcd_debugging_mvcc_keys_total", for instance.
    ///
    /// # Errors
    /// When it does not answer or has no such figure.
    pub async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let answer = timeout(Duration::from_secs(5), get(self.port, "/metrics")).await.context("etcd's metrics")??;
        let line = answer.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.with_context(|| format!("etcd has no figure {name}"))?.trim().parse().context("etcd's figure")
    }

    /// Halts it where it is (SIGSTOP): connections stay open and nothing answers from the return of this call on.
    ///
    /// # Errors
    /// When it does not run.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGSTOP)?;
        // The signal is on its way; until every thread has stopped, one may still answer.
        let pid = Pid::from_raw(self.pid().context("etcd does not run")?.try_into()?);
        match waitpid(pid, Some(WaitPidFlag::WUNTRACED))? {
            WaitStatus::Stopped(..) => Ok(()),
            other => bail!("etcd did not stop: {other:?}"),
        }
    }

    /// Lets it go on after [`Etcd::stop`].
    ///
    /// # Errors
    /// When it does not run.
    pub fn cont(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Ends it at once (SIGKILL); connections break and new ones are refused. Data stay.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self) -> anyhow::Result<ExitStatus> {
        let mut child = self.child.take().context("etcd does not run")?;
        child.kill().context("killing etcd")?;
        child.wait().context("waiting for the end of etcd")
    }

    /// Starts it again after [`Etcd::kill`] on the same data and port, and waits until it is healthy.
    ///
    /// # Errors
    /// As [`Etcd::start`].
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        ensure!(self.child.is_none(), "etcd runs still: kill it before it is started again");
        self.run().await
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let pid = self.pid().context("etcd does not run")?;
        // A child that was not waited for keeps its pid, so this can hit nothing else.
        signal::kill(Pid::from_raw(pid.try_into()?), signal).with_context(|| format!("{signal} to etcd"))
    }

    #[allow(clippy::disallowed_methods, reason = "a test harness starts programs")]
    async fn run(&mut self) -> anyhow::Result<()> {
        let program = std::env::var_os("DROVER_ETCD").unwrap_or_else(|| "etcd".into());
        let log = File::create(self.folder.path().join("log")).context("the log of etcd")?;
        let client = self.endpoints().remove(0);
        // A single member never uses its peer port: the kernel may choose it.
        let peer = "http://127.0.0.1:0";
        let child = Command::new(&program)
            .args(["--name", "test", "--data-dir"])
            .arg(self.folder.path().join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
            .args(["--initial-cluster", &format!("test={peer}")])
            .args(["--logger", "zap", "--log-outputs", "stderr"])
            .args(&self.extra)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("the log of etcd")?)
            .stderr(log)
            .spawn()
            .with_context(|| {
                format!("starting {}: install etcd-server, or name it in DROVER_ETCD", program.display())
            })?;
        self.child = Some(child);
        self.healthy().await
    }

    async fn healthy(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + HEALTHY_WITHIN;
        loop {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait().context("etcd's end")?
            {
                self.child = None;
                bail!("etcd ended with {status}; the end of its log:\n{}", self.log_end());
            }
            if let Ok(Ok(true)) = timeout(Duration::from_secs(1), says_healthy(self.port)).await {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "etcd was not healthy within {HEALTHY_WITHIN:?}; its log:\n{}",
                self.log_end()
            );
            sleep(POLL).await;
        }
    }

    fn log_end(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if self.child.is_some()
            && let Err(error) = self.kill()
        {
            eprintln!("etcd of {} is left running: {error:#}", self.folder.path().display());
        }
    }
}

/// `etcdctl` for an etcd at this address.
pub(crate) fn etcdctl(endpoint: &str) -> Command {
    let mut command = Command::new(std::env::var_os("DROVER_ETCDCTL").unwrap_or_else(|| "etcdctl".into()));
    command.env("ETCDCTL_API", "3").args(["--endpoints", endpoint]);
    command
}

async fn says_healthy(port: u16) -> anyhow::Result<bool> {
    Ok(get(port, "/health").await?.contains(r#""health":"true""#))
}

/// A whole answer, header included. HTTP 1.0, so that it comes in one piece and ends with the connection.
async fn get(port: u16, path: &str) -> anyhow::Result<String> {
    let mut connection = TcpStream::connect(("127.0.0.1", port)).await?;
    connection.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// A port that is free now. It is taken from below the range from which the kernel serves everyone who binds port 0 or
/// connects (32768 and up): so nobody gets it by chance before etcd binds it, nor while etcd is down for a restart.
///
/// # Errors
/// When none of many is free.
pub fn free_port() -> anyhow::Result<u16> {
    let mut random = rand::rng();
    (0..100)
        .map(|_| random.random_range(10_000..32_000))
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .context("no free port between 10000 and 32000 on 127.0.0.1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_is_left_of_it_even_when_it_was_halted() {
        let etcd = Etcd::start().await.unwrap();
        let (pid, port, folder) = (etcd.pid().unwrap(), etcd.port, etcd.folder().to_owned());
        assert!(folder.join("data/member").is_dir());
        etcd.stop().unwrap();
        drop(etcd);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        assert!(!folder.exists());
        assert!(TcpListener::bind(("127.0.0.1", port)).is_ok());
    }

    #[tokio::test]
    async fn a_start_that_fails_says_why() {
        let error = Etcd::start_with(&["--election-timeout", "1"]).await.unwrap_err();
        assert!(format!("{error:#}").contains("election-timeout"), "{error:#}");
    }
}
