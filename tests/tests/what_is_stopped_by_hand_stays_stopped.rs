//! Stopped by hand, by its id, by name or with all of its node, an instance does not come back until its deployment is
//! scaled; everything else goes on; and who stopped what, why and how it ended is told when the instance is gone.

use anyhow::{Context as _, ensure};
use drover_proto::v1::{Instance, ScaleDeploymentRequest};
use drover_tests::{
    alone,
    by_hand::Foreign,
    cluster::{Cluster, Plan, SOON},
    programs::{eventually, servers_with},
};
use serde_json::Value;
use std::collections::BTreeSet;

#[test]
fn what_is_stopped_by_hand_stays_stopped() -> anyhow::Result<()> {
    alone::run("what_is_stopped_by_hand_stays_stopped", whole())
}

async fn whole() -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan { coordinators: 2, agents: 2, ..Plan::default() }).await?;
    let tiny = cluster.deploy(cluster.spec("tiny", 4)).await?;
    let other = cluster.deploy(cluster.spec("other", 2)).await?;
    ensure!(nodes(&tiny) == ["a", "b"].map(str::to_owned).into(), "they are spread: {tiny:#?}");

    one_is_not_replaced(&cluster, &tiny).await?;
    a_name_is_stopped_on_all_nodes(&cluster, &other).await?;
    all_of_a_node_leave_the_other_alone(&cluster).await?;
    what_ended_is_told_still(&cluster, &tiny).await?;

    cluster.delete("tiny").await?;
    cluster.delete("other").await?;
    cluster.end().await
}

fn nodes(instances: &[Instance]) -> BTreeSet<String> {
    instances.iter().map(|i| i.node.clone()).collect()
}

fn pids(instances: &[Instance]) -> BTreeSet<i64> {
    instances.iter().map(|i| i.pid).collect()
}

/// What was done to a process, and all that is said of it.
type Outcome = (String, Value);

/// Runs `drover processes stop`; its exit code, and the results by what was done.
fn stop(cluster: &Cluster, words: &[&str]) -> anyhow::Result<(Option<i32>, Vec<Outcome>)> {
    let words = [&["processes", "stop"], words, &["-o", "json"]].concat();
    let (code, out, err) = cluster.drover(1, &words)?;
    let answer: Value = serde_json::from_str(&out).with_context(|| format!("{out}{err}"))?;
    let results = answer["results"].as_array().context("no results")?.clone();
    let action = |r: &Value| r["action"].as_str().unwrap_or_default().trim_start_matches("PROCESS_ACTION_").to_owned();
    Ok((code, results.into_iter().map(|r| (action(&r), r)).collect()))
}

async fn scale(cluster: &Cluster, name: &str, replicas: i32) -> anyhow::Result<()> {
    let request = ScaleDeploymentRequest { name: name.to_owned(), replicas: Some(replicas), generation: 0 };
    cluster.client(0).await?.scale_deployment(request).await?;
    Ok(())
}

/// Waits until just these servers run.
async fn servers(cluster: &Cluster, expected: &BTreeSet<i64>) -> anyhow::Result<()> {
    eventually("just these servers run", SOON, async || {
        let now: BTreeSet<i64> = servers_with(&cluster.mark()).iter().map(|found| i64::from(found.pid)).collect();
        ensure!(now == *expected, "{now:?}, not {expected:?}");
        Ok(())
    })
    .await
}

/// A plan was made and carried out after what was done before: a deployment of its own runs.
async fn the_reconciler_has_planned(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.deploy(cluster.spec("later", 1)).await?;
    cluster.delete("later").await
}

async fn one_is_not_replaced(cluster: &Cluster, tiny: &[Instance]) -> anyhow::Result<()> {
    let (code, results) = stop(cluster, &[&tiny[0].id, "--reason", "it is slow"])?;
    assert!(code == Some(0) && results.len() == 1 && results[0].0 == "DRAINING", "{results:?}");
    let told = results[0].1["message"].as_str().unwrap_or_default();
    assert!(told.contains("asks for 3 instead of 4"), "{told}");
    let left = cluster.ready("tiny", 3).await?;
    the_reconciler_has_planned(cluster).await?;
    assert_eq!(pids(&cluster.ready("tiny", 3).await?), pids(&left));
    let (code, again) = stop(cluster, &[&tiny[1].id])?;
    assert!(code == Some(0) && again[0].0 == "DRAINING", "{again:?}");
    cluster.ready("tiny", 2).await?;
    let (code, _, err) = cluster.drover(1, &["processes", "stop", &tiny[1].id])?;
    assert!(code == Some(1) && err.contains("no instance"), "it is gone: {err}");
    scale(cluster, "tiny", 4).await?;
    cluster.ready("tiny", 4).await.map(drop)
}

