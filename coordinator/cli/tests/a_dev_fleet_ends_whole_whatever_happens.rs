//! `drover dev` with stand-ins for the programs that it starts: whatever fails, whenever the signal comes, what was
//! started is ended in order, servers are taken down, and no folder is left. (That the real programs make a real
//! fleet is tested end to end.)

#![allow(clippy::unwrap_used, reason = "a test")]

mod fake;

use drover_proto::v1::{Instance, InstanceState};
use fake::{Fake, parts};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::Child,
};

const SOON: Duration = Duration::from_secs(30);
/// Runs until SIGTERM, then says so in the diary.
const UNTIL_TERM: &str = "trap 'echo $name ended >> DIARY; exit 0' TERM; while :; do sleep 0.02; done";
/// Says that it is ready.
const READY: &str = "printf '%s' \"$answer\" > $ready.tmp; mv $ready.tmp $ready";

/// A folder with `drover` and stand-ins beside it.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    /// Stand-ins: the coordinator answers with the addresses of the fake one; the agent runs `agent` when it is ready
    /// to say so.
    async fn new(agent: &str) -> Self {
        let fake = Fake::default();
        let address = fake.serve().await;
        fake.0.lock().unwrap().instances = (0..2)
            .map(|n| Instance {
                id: format!("tiny-{n}"),
                deployment: "tiny".into(),
                revision: 1,
                wanted: true,
                state: InstanceState::Ready.into(),
                ..Default::default()
            })
            .collect();
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        let drover = Path::new(env!("CARGO_BIN_EXE_drover"));
        let beside = bench.dir.path().join("drover");
        std::fs::hard_link(drover, &beside).or_else(|_| std::fs::copy(drover, &beside).map(|_| ())).unwrap();
        let coordinator = format!("answer='{{\"grpc\":\"{address}\",\"http\":\"{address}\"}}'; {READY}; {UNTIL_TERM}");
        bench.script("drover-coordinator", &format!("name=coordinator; {coordinator}"));
        bench.script("drover-agent", &format!("if [ $1 = down ]; then echo $name down >> DIARY; exit 0; fi; {agent}"));
        for name in ["drover-shim", "llama-server"] {
            bench.script(name, "exit 1");
        }
        bench
    }

    /// A program that knows the name of its node and its ready file from its configuration file (its last argument).
    fn script(&self, program: &str, body: &str) {
        let head = "#!/bin/sh\nfor config; do :; done\n\
            ready=$(sed -n 's/^ready_file = \"\\(.*\\)\"/\\1/p' $config)\n\
            name=$(sed -n 's/^node = \"\\(.*\\)\"/\\1/p' $config)\n";
        let path = self.dir.path().join(program);
        let text = format!("{head}{body}\n").replace("DIARY", &self.dir.path().join("diary").display().to_string());
        std::fs::File::create(&path).and_then(|mut f| std::io::Write::write_all(&mut f, text.as_bytes())).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn dev(&self, words: &[&str]) -> Child {
        self.dev_on("memory", words)
    }

    fn dev_on(&self, store: &str, words: &[&str]) -> Child {
        #[allow(clippy::disallowed_methods, reason = "a test runs the program")]
        let mut command = tokio::process::Command::new(self.dir.path().join("drover"));
        for (key, _) in std::env::vars_os().filter(|(key, _)| key.to_string_lossy().starts_with("DROVER_")) {
            command.env_remove(key);
        }
        command.env("DROVER_LLAMA_SERVER", self.dir.path().join("llama-server"));
        command.env("DROVER_ETCD", self.dir.path().join("etcd"));
        command.args(["dev", "--store", store, "-o", "json"]).args(words).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// What the stand-ins wrote, sorted where they run side by side.
    fn diary(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.path().join("diary")).unwrap_or_default();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let servers = lines.iter().rposition(|l| l != "coordinator ended").map_or(0, |n| n + 1);
        lines[..servers].sort_by_key(|l| (l.ends_with("down"), l.clone()));
        lines
    }
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().unwrap().cast_signed()), signal).unwrap();
}

async fn end(child: Child) -> Output {
    tokio::time::timeout(SOON, child.wait_with_output()).await.unwrap().unwrap()
}

/// Reads standard error until a line that says `what`.
async fn until_told(child: &mut Child, what: &str) {
    let stderr = child.stderr.as_mut().unwrap();
    let mut told = String::new();
    let read = async {
        while !told.contains(what) {
            told.push(char::from(stderr.read_u8().await.unwrap()));
        }
    };
    tokio::time::timeout(SOON, read).await.unwrap();
}

