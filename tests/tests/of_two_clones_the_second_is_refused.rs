//! A name is for one host and a session for one agent: whoever comes second under it starts nothing, whatever it has copied
//! of the first, which notices nothing.

use anyhow::{Context as _, ensure};
use drover_proto::v1::Instance;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    programs::{Running, eventually, llama_server, processes_with, program},
};
use std::{fs, path::PathBuf, process::Command, time::Duration};

const TTL: Duration = Duration::from_secs(3);

async fn cluster(ttl: Duration) -> anyhow::Result<Cluster> {
    let coordinator_toml = format!("session_ttl_ms = {}\nheartbeat_interval_ms = 500\n", ttl.as_millis());
    Cluster::start(Plan { coordinator_toml, ..Plan::default() }).await
}

/// Another agent under the name of the first one.
struct Second {
    running: Running,
    state: PathBuf,
}

/// Files that it sees with another content.
#[derive(Clone, Copy)]
enum Sees {
    TheSame,
    AnotherMachine,
    AnotherBoot,
}

impl Second {
    fn state(cluster: &Cluster) -> PathBuf {
        cluster.folder().join("second")
    }

    fn copy_of_the_first(cluster: &Cluster) -> anyhow::Result<()> {
        let first = cluster.folder().join("agent-a");
        // Sockets are of no use to anybody, and cp says so.
        let copied = Command::new("cp").arg("-r").arg(&first).arg(Self::state(cluster)).output()?;
        ensure!(Self::state(cluster).join("session").is_file(), "{}", String::from_utf8_lossy(&copied.stderr));
        Ok(())
    }

    fn start(cluster: &Cluster, sees: Sees) -> anyhow::Result<Self> {
        let (folder, state) = (cluster.folder(), Self::state(cluster));
        let config = folder.join("second.toml");
        let text = format!(
            "node = 'a'\ncoordinators = [{:?}]\nstate_dir = '{}'\nllama_server = '{}'\nmodel_roots = ['{}/models']\n\
             proxy_listen = '127.0.0.1:0'\nmemory_bytes = 68719476736\njoin_secret_file = '{}/secret'\n",
            cluster.coordinators[0].grpc,
            state.display(),
            llama_server()?.display(),
            folder.display(),
            folder.display(),
        );
        fs::write(&config, text)?;
        let other = folder.join("other");
        let (content, over) = match sees {
            Sees::TheSame => ("", ""),
            Sees::AnotherMachine => ("0123456789abcdef0123456789abcdef\n", "/etc/machine-id"),
            Sees::AnotherBoot => ("01234567-89ab-cdef-0123-456789abcdef\n", "/proc/sys/kernel/random/boot_id"),
        };
        fs::write(&other, content)?;
        let mount =
            if over.is_empty() { String::new() } else { format!("mount --bind {} {over} && ", other.display()) };
        let words = [
            "--mount".to_owned(),
            "--propagation".to_owned(),
            "private".to_owned(),
            "sh".to_owned(),
            "-c".to_owned(),
            format!("{mount}exec \"$@\""),
            "sh".to_owned(),
            program("drover-agent").display().to_string(),
            "run".to_owned(),
            "--config".to_owned(),
            config.display().to_string(),
        ];
        let running = Running::start(&PathBuf::from("unshare"), "second", folder, &words, &[])?;
        Ok(Self { running, state })
    }

    /// It says this, is not let in for twice the time that a session lives, and starts nothing meanwhile.
    async fn is_refused(&mut self, why: &str) -> anyhow::Result<()> {
        let what = format!("it is refused: {why}");
        eventually(&what, SOON, async || {
            let log = self.running.log();
            ensure!(log.contains(why), "{}", self.running.log_tail());
            Ok(())
        })
        .await?;
        let begun = std::time::Instant::now();
        eventually("it starts nothing", SOON, async || {
            let instances = self.state.join("instances").display().to_string();
            let started = processes_with(&instances);
            assert!(started.is_empty(), "it has started {started:?}:\n{}", self.running.log());
            assert!(!self.running.log().contains("this node has a session"), "{}", self.running.log());
            ensure!(begun.elapsed() > TTL * 2, "{:?}", begun.elapsed());
            Ok(())
        })
        .await
    }

    async fn end(mut self) -> anyhow::Result<()> {
        self.running.terminate(SOON).await?;
        let proxy = self.state.join("proxy").display().to_string();
        for left in processes_with(&self.state.display().to_string()) {
            ensure!(left.command.contains(&proxy) || left.command.contains("proxy"), "{left:?}");
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(left.pid), nix::sys::signal::Signal::SIGKILL)?;
        }
        fs::remove_dir_all(&self.state)?;
        Ok(())
    }
}

async fn unmoved(cluster: &Cluster, before: &Instance) -> anyhow::Result<()> {
    let now = cluster.ready("tiny", 1).await?.remove(0);
    ensure!((now.pid, now.token) == (before.pid, before.token), "{now:?}, was {before:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_it_has_of_the_first() -> anyhow::Result<()> {
    let cluster = cluster(TTL).await?;
    let before = cluster.deploy(cluster.spec("tiny", 1)).await?.remove(0);

    let mut other = Second::start(&cluster, Sees::AnotherMachine)?;
    other.is_refused("this node's name belongs to another machine").await?;
    other.end().await?;
    unmoved(&cluster, &before).await?;

    let mut fresh = Second::start(&cluster, Sees::TheSame)?;
    fresh.is_refused("has a session that this agent does not know").await?;
    fresh.end().await?;
    unmoved(&cluster, &before).await?;

    Second::copy_of_the_first(&cluster)?;
    let mut copy = Second::start(&cluster, Sees::TheSame)?;
    copy.is_refused("another agent of this host has this node's session").await?;
    copy.end().await?;
    unmoved(&cluster, &before).await?;

    let (code, told, said) = cluster.drover(0, &["events", "--object", "node/a"])?;
    ensure!(code == Some(0) && told.contains("NodeRefused"), "an operator is told of it:\n{told}\n{said}");
    cluster.delete("tiny").await?;
    cluster.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn also_while_the_first_is_down_for_a_moment() -> anyhow::Result<()> {
    // Longer than the first one takes to be back on a busy machine.
    let mut cluster = cluster(TTL * 6).await?;
    let before = cluster.deploy(cluster.spec("tiny", 1)).await?.remove(0);
    Second::copy_of_the_first(&cluster)?;
    cluster.agents[0].running.take().context("it runs")?.kill()?;
    // A copy on another host: its boot is another one.
    let copy = Second::start(&cluster, Sees::AnotherBoot)?;
    eventually("it is refused", SOON, async || {
        ensure!(copy.running.log().contains("is that of another boot"), "{}", copy.running.log_tail());
        Ok(())
    })
    .await?;
    cluster.start_agent(0)?;
    cluster.agent_ready(0).await?;
    unmoved(&cluster, &before).await?;
    copy.end().await?;
    cluster.delete("tiny").await?;
    cluster.end().await
}
