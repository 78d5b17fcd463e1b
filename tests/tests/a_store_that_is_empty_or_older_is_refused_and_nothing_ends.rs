//! etcd comes back empty, and later as an older copy: coordinators say so loudly and decide nothing from it, servers go on and
//! answer. With its own content again all is as before; after a restore that was finished, every server whose instance the copy
//! knows is claimed again in its place.

use anyhow::{Context as _, ensure};
use drover_coordinator::store::{Store, etcd, restore};
use drover_proto::{
    status,
    v1::{ApplyDeploymentRequest, DeleteDeploymentRequest},
};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    etcd::Etcd,
    faults::{Standing, Watched},
    gateway::Gateway,
    load::ask,
    programs::eventually,
};
use serde_json::Value;
use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc, time::Duration};
use tokio::time::{Instant, sleep};

const TTL: Duration = Duration::from_secs(3);
/// What a single member calls itself: see [`Etcd`].
const PEER: &str = "http://127.0.0.1:0";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_empty_or_older_is_refused_and_nothing_ends() -> anyhow::Result<()> {
    let coordinator_toml = format!("session_ttl_ms = {}\nheartbeat_interval_ms = 500\n", TTL.as_millis());
    let plan = Plan { coordinators: 2, agents: 2, coordinator_toml, ..Plan::default() };
    let mut fleet = Watched::new(Cluster::start(plan).await?)?;
    fleet.cluster.deploy(fleet.cluster.spec("tiny", 2)).await?;
    let copy = fleet.cluster.folder().join("copy.db");
    fleet.cluster.etcd.ctl(&["snapshot", "save", &copy.display().to_string()])?;
    fleet.cluster.deploy(fleet.cluster.spec("later", 1)).await?;
    let before = fleet.standing().await?;

    let own = replaced(&mut fleet.cluster.etcd, None).await?;
    refused(&fleet, &before, "its content is lost").await.context("the store is empty")?;
    ensure!(fleet.cluster.etcd.keys()?.is_empty(), "something was written: {:?}", fleet.cluster.etcd.keys()?);
    // One that begins anew remembers what it has used.
    fleet.cluster.kill_coordinator(1)?;
    let begun = fleet.cluster.start_coordinator(1).await.err().context("a coordinator took an empty store")?;
    ensure!(format!("{begun:#}").contains("--new-store"), "{begun:#}");

    back(&mut fleet.cluster.etcd, &own).await?;
    fleet.cluster.start_coordinator(1).await?;
    let processes = |all: &BTreeMap<String, Standing>| -> Vec<_> {
        all.iter().map(|(id, s)| (id.clone(), s.node.clone(), s.pid)).collect()
    };
    fleet.stands("all is as before", SOON, |now| processes(now) == processes(&before)).await?;

    let own = replaced(&mut fleet.cluster.etcd, Some(&copy)).await?;
    refused(&fleet, &before, "it is an older copy").await.context("the store is an older copy")?;
    for n in 0..2 {
        fleet.cluster.stop_coordinator(n).await?;
    }
    let begun = fleet.cluster.start_coordinator(1).await.err().context("a coordinator took an older copy")?;
    ensure!(format!("{begun:#}").contains("it is an older copy"), "{begun:#}");
    fs::remove_dir_all(own)?;
    // What `restore` does last.
    let store: Store = Arc::new(etcd::Etcd::connect(etcd::Settings::new(fleet.cluster.etcd.endpoints())).await?);
    ensure!(restore::finish(&store, 0).await?.value.generation == 2);
    for n in 0..2 {
        fleet.cluster.start_coordinator(n).await?;
    }
    let known: BTreeMap<String, Standing> =
        before.iter().filter(|(id, _)| id.starts_with("tiny-")).map(|(id, s)| (id.clone(), s.clone())).collect();
    let after = fleet
        .stands("what the copy knows is claimed again in its place", SOON, |now| processes(now) == processes(&known))
        .await?;
    ensure!(after.values().all(|s| s.token.generation == 2), "{after:#?}");
    let unknown = before.iter().find(|(id, _)| id.starts_with("later-")).context("it stood")?.1.pid;
    sleep(TTL * 2).await;
    let lives = fleet.servers.living().iter().any(|server| i64::from(server.pid) == unknown);
    ensure!(lives, "a server of which the copy does not know was ended");
    // Here an operator ends it, with all of its host.
    fleet.servers.end_on_purpose(u32::try_from(unknown)?);
    fleet.servers.verdict()?;
    fleet.cluster.delete("tiny").await?;
    fleet.cluster.end().await
}

