//! etcd is away, killed or halted, for longer than any lease lives: serving goes on, changes are refused with a clear error,
//! nothing is moved, and everything is as before when it is back.

use super::{Standing, Watched, processes};
use crate::{
    cluster::{Cluster, Plan, SOON},
    gateway::Gateway,
    load::Load,
    measure::{Kind, Usage, programs},
    programs::eventually,
};
use anyhow::{Context as _, ensure};
use drover_proto::{
    status,
    v1::{ApplyDeploymentRequest, InstanceState},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use tokio::time::sleep;

/// Time to live of sessions, which also is the grace period after the outage.
const TTL: Duration = Duration::from_secs(10);
/// Requests under way at a time.
const CLIENTS: usize = 3;
/// Pause after each.
const PAUSE: Duration = Duration::from_millis(300);
/// Longest answer to a change that can't be made.
const REFUSED_WITHIN: Duration = Duration::from_secs(6);
/// What a program may use more at the end of the outage than at its begin.
const GROWTH_KB: u64 = 20 << 10;

/// How etcd goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum How {
    /// SIGKILL, and started again on the same data: leases come back with their whole time, so sessions are resumed.
    Kill,
    /// SIGSTOP: when it goes on it ends all leases at once, so every server is claimed again in its place.
    Stop,
}

/// Runs it, with an outage that lasts so long.
///
/// # Errors
/// Says what was not as it must be.
pub async fn run(how: How, lasts: Duration) -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan { coordinators: 2, agents: 2, ..Plan::default() }).await?;
    let mut fleet = Watched::new(cluster)?;
    fleet.cluster.deploy(fleet.cluster.spec("steady", 4)).await?;
    let before = fleet.standing().await?;
    let load = Load::paced(&fleet.cluster.coordinators[0].http, &["steady"], 1, CLIENTS - 1, PAUSE).await?;
    let used = usage(&fleet.cluster)?;

    match how {
        How::Kill => drop(fleet.cluster.etcd.kill()?),
        How::Stop => fleet.cluster.etcd.stop()?,
    }
    let begun = Instant::now();
    outage_is_told(&fleet.cluster).await.context("etcd is away")?;
    sleep((lasts / 2).saturating_sub(begun.elapsed())).await;
    // A server that dies now can't be started again before the end of it: nothing may be claimed or started.
    let victim = before.iter().next().map(|(id, standing)| (id.clone(), standing.clone())).context("one stands")?;
    end_server(&fleet, &victim.1)?;
    sleep(lasts.saturating_sub(begun.elapsed())).await;
    bounded(&used, &usage(&fleet.cluster)?)?;
    match how {
        How::Kill => fleet.cluster.etcd.restart().await?,
        How::Stop => fleet.cluster.etcd.cont()?,
    }
    let back = Instant::now();
    for coordinator in &fleet.cluster.coordinators {
        let gateway = Gateway::new(&coordinator.http);
        eventually("a coordinator is ready again", TTL, async || {
            let (status, said) = gateway.get("/readyz").await?;
            ensure!(status == 200, "{said}");
            Ok(())
        })
        .await?;
    }
    fleet.cluster.connected(2).await?;
    // A view that is not up to date yet shows what ended as it was.
    let stands = |id: &String, now: &Standing| {
        let b = &before[id];
        if *id == victim.0 { now.pid != b.pid } else { now.node == b.node && now.pid == b.pid }
    };
    let as_before =
        |now: &BTreeMap<String, Standing>| now.keys().eq(before.keys()) && now.iter().all(|(id, now)| stands(id, now));
    let after = fleet.stands("all stand where they stood", SOON * 2, as_before).await?;
    match how {
        How::Kill => ensure!(after.iter().all(|(id, now)| now.token == before[id].token), "{after:#?}"),
        How::Stop => ensure!(after.iter().all(|(id, now)| now.token > before[id].token), "{after:#?}"),
    }
    // What an outage makes late shows itself within the grace period and the time after it.
    sleep((TTL * 3).saturating_sub(back.elapsed())).await;
    let later = fleet.standing().await?;
    ensure!(processes(&later) == processes(&after), "something was moved afterwards: {later:#?}, before: {after:#?}");
    once_more(&fleet, &victim.0, &later[&victim.0]).await?;
    let tally = load.end().await;
    ensure!(tally.wrong.is_empty() && tally.requests > 0, "{tally:?}");
    // One server was killed twice, and with it what it was answering. While claims are gone there is no route.
    let told = tally.told.len();
    ensure!(how == How::Stop || told <= 2 * CLIENTS, "{told} requests failed: {:#?}", tally.told);
    let beside = fleet.servers.beside();
    ensure!(beside.is_empty(), "servers of one instance lived at the same time: {beside:?}");
    fleet.verdict()?;
    eprintln!(
        "{how:?} for {} s: {} streams and {} requests answered, {} failed with a word; every server lives",
        lasts.as_secs(),
        tally.streams,
        tally.requests,
        tally.told.len()
    );
    fleet.end(&["steady"]).await
}

