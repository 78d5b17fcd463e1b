//! A server that somebody started by hand, which ignores SIGTERM as its child does: left alone until it is confirmed, told
//! to end, and killed with its child when that is forced; its starter and the fleet's servers go on.

use anyhow::{Context as _, ensure};
use drover_tests::{
    alone,
    by_hand::Foreign,
    cluster::{Cluster, Plan, SOON},
    programs::{eventually, processes_with},
};

const STUBBORN: &str =
    "trap '' TERM; (trap '' TERM; exec -a drover-test-child sleep 601) & while :; do wait; sleep 1; done";

/// How many of its children live; its own command line names them too.
fn children() -> usize {
    processes_with("drover-test-child").iter().filter(|found| found.command.starts_with("drover-test-child")).count()
}

#[test]
fn orphans_end_with_all_that_they_started() -> anyhow::Result<()> {
    alone::run("orphans_end_with_all_that_they_started", whole())
}

async fn whole() -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan { coordinators: 1, agents: 1, ..Plan::default() }).await?;
    let owned = cluster.deploy(cluster.spec("tiny", 1)).await?;
    let mut foreign = Foreign::script(&cluster, "stubborn", STUBBORN, &["--alias", "by-hand", "--model", "/m/x.gguf"])?;
    let pid = foreign.pid().to_string();
    eventually("it is listed, and its child runs", SOON, async || {
        let (_, out, _) = cluster.drover(0, &["processes", "list"])?;
        ensure!(out.lines().any(|l| l.contains(&pid) && l.contains("FOREIGN") && l.contains("/m/x.gguf")), "{out}");
        ensure!(children() == 1, "no child");
        Ok(())
    })
    .await?;

    // By pid, and by the name that its command line tells: both only show it.
    let by_pid = ["processes", "stop", "--node", "a", "--pid", &pid];
    for words in [&by_pid[..], &["processes", "stop", "--name", "by-hand", "--force"]] {
        let (code, out, err) = cluster.drover(0, words)?;
        assert!(code == Some(1) && out.contains("WOULD END") && err.contains("--yes"), "{words:?}: {out}{err}");
        assert!(foreign.lives()?);
    }
    let (code, out, err) = cluster.drover(0, &["processes", "cleanup", "--force"])?;
    assert!(code == Some(0) && out.contains("WOULD END") && foreign.lives()?, "a dry run: {out}{err}");

    let (code, out, err) = cluster.drover(0, &[&by_pid[..], &["--yes"]].concat())?;
    assert!(code == Some(1) && out.contains("TOLD TO END") && out.contains("force"), "{out}{err}");
    assert!(err.contains("1 process has not ended"), "{err}");
    assert!(foreign.lives()? && children() == 1);

    let (code, out, err) = cluster.drover(0, &["processes", "cleanup", "--yes", "--force", "--reason", "stubborn"])?;
    assert!(code == Some(0) && out.contains("SIGKILL"), "{out}{err}");
    assert_eq!(foreign.signal().await?, Some(9));
    assert_eq!(children(), 0, "its child went with it");
    let (_, told, _) = cluster.drover(0, &["events", "--object", "node/a"])?;
    let told = told.lines().filter(|line| line.contains(&format!("pid {pid} "))).collect::<Vec<_>>().join("\n");
    assert!(
        told.contains("ProcessToldToEnd") && told.contains("ended by SIGKILL") && told.contains("stubborn"),
        "{told}"
    );

    let now = cluster.ready("tiny", 1).await?;
    assert_eq!(now[0].pid, owned.first().context("none")?.pid, "the instance was left alone");
    cluster.delete("tiny").await?;
    cluster.end().await
}