async fn a_name_is_stopped_on_all_nodes(cluster: &Cluster, other: &[Instance]) -> anyhow::Result<()> {
    let (code, results) = stop(cluster, &["--name", "tiny", "--reason", "the name is to go"])?;
    let stopped: BTreeSet<&str> = results.iter().filter_map(|(_, r)| r["process"]["node"].as_str()).collect();
    assert!(code == Some(0) && results.len() == 4 && stopped == ["a", "b"].into(), "{results:?}");
    cluster.ready("tiny", 0).await?;
    servers(cluster, &pids(other)).await?;
    the_reconciler_has_planned(cluster).await?;
    servers(cluster, &pids(other)).await?;
    assert_eq!(cluster.deployment("tiny").await?.replicas, 0);
    let (code, _, err) = cluster.drover(1, &["processes", "stop", "--name", "nothing"])?;
    assert!(code == Some(1) && err.contains("has the name nothing"), "{err}");
    scale(cluster, "tiny", 4).await?;
    cluster.ready("tiny", 4).await.map(drop)
}

async fn all_of_a_node_leave_the_other_alone(cluster: &Cluster) -> anyhow::Result<()> {
    let mut foreign = Foreign::start(cluster, "by-hand", "key")?;
    let tiny = cluster.ready("tiny", 4).await?;
    let other = cluster.ready("other", 2).await?;
    let all = [tiny, other].concat();
    let on = |node: &str| all.iter().filter(|i| i.node == node).cloned().collect::<Vec<_>>();
    let (code, results) = stop(cluster, &["--node", "a", "--all", "--force", "--reason", "the host is to rest"])?;
    let count = |action: &str| results.iter().filter(|(a, _)| a == action).count();
    assert_eq!((count("ENDED") + count("DRAINING"), count("WOULD_END")), (on("a").len(), 1), "{results:#?}");
    assert!(count("ENDED") > 0 && code == Some(1), "the foreign one was not confirmed: {results:#?}");
    let mut left = pids(&on("b"));
    left.insert(foreign.pid());
    servers(cluster, &left).await?;
    the_reconciler_has_planned(cluster).await?;
    servers(cluster, &left).await?;
    let asked = cluster.deployment("tiny").await?.replicas + cluster.deployment("other").await?.replicas;
    assert_eq!(usize::try_from(asked)?, on("b").len());

    let (code, results) = stop(cluster, &["--node", "a", "--all", "--yes"])?;
    assert!(code == Some(0) && results.len() == 1 && results[0].0 == "ENDED", "{results:#?}");
    assert!(!foreign.lives()?);
    servers(cluster, &pids(&on("b"))).await
}

async fn what_ended_is_told_still(cluster: &Cluster, tiny: &[Instance]) -> anyhow::Result<()> {
    let events = |object: &str| cluster.drover(0, &["events", "--object", object]).map(|(_, out, _)| out);
    let gone = &tiny[0];
    let object = format!("instance/{}", gone.id);
    for (place, about) in [(object.as_str(), &object), (format!("node/{}", gone.node).as_str(), &gone.id)] {
        let told = eventually("its end is told", SOON, async || {
            let told = events(place)?;
            let has = |words: &[&str]| told.lines().any(|line| words.iter().all(|word| line.contains(word)));
            ensure!(has(&[about, "StoppedByHand", "an operator at", "because: it is slow"]), "{place}: {told}");
            let started = ["Loading", "Ready"].map(|state| has(&[about, state, &format!("pid {}", gone.pid)]));
            ensure!(started.contains(&true), "{place}: {told}");
            ensure!(has(&[about, "Stopped", "exit code 0"]), "{place}: {told}");
            Ok(told)
        })
        .await?;
        let once = told.lines().filter(|line| line.contains(about) && line.contains("StoppedByHand")).count();
        assert_eq!(once, 1, "{place}: {told}");
    }
    let told = events("deployment/tiny")?;
    assert!(told.contains("from 4 to 3 replicas, because: it is slow") && !told.contains(&object), "{told}");
    let told = events("node/a")?;
    assert!(told.contains("has all of the node stopped") && told.contains("the host is to rest"), "{told}");
    let all = events("")?;
    assert_eq!(all.lines().filter(|l| l.contains(&object) && l.contains("StoppedByHand")).count(), 1, "{all}");
    Ok(())
}
