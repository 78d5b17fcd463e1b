//! One child process of `drover dev`: its log, its end, and how it is ended.
//!
//! Owns the child in a task of its own, which alone signals and reaps it: a pid is never signalled after it was
//! reaped. A child leads a process group of its own, so that Ctrl-C reaches `drover dev` only, which then ends the
//! children in order.

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::{
    process::{Child, Command},
    sync::{mpsc, watch},
};

/// Most bytes of a log that are looked at for its last lines.
const TAIL_BYTES: u64 = 16 << 10;
const TAIL_LINES: usize = 15;
/// Time between SIGTERM and SIGKILL in a hurry.
const HURRIED_GRACE: Duration = Duration::from_secs(1);
/// How long a killed process may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// As the kernel says; none when that could not be learnt.
    pub status: Option<ExitStatus>,
    /// It was told to end.
    pub asked: bool,
}

#[derive(Debug)]
enum Order {
    Terminate { grace: Duration },
    Kill,
}

/// A child process. Dropped, it is killed.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    orders: mpsc::Sender<Order>,
    ended: watch::Receiver<Option<End>>,
}

impl Process {
    /// Starts `program` with its output in the file `log`. Variables that would configure Drover's programs, etcd or
    /// llama-server behind our back are not passed on.
    pub fn start(name: &str, program: &Path, arguments: &[String], log: &Path) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(log)?;
        #[allow(clippy::disallowed_methods, reason = "`drover dev` starts programs; that is what it is for")]
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).process_group(0);
        for (key, _) in std::env::vars_os() {
            let configures = ["DROVER_", "ETCD_", "LLAMA_"].iter().any(|p| key.to_string_lossy().starts_with(p));
            if configures {
                command.env_remove(key);
            }
        }
        let child = command.kill_on_drop(true).spawn()?;
        // A few orders at most are ever sent to one child, and the task takes them at once.
        let (orders, taken) = mpsc::channel(4);
        let (end, ended) = watch::channel(None);
        tokio::spawn(keep(child, taken, end));
        Ok(Self { name: name.to_owned(), log: log.to_owned(), orders, ended })
    }

    /// Its name, for people.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits for its end.
    pub fn ended(&self) -> impl Future<Output = End> + Send + 'static {
        let mut ended = self.ended.clone();
        async move {
            let end = ended.wait_for(Option::is_some).await.ok().and_then(|end| *end);
            // The task is gone without a word only when the runtime ends.
            end.unwrap_or(End { status: None, asked: true })
        }
    }

    /// SIGTERM, and SIGKILL after `grace`, or soon after `hurry` is true. Returns when it has ended.
    pub async fn stop(&self, grace: Duration, hurry: &watch::Receiver<bool>) -> End {
        // An error means that it has ended already.
        let _ = self.orders.send(Order::Terminate { grace }).await;
        let mut hurry = hurry.clone();
        tokio::select! {
            end = self.ended() => return end,
            Ok(_) = hurry.wait_for(|hurry| *hurry) => {}
        }
        // Even in a hurry: it has been told a moment ago.
        if let Ok(end) = tokio::time::timeout(HURRIED_GRACE, self.ended()).await {
            return end;
        }
        let _ = self.orders.send(Order::Kill).await;
        let unknown = End { status: None, asked: true };
        tokio::time::timeout(KILL_TIMEOUT, self.ended()).await.unwrap_or(unknown)
    }

    /// Tells, when it has ended: "NAME ended unasked: exit code 1; the last lines of LOG: …". Needs no hold on it.
    pub fn mourner(&self) -> impl Fn(End) -> String + Send + 'static {
        let (name, log) = (self.name.clone(), self.log.clone());
        move |end| obituary(&name, &log, end)
    }
}

fn obituary(name: &str, log: &Path, end: End) -> String {
    let mut text = format!("{name} ended unasked: {}", describe(end));
    let tail = tail(log);
    if tail.is_empty() {
        text.push_str("; it wrote no log");
        return text;
    }
    text.push_str(&format!("; the last lines of {}:", log.display()));
    for line in tail {
        text.push_str("\n  | ");
        text.push_str(&crate::output::printable(&line));
    }
    text
}

