//! The `drover` command against a real fleet: what it says, as a table and as JSON, and the exit code of each ending.

use anyhow::Context as _;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    programs::{eventually, program, servers_with},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_applies_waits_shows_and_deletes() -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan::default()).await?;
    let operator = Operator { cluster: &cluster };
    let tiny = operator.file("tiny", "name = 'tiny'\nmodel_path = 'tiny.gguf'\nreplicas = 2\nthreads = 1\n")?;
    applies_and_shows(&operator, &tiny)?;
    follows_and_scales(&operator).await?;
    answers(&operator)?;
    refuses(&operator, &tiny)?;
    says_why_not(&operator)?;

    let (code, out, err) = operator.run(&["delete", "tiny", "--wait"])?;
    assert_eq!((code, out.as_str()), (0, "deployment tiny is being deleted\ndeployment tiny is gone\n"), "{err}");
    assert_eq!(servers_with(&cluster.mark()), []);
    assert_eq!(operator.json(&["get", "deployments"])?["deployments"], serde_json::json!([]));
    cluster.end().await
}

fn applies_and_shows(operator: &Operator<'_>, tiny: &str) -> anyhow::Result<()> {
    let (code, out, err) = operator.run(&["apply", "-f", tiny, "--wait"])?;
    let told = "deployment tiny is created (generation 1)\ndeployment tiny is ready: 2 instances answer\n";
    assert_eq!((code, out.as_str()), (0, told), "{err}");
    assert!(err.contains("waiting until it is ready"), "progress is shown: {err}");
    let (code, out, err) = operator.run(&["apply", "-f", tiny])?;
    assert_eq!((code, out.as_str()), (0, "deployment tiny is unchanged (generation 1)\n"), "{err}");

    let (_, table, _) = operator.run(&["get", "deployments"])?;
    assert!(table.lines().any(|l| l.starts_with("tiny ") && l.contains("2/2")), "{table}");
    let one = operator.json(&["get", "deployments", "tiny"])?;
    assert_eq!(
        (&one["generation"], &one["ready_replicas"], &one["spec"]["threads"]),
        (&1.into(), &2.into(), &1.into())
    );
    let (_, table, _) = operator.run(&["get", "instances"])?;
    assert_eq!(table.lines().filter(|l| l.starts_with("tiny-") && l.contains("READY")).count(), 2, "{table}");
    let (_, table, _) = operator.run(&["get", "nodes"])?;
    assert!(table.lines().any(|l| l.starts_with("a ") && l.contains("connected")), "{table}");
    assert_eq!(operator.json(&["get", "nodes", "a"])?["instances"], 2);

    let instances = operator.json(&["get", "instances", "--deployment", "tiny", "--node", "a"])?;
    let mut shown: Vec<i64> = instances["instances"].as_array().into_iter().flatten().filter_map(pid).collect();
    let mut running: Vec<i64> = servers_with(&operator.cluster.mark()).iter().map(|f| f.pid.into()).collect();
    shown.sort_unstable();
    running.sort_unstable();
    assert_eq!(shown, running, "the pids shown are those of the llama-servers");
    Ok(())
}

async fn follows_and_scales(operator: &Operator<'_>) -> anyhow::Result<()> {
    let mut events = operator.follow("events", &["events", "--follow", "--object", "deployment/tiny"])?;
    events.tells("Applied").await?;
    let (code, out, err) = operator.run(&["scale", "tiny", "1", "--wait"])?;
    let told = "deployment tiny is scaled to 1 (generation 2)\ndeployment tiny is ready: 1 instance answers\n";
    assert_eq!((code, out.as_str()), (0, told), "{err}");
    assert_eq!(servers_with(&operator.cluster.mark()).len(), 1, "the other one has ended");
    events.tells("Scaled").await?;
    assert_eq!(events.interrupt().await?, 130);

    let instances = operator.json(&["get", "instances"])?;
    let id = instances["instances"][0]["id"].as_str().context("no instance")?.to_owned();
    let (code, out, err) = operator.run(&["logs", &id])?;
    assert!(code == 0 && out.contains("listening on unix://"), "{out}{err}");
    let mut logs = operator.follow("logs", &["logs", &id, "--follow", "--tail", "1"])?;
    eventually("the last line of the log is shown", SOON, async || {
        anyhow::ensure!(logs.text().lines().count() == 1, "{}", logs.text());
        Ok(())
    })
    .await?;
    let (code, _, err) = operator.run(&["chat", "tiny", "Hi", "--max-tokens", "3"])?;
    assert_eq!(code, 0, "{err}");
    eventually("llama-server's lines about the request follow", SOON, async || {
        anyhow::ensure!(logs.text().lines().count() > 1, "{}", logs.text());
        Ok(())
    })
    .await?;
    assert_eq!(logs.interrupt().await?, 130);

    let applied = operator.run(&["events", "--object", "deployment/tiny", "--output", "json"])?.1;
    let lines: Vec<Value> = applied.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let reasons: Vec<_> = lines.iter().map(|e| e["reason"].as_str().unwrap_or_default()).collect();
    assert_eq!(reasons, ["Applied", "Scaled"]);
    assert!(lines.iter().all(|e| e["trace_id"].as_str().is_some_and(|t| t.len() == 32)), "{applied}");
    Ok(())
}

