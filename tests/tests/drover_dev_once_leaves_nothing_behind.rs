//! `drover dev --once` shows the whole path and ends; `drover dev` runs until Ctrl-C; neither leaves anything behind.

use anyhow::{Context as _, ensure};
use drover_tests::programs::{eventually, llama_server, processes_with, program, servers_with};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde_json::Value;
use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    net::TcpStream,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

const SOON: Duration = Duration::from_secs(60);

#[tokio::test]
async fn drover_dev_once_leaves_nothing_behind() -> anyhow::Result<()> {
    let output = dev(&["--once"])?.wait_with_output()?;
    let (text, told) = (String::from_utf8(output.stdout)?, String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{told}");
    for part in ["Drover is ready.", "Try:", "v1/chat/completions, streamed:", "node-1", "node-2"] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    assert_eq!(text.lines().filter(|l| l.starts_with("tiny-") && l.contains("READY")).count(), 2, "{text}");
    let answer = text.lines().skip_while(|l| !l.ends_with("streamed:")).nth(1).context("no answer")?;
    assert!(answer.trim().len() >= 20, "48 tokens are more than {answer:?}");
    let data = text.lines().find_map(|l| l.trim().strip_prefix("data ")).context("no folder is named")?;
    let data = data.trim().split(' ').next().context("no folder is named")?;
    nothing_is_left(Path::new(data))?;
    let address = text.lines().find_map(|l| l.trim().strip_prefix("gRPC ")).context("no address")?.trim();
    ensure!(TcpStream::connect(address).is_err(), "{address} still answers");
    Ok(())
}

#[tokio::test]
async fn ctrl_c_ends_a_dev_fleet_and_leaves_nothing_behind() -> anyhow::Result<()> {
    let mut child = Guard(dev(&["--output", "json"])?);
    let mut line = String::new();
    BufReader::new(child.0.stdout.take().context("no output")?).read_line(&mut line)?;
    let fleet: Value = serde_json::from_str(&line).with_context(|| format!("{line:?}: {}", child.told()))?;
    let data = Path::new(fleet["data_dir"].as_str().context("no folder")?).to_owned();
    let folder = data.parent().context("a folder of its own")?.display().to_string();
    assert_eq!(servers_with(&folder).len(), 2);
    let programs = processes_with(&folder);
    for name in ["etcd", "drover-coordinator", "drover-agent", "drover-shim"] {
        let is = |command: &str| command.split(' ').next().is_some_and(|word| word.ends_with(name));
        assert!(programs.iter().any(|p| is(&p.command)), "no {name} in {programs:#?}");
    }

    // As a terminal does: to the whole group in the foreground.
    let pid = Pid::from_raw(i32::try_from(child.0.id())?);
    killpg(pid, Signal::SIGINT)?;
    let status =
        eventually("drover dev ends after Ctrl-C", SOON, async || child.0.try_wait()?.context("it runs")).await?;
    assert_eq!(status.code(), Some(0), "{}", child.told());
    nothing_is_left(&data)
}

/// `drover dev` in a process group of its own, without any of our settings but the programs to use.
fn dev(words: &[&str]) -> anyhow::Result<Child> {
    let mut command = Command::new(program("drover"));
    for (key, _) in std::env::vars_os() {
        if key.to_str().is_some_and(|k| k.starts_with("DROVER_") && k != "DROVER_ETCD") {
            command.env_remove(key);
        }
    }
    command.env("DROVER_LLAMA_SERVER", llama_server()?).arg("dev").args(words).process_group(0);
    Ok(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// Ends the fleet when the test fails: it takes its programs along.
struct Guard(Child);

impl Guard {
    /// What it said, once it has ended.
    fn told(&mut self) -> String {
        let mut told = String::new();
        if matches!(self.0.try_wait(), Ok(Some(_)))
            && let Some(stderr) = &mut self.0.stderr
        {
            let _ = stderr.read_to_string(&mut told);
        }
        told
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let (Ok(None), Ok(pid)) = (self.0.try_wait(), i32::try_from(self.0.id())) {
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGTERM);
            let _ = self.0.wait();
        }
    }
}

/// No folder, process or socket of the fleet whose data lay there.
fn nothing_is_left(data: &Path) -> anyhow::Result<()> {
    let folder = data.parent().context("a folder of its own")?;
    let mark = folder.display().to_string();
    let folders = std::env::temp_dir().join("drover-dev-").display().to_string();
    ensure!(mark.starts_with(&folders), "{mark} is no folder of drover dev");
    ensure!(!folder.exists(), "{mark} is left");
    let processes = processes_with(&mark);
    ensure!(processes.is_empty(), "processes are left: {processes:#?}");
    let sockets = fs::read_to_string("/proc/net/unix")?;
    ensure!(!sockets.contains(&mark), "sockets are left below {mark}");
    Ok(())
}