/// Coordinators say what they can't do, and go on with what they can.
async fn outage_is_told(cluster: &Cluster) -> anyhow::Result<()> {
    for coordinator in &cluster.coordinators {
        let gateway = Gateway::new(&coordinator.http);
        eventually("a coordinator says that it is not ready", TTL, async || {
            let (status, said) = gateway.get("/readyz").await?;
            ensure!(status == 503 && said["reason"].is_string(), "{status} {said}");
            Ok(())
        })
        .await?;
        ensure!(gateway.get("/readyz/gateway").await?.0 == 200, "it routes");
    }
    let begun = Instant::now();
    let apply = ApplyDeploymentRequest { spec: Some(cluster.spec("more", 1)), generation: 0 };
    let refused = cluster.client(0).await?.apply_deployment(apply).await.err().context("a change was taken")?;
    ensure!(begun.elapsed() < REFUSED_WITHIN, "a change was refused after {:?}", begun.elapsed());
    let why = status::reason_of(&refused).unwrap_or_default();
    ensure!(
        [status::reason::STORE_UNAVAILABLE, status::reason::OUTCOME_UNKNOWN].contains(&why.as_str()),
        "{refused:?}"
    );
    let ready = cluster.instances().await?.iter().filter(|i| i.state() == InstanceState::Ready).count();
    ensure!(ready == 4, "{ready} instances are shown to be ready");
    Ok(())
}

/// Ends a server, which is started again: one end in minutes is no crash loop, however often that could not be done.
async fn once_more(fleet: &Watched, id: &str, standing: &Standing) -> anyhow::Result<()> {
    end_server(fleet, standing)?;
    fleet
        .stands("a server that ended once more is started again", SOON, |now| {
            now.get(id).is_some_and(|now| now.pid != standing.pid)
        })
        .await?;
    Ok(())
}

fn end_server(fleet: &Watched, standing: &Standing) -> anyhow::Result<()> {
    fleet.servers.end_on_purpose(u32::try_from(standing.pid)?);
    Ok(kill(Pid::from_raw(i32::try_from(standing.pid)?), Signal::SIGKILL)?)
}

/// Resident memory of coordinators and agents, in KiB.
fn usage(cluster: &Cluster) -> anyhow::Result<BTreeMap<String, u64>> {
    let ours = programs(cluster).into_iter().filter(|p| matches!(p.kind, Kind::Coordinator | Kind::Agent));
    ours.map(|program| Ok((program.to_string(), Usage::of(program.pid)?.rss_kb))).collect()
}

fn bounded(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> anyhow::Result<()> {
    for (program, kb) in after {
        let grown = kb.saturating_sub(before.get(program).copied().unwrap_or(0));
        ensure!(grown <= GROWTH_KB, "{program} uses {grown} KiB more than before the outage");
    }
    Ok(())
}