/// Waits for the end of the child, and carries out orders until then.
async fn keep(mut child: Child, mut orders: mpsc::Receiver<Order>, ended: watch::Sender<Option<End>>) {
    let end = |status: io::Result<ExitStatus>, asked| {
        ended.send_replace(Some(End { status: status.ok(), asked }));
    };
    let order = tokio::select! {
        status = child.wait() => return end(status, false),
        order = orders.recv() => order,
    };
    // Without an order nobody holds the process any more.
    if let Some(Order::Terminate { grace }) = order {
        signal(&child, Signal::SIGTERM);
        tokio::select! {
            status = child.wait() => return end(status, true),
            // A second order can only be one to hurry.
            _ = orders.recv() => {}
            () = tokio::time::sleep(grace) => {}
        }
    }
    signal(&child, Signal::SIGKILL);
    end(child.wait().await, true);
}

/// Signals a child that was not reaped: until `wait` has returned its pid belongs to it.
fn signal(child: &Child, signal: Signal) {
    let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) else { return };
    // The one error possible is that it has ended a moment ago; `wait` tells.
    let _ = kill(Pid::from_raw(pid), signal);
}

fn describe(end: End) -> String {
    match end.status {
        None => "nobody knows how".to_owned(),
        Some(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(number)) => {
                Signal::try_from(number).map_or_else(|_| format!("signal {number}"), |s| s.as_str().to_owned())
            }
            (None, None) => status.to_string(),
        },
    }
}

/// The last lines of a log; none when it can't be read.
fn tail(log: &Path) -> Vec<String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<String> = text.lines().filter(|l| !l.trim().is_empty()).map(str::to_owned).collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(dir: &Path, script: &str) -> Process {
        Process::start("it", Path::new("/bin/sh"), &["-c".to_owned(), script.to_owned()], &dir.join("log")).unwrap()
    }

    /// Waits until the script has written its first line: then its traps are set.
    async fn spoke(dir: &Path) {
        let log = dir.join("log");
        let wait = async {
            while tail(&log).is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap();
    }

    #[tokio::test]
    async fn an_end_nobody_asked_for_is_told_with_the_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let process = shell(dir.path(), "for i in $(seq 40); do echo line $i; done; exit 3");
        let end = process.ended().await;
        assert!(!end.asked);
        let text = process.mourner()(end);
        assert!(text.starts_with("it ended unasked: exit code 3; the last lines of /"), "{text}");
        assert!(text.ends_with("| line 40") && !text.contains("line 25\n"), "{text}");
    }

    #[tokio::test]
    async fn a_child_that_ignores_sigterm_is_killed_after_its_grace_or_in_a_hurry() {
        let (_keep, calm) = watch::channel(false);
        let (_keep, hurried) = watch::channel(true);
        for (grace, hurry) in [(Duration::from_millis(50), calm), (Duration::from_secs(600), hurried)] {
            let dir = tempfile::tempdir().unwrap();
            let process = shell(dir.path(), "trap '' TERM; echo ready; while :; do sleep 0.01; done");
            spoke(dir.path()).await;
            let end = process.stop(grace, &hurry).await;
            assert_eq!((end.status.and_then(|s| s.signal()), end.asked), (Some(9), true));
        }
    }

    #[tokio::test]
    async fn a_child_that_ends_on_sigterm_is_not_killed_and_stopping_twice_is_harmless() {
        let (_keep, calm) = watch::channel(false);
        let dir = tempfile::tempdir().unwrap();
        let process = shell(dir.path(), "trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done");
        spoke(dir.path()).await;
        let end = process.stop(Duration::from_secs(60), &calm).await;
        assert_eq!(end.status.and_then(|s| s.code()), Some(7));
        assert_eq!(process.stop(Duration::from_secs(60), &calm).await, end);
    }
}