fn answers(operator: &Operator<'_>) -> anyhow::Result<()> {
    let chat = ["chat", "tiny", "Say hello.", "--max-tokens", "24", "--temperature", "0", "--seed", "1"];
    let (code, first, err) = operator.run(&chat)?;
    assert!(code == 0 && first.trim().len() > 8, "{first:?} {err}");
    assert_eq!(operator.run(&chat)?.1, first, "the same at temperature 0");
    let (code, out, err) = operator.run(&["chat", "absent", "Hi"])?;
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    assert!(err.contains("absent") && err.contains("tiny") && err.contains("404"), "{err}");
    Ok(())
}

/// Each ending with its code; nothing is printed to standard output, and one sentence says why.
fn refuses(operator: &Operator<'_>, tiny: &str) -> anyhow::Result<()> {
    let bad = operator.file("bad", "name = 'bad'\nmodel_path = 'tiny.gguf'\nreplcas = 2\n")?;
    let cases: [(&[&str], i32, &[&str]); 9] = [
        (&["apply", "-f", tiny, "--generation", "9"], 1, &["GENERATION_MISMATCH", "generation 2", "9"]),
        (&["apply", "-f", tiny, "--generation", "0"], 1, &["ALREADY_EXISTS"]),
        (&["scale", "absent", "1"], 1, &["absent", "NOT_FOUND"]),
        (&["delete", "absent", "--wait"], 1, &["absent", "NOT_FOUND"]),
        (&["get", "instances", "absent-222222"], 1, &["absent-222222"]),
        (&["logs", "absent-222222"], 1, &["absent-222222", "NOT_FOUND"]),
        (&["apply", "-f", &bad], 2, &["bad.toml", "line 3", "replcas"]),
        (&["apply", "-f", "/absent.toml"], 2, &["/absent.toml"]),
        (&["get", "pods"], 2, &["pods", "deployments"]),
    ];
    for (words, code, parts) in cases {
        let (ended, out, err) = operator.run(words)?;
        assert_eq!((ended, out.as_str()), (code, ""), "{words:?}: {err}");
        assert!(parts.iter().all(|part| err.contains(part)), "{words:?}: {parts:?} in {err}");
    }
    // Port 1 of loopback: nobody listens there.
    let nowhere = |option: &str, words: &[&str]| operator.run(&[&[option, "127.0.0.1:1"], words].concat());
    for (code, out, err) in [
        nowhere("--coordinators", &["get", "nodes"])?,
        nowhere("--coordinators", &["scale", "tiny", "1"])?,
        nowhere("--gateway", &["chat", "tiny", "Hi"])?,
    ] {
        assert!(code == 3 && out.is_empty() && err.contains("127.0.0.1:1"), "{code} {out}{err}");
    }
    let coordinator = &operator.cluster.coordinators[0].grpc;
    let stranger = Command::new(program("drover"))
        .args(["--coordinators", coordinator, "get", "nodes"])
        .env_remove("DROVER_JOIN_SECRET_FILE")
        .output()?;
    let err = String::from_utf8_lossy(&stranger.stderr);
    assert!(stranger.status.code() == Some(1) && err.contains("UNAUTHENTICATED"), "{err}");
    assert_eq!(operator.json(&["get", "deployments", "tiny"])?["generation"], 2, "nothing was changed");
    Ok(())
}