/// Puts another content in the place of the store's own: none, or that of a copy. Returns where its own is kept.
async fn replaced(etcd: &mut Etcd, copy: Option<&PathBuf>) -> anyhow::Result<PathBuf> {
    let (data, kept) = (etcd.folder().join("data"), etcd.folder().join("own"));
    etcd.kill()?;
    fs::rename(&data, &kept)?;
    if let Some(copy) = copy {
        let (copy, data, member) = (copy.display().to_string(), data.display().to_string(), format!("test={PEER}"));
        let words = ["snapshot", "restore", &copy, "--data-dir", &data, "--name", "test"];
        etcd.ctl(&[&words[..], &["--initial-cluster", &member, "--initial-advertise-peer-urls", PEER]].concat())?;
    }
    etcd.restart().await?;
    Ok(kept)
}

/// Puts the store's own content back.
async fn back(etcd: &mut Etcd, kept: &PathBuf) -> anyhow::Result<()> {
    etcd.kill()?;
    fs::remove_dir_all(etcd.folder().join("data"))?;
    fs::rename(kept, etcd.folder().join("data"))?;
    etcd.restart().await
}

/// Coordinators say why they do not use the store, for longer than any lease or grace period lasts; nothing ends, and requests
/// are answered.
async fn refused(fleet: &Watched, before: &BTreeMap<String, Standing>, why: &str) -> anyhow::Result<()> {
    for coordinator in &fleet.cluster.coordinators {
        let gateway = Gateway::new(&coordinator.http);
        eventually("a coordinator says why it does not use the store", SOON, async || {
            let (status, said) = gateway.get("/readyz").await?;
            ensure!(status == 503 && said["reason"].as_str().is_some_and(|said| said.contains(why)), "{status} {said}");
            Ok(())
        })
        .await?;
    }
    let (gateway, begun) = (Gateway::new(&fleet.cluster.coordinators[0].http), Instant::now());
    let revision = revision(&fleet.cluster.etcd)?;
    while begun.elapsed() < TTL * 3 {
        let apply = ApplyDeploymentRequest { spec: Some(fleet.cluster.spec("more", 1)), generation: 0 };
        let refused =
            fleet.cluster.client(0).await?.apply_deployment(apply).await.err().context("a change was taken")?;
        ensure!(status::reason_of(&refused).as_deref() == Some(status::reason::STORE_CHANGED), "{refused:?}");
        // Nor is anything said to be as asked, or not there, by what that store holds.
        let delete = DeleteDeploymentRequest { name: "later".to_owned(), ..DeleteDeploymentRequest::default() };
        let refused = fleet.cluster.client(0).await?.delete_deployment(delete).await.err().context("it was deleted")?;
        ensure!(status::reason_of(&refused).as_deref() == Some(status::reason::STORE_CHANGED), "{refused:?}");
        for model in ["tiny", "later"] {
            ask(&gateway, model).await.with_context(|| format!("{model} is served all the same"))?;
        }
        sleep(Duration::from_millis(500)).await;
    }
    // What hangs on leases of the copy goes by itself; nothing is put.
    let written = last_put(&fleet.cluster.etcd)?;
    ensure!(written <= revision, "something was written at {written}, after {revision}");
    let living = fleet.servers.living();
    for (id, standing) in before {
        ensure!(living.iter().any(|s| i64::from(s.pid) == standing.pid), "the server of {id} has ended");
    }
    Ok(())
}

fn revision(etcd: &Etcd) -> anyhow::Result<i64> {
    let found: Value = serde_json::from_str(&etcd.ctl(&["get", "/none", "-w", "json"])?)?;
    found["header"]["revision"].as_i64().context("an answer without a revision")
}

/// Revision of the last write that still stands; 0 where there is none.
fn last_put(etcd: &Etcd) -> anyhow::Result<i64> {
    let found: Value = serde_json::from_str(&etcd.ctl(&["get", "", "--prefix", "-w", "json"])?)?;
    let puts = found["kvs"].as_array().into_iter().flatten().filter_map(|kv| kv["mod_revision"].as_i64());
    Ok(puts.max().unwrap_or(0))
}