#[tokio::test]
async fn ctrl_c_ends_a_fleet_that_runs_in_order_and_leaves_nothing() {
    let bench = Bench::new(&format!("answer='{{\"proxy\":\"127.0.0.1:1\"}}'; {READY}; {UNTIL_TERM}")).await;
    let mut child = bench.dev(&[]);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = tokio::time::timeout(SOON, lines.next_line()).await.unwrap().unwrap().unwrap();
    let told: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!((&told["deployment"], &told["nodes"][1]["proxy"]), (&"tiny".into(), &"127.0.0.1:1".into()));
    let data = PathBuf::from(told["data_dir"].as_str().unwrap());
    assert!(data.join("models/tiny.gguf").is_file());
    signal(&child, Signal::SIGINT);
    let (code, _, err) = parts(&end(child).await);
    assert_eq!(code, 0, "{err}");
    assert_eq!(
        bench.diary(),
        ["node-1 ended", "node-2 ended", "node-1 down", "node-2 down", "coordinator ended"],
        "{err}"
    );
    assert!(!data.exists() && !data.parent().unwrap().exists());
}

#[tokio::test]
async fn a_program_that_dies_is_named_with_its_last_words_and_the_rest_is_ended() {
    let bench = Bench::new(&format!("if [ $name = node-2 ]; then echo no GPU here; exit 3; fi; {UNTIL_TERM}")).await;
    let (code, out, err) = parts(&end(bench.dev(&[])).await);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.contains("node-2 ended unasked: exit code 3; the last lines of /"), "{err}");
    assert!(err.contains("\n  | no GPU here"), "{err}");
    let diary = bench.diary();
    assert!(diary.ends_with(&["node-1 down".into(), "node-2 down".into(), "coordinator ended".into()]), "{diary:?}");
}

#[tokio::test]
async fn a_signal_half_way_ends_what_was_started_and_a_second_one_hurries() {
    // Agents that never get ready and do not listen to SIGTERM.
    let bench = Bench::new("trap '' TERM; echo $name deaf >> DIARY; while :; do sleep 0.02; done").await;
    let mut child = bench.dev(&["--nodes", "1"]);
    until_told(&mut child, "agents: 0 of 1").await;
    let deaf = async {
        while bench.diary() != ["node-1 deaf"] {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, deaf).await.unwrap();
    signal(&child, Signal::SIGTERM);
    until_told(&mut child, "agents: ending").await;
    signal(&child, Signal::SIGINT);
    let (code, _, err) = parts(&end(child).await);
    assert_eq!(code, 143, "{err}");
    assert_eq!(bench.diary(), ["node-1 deaf", "node-1 down", "coordinator ended"], "{err}");
}

#[tokio::test]
async fn a_signal_while_the_store_starts_ends_the_store() {
    let bench = Bench::new("").await;
    // It never answers, and says when it has been told to end.
    bench.script("etcd", &format!("name=etcd; echo etcd started >> DIARY; {UNTIL_TERM}"));
    let mut child = bench.dev_on("etcd", &[]);
    let started = async {
        while bench.diary() != ["etcd started"] {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, started).await.unwrap();
    signal(&child, Signal::SIGINT);
    until_told(&mut child, "etcd: ending").await;
    let (code, _, err) = parts(&end(child).await);
    assert_eq!(code, 130, "{err}");
    assert_eq!(bench.diary(), ["etcd ended", "etcd started"], "{err}");
}

#[tokio::test]
async fn servers_that_can_not_be_taken_down_are_a_failure_and_their_records_are_kept() {
    let bench = Bench::new("").await;
    let body = format!(
        "if [ $1 = down ]; then echo a server hangs; exit 1; fi; \
         answer='{{\"proxy\":\"127.0.0.1:1\"}}'; {READY}; {UNTIL_TERM}"
    );
    bench.script("drover-agent", &body);
    let data = bench.dir.path().join("fleet");
    let child = bench.dev(&["--nodes", "1", "--timeout", "1", "--data-dir", &data.display().to_string()]);
    let mut child = child;
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    tokio::time::timeout(SOON, lines.next_line()).await.unwrap().unwrap().unwrap();
    signal(&child, Signal::SIGTERM);
    let (code, _, err) = parts(&end(child).await);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("not everything was ended") && err.contains("| a server hangs"), "{err}");
    assert!(data.join("agents").parent().unwrap().is_dir());
}