/// `--wait` names the reason when a deployment does not come up.
fn says_why_not(operator: &Operator<'_>) -> anyhow::Result<()> {
    let file = operator.file("far", "name = 'far'\nmodel_path = 'tiny.gguf'\nnode_labels = { zone = 'moon' }\n")?;
    let (code, out, err) = operator.run(&["apply", "-f", &file, "--wait", "--timeout", "2"])?;
    assert_eq!((code, out.as_str()), (4, "deployment far is created (generation 1)\n"), "{err}");
    let last = err.lines().last().unwrap_or_default();
    assert!(last.contains("far was not ready within 2 s") && last.contains("zone=moon"), "{err}");

    let file = operator.file("vast", "name = 'vast'\nmodel_path = 'tiny.gguf'\nmemory_bytes = 1099511627776\n")?;
    let (code, _, err) = operator.run(&["apply", "-f", &file, "--wait", "--timeout", "4"])?;
    let last = err.lines().last().unwrap_or_default();
    assert!(code == 4 && last.contains("vast was not ready within 4 s") && last.contains("needed"), "{code}: {err}");

    // Declined by every node: the words are too short to be a model at all.
    fs::write(operator.cluster.folder().join("models/words.gguf"), "no model")?;
    let words = operator.file("words", "name = 'words'\nmodel_path = 'words.gguf'\n")?;
    let (code, err) = operator.apply_found(&words, &["--wait", "--timeout", "2"])?;
    let last = err.lines().last().unwrap_or_default();
    assert!(code == 4 && last.contains("words.gguf") && last.contains("GGUF"), "{code}: {err}");

    // Its header is whole, its weights are not: llama-server says so, and no wait helps.
    let model = fs::read(operator.cluster.model())?;
    fs::write(operator.cluster.folder().join("models/half.gguf"), &model[..model.len() / 2])?;
    let half = operator.file("half", "name = 'half'\nmodel_path = 'half.gguf'\n")?;
    let (code, err) = operator.apply_found(&half, &["--wait"])?;
    let last = err.lines().last().unwrap_or_default();
    assert!(code == 1 && last.contains("half does not become ready") && last.contains("half.gguf"), "{code}: {err}");

    for name in ["far", "vast", "words", "half"] {
        let (code, _, err) = operator.run(&["delete", name, "--wait"])?;
        assert_eq!(code, 0, "{err}");
    }
    Ok(())
}

fn pid(instance: &Value) -> Option<i64> {
    instance["pid"].as_i64()
}

/// Somebody with the command, the addresses and the secret.
struct Operator<'a> {
    cluster: &'a Cluster,
}

impl Operator<'_> {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(program("drover"));
        let coordinator = &self.cluster.coordinators[0];
        // Options given again in `words` win over the environment.
        command.env("DROVER_COORDINATORS", &coordinator.grpc).env("DROVER_GATEWAY", &coordinator.http);
        command.env("DROVER_JOIN_SECRET_FILE", self.cluster.folder().join("secret"));
        command.args(words).stdin(Stdio::null());
        command
    }

    /// Exit code, standard output, standard error.
    fn run(&self, words: &[&str]) -> anyhow::Result<(i32, String, String)> {
        let output = self.command(words).output()?;
        let code = output.status.code().with_context(|| format!("drover {words:?}: {}", output.status))?;
        Ok((code, String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?))
    }

    fn json(&self, words: &[&str]) -> anyhow::Result<Value> {
        let (code, out, err) = self.run(&[words, &["--output", "json"]].concat())?;
        anyhow::ensure!(code == 0, "drover {words:?}: {code}: {err}");
        Ok(serde_json::from_str(&out)?)
    }

    fn file(&self, name: &str, text: &str) -> anyhow::Result<String> {
        let path = self.cluster.folder().join(format!("{name}.toml"));
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    }

    /// `apply` of a model file that is new: nodes take a moment to see it, and until then it is refused as missing.
    fn apply_found(&self, file: &str, words: &[&str]) -> anyhow::Result<(i32, String)> {
        let deadline = std::time::Instant::now() + SOON;
        loop {
            let (code, _, err) = self.run(&[&["apply", "-f", file], words].concat())?;
            let unseen = err.contains("no connected node has");
            if !unseen || std::time::Instant::now() >= deadline {
                return Ok((code, err));
            }
        }
    }

    /// Starts a command that goes on until it is interrupted.
    fn follow(&self, name: &str, words: &[&str]) -> anyhow::Result<Following> {
        let log = self.cluster.folder().join(format!("{name}.followed"));
        let child = self.command(words).stdout(File::create(&log)?).stderr(Stdio::null()).spawn()?;
        Ok(Following { child, log })
    }
}

/// A command that follows something.
struct Following {
    child: Child,
    log: PathBuf,
}

impl Following {
    fn text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    async fn tells(&self, what: &str) -> anyhow::Result<()> {
        eventually(&format!("{what} is told"), SOON, async || {
            anyhow::ensure!(self.text().contains(what), "{}", self.text());
            Ok(())
        })
        .await
    }

    /// Ctrl-C; gives the exit code.
    async fn interrupt(&mut self) -> anyhow::Result<i32> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGINT)?;
        let status =
            eventually("it ends after Ctrl-C", SOON, async || self.child.try_wait()?.context("it runs")).await?;
        status.code().with_context(|| format!("ended with {status}"))
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
