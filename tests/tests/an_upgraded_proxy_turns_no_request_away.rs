//! SIGTERM of a host's proxy under load, as for its upgrade: the successor takes the listener over, and nothing fails.

use anyhow::{Context as _, ensure};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    load::{Load, two_models},
    programs::{eventually, processes_with},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::collections::BTreeSet;

const UPGRADES: usize = 4;

fn proxies(cluster: &Cluster) -> BTreeSet<i32> {
    let all = processes_with(&cluster.mark());
    all.into_iter().filter(|found| found.command.contains("drover-agent proxy ")).map(|found| found.pid).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgraded_proxy_turns_no_request_away() -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan::default()).await?;
    two_models(&cluster).await?;
    let load = Load::start(&cluster.coordinators[0].http, &["tiny", "other"], 4, 4).await?;
    let mut seen = proxies(&cluster);
    for _ in 0..UPGRADES {
        eventually("streams run", SOON, async || {
            ensure!(load.streaming() >= 4, "{} do", load.streaming());
            Ok(())
        })
        .await?;
        let last = *seen.iter().find(|pid| proxies(&cluster).contains(pid)).context("no proxy")?;
        let begun = std::time::Instant::now();
        kill(Pid::from_raw(last), Signal::SIGTERM)?;
        eventually("only the successor is left", SOON * 2, async || {
            let now = proxies(&cluster);
            ensure!(now.len() == 1 && !now.contains(&last), "{now:?} after {last}");
            Ok(())
        })
        .await?;
        seen = proxies(&cluster);
        eprintln!("pid {last} was gone {:?} after the signal", begun.elapsed());
    }
    let tally = load.end().await;
    eprintln!("{} streams and {} requests over {UPGRADES} upgrades", tally.streams, tally.requests);
    ensure!(tally.wrong.is_empty() && tally.told.is_empty(), "{tally:#?}\n{}", cluster.logs());
    ensure!(tally.streams >= UPGRADES && tally.requests >= UPGRADES, "{tally:?}");
    cluster.delete("tiny").await?;
    cluster.delete("other").await?;
    cluster.end().await
}
