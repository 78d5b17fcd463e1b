//! Runs with faults injected, on real parts. Each is a function: a test of tests/tests calls it in its short form,
//! `tests/run faults NAME` at full length.
//!
//! All of them judge alike: [`Servers`](crate::servers::Servers) says that each server that was wanted and not superseded
//! lives under its old pid, [`Judge`](crate::judge::Judge) that no claim was ever written over another, and
//! [`checker`](crate::checker) that nothing else in the store's history breaks an invariant.

pub mod outage;
pub mod pause;
pub mod restart;

use crate::{checker, cluster::Cluster, judge::Judge, programs::eventually, servers::Servers};
use anyhow::{Context as _, ensure};
use drover_proto::v1::{Instance, InstanceState, Token};
use std::{collections::BTreeMap, time::Duration};

/// What an instance must keep over a fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Node that owns it.
    pub node: String,
    /// Process id.
    pub pid: i64,
    /// Token of its claim.
    pub token: Token,
    /// Restarts under this claim.
    pub restarts: i32,
}

/// A fleet with its judges.
#[derive(Debug)]
pub struct Watched {
    /// The fleet.
    pub cluster: Cluster,
    /// Of the processes.
    pub servers: Servers,
    /// Of the store.
    pub judge: Judge,
    /// Keys of the store before anything was deployed, without the rings of events that outlive a deployment.
    base: Vec<String>,
}

impl Watched {
    /// Begins to watch a fleet on which nothing is deployed yet.
    ///
    /// # Errors
    /// When the store can't be read.
    pub fn new(cluster: Cluster) -> anyhow::Result<Self> {
        let judge = Judge::start(&cluster.etcd.endpoints()[0])?;
        let servers = Servers::of(&cluster)?;
        let base = keys(&cluster)?;
        Ok(Self { cluster, servers, judge, base })
    }

    /// All instances that are ready, by id.
    ///
    /// # Errors
    /// When no coordinator answers, or when one is not ready.
    pub async fn standing(&self) -> anyhow::Result<BTreeMap<String, Standing>> {
        let instances = self.cluster.instances().await?;
        let standing = instances.into_iter().map(|instance| {
            ensure!(instance.state() == InstanceState::Ready, "{instance:?}");
            let Instance { id, node, pid, token, restarts, .. } = instance;
            Ok((id, Standing { node, pid, token: token.context("a ready instance has a token")?, restarts }))
        });
        standing.collect()
    }

    /// Waits until what stands is as `good` says.
    ///
    /// # Errors
    /// When it is not in time; with what stands and the ends of all logs.
    pub async fn stands(
        &self,
        what: &str,
        within: Duration,
        good: impl Fn(&BTreeMap<String, Standing>) -> bool,
    ) -> anyhow::Result<BTreeMap<String, Standing>> {
        let outcome = eventually(what, within, async || {
            let now = self.standing().await?;
            ensure!(good(&now), "{now:#?}");
            Ok(now)
        });
        outcome.await.with_context(|| self.cluster.logs())
    }

    /// No server ended that should have lived, no claim was written over another, and the history breaks no invariant.
    ///
    /// # Errors
    /// Says which.
    pub fn verdict(&self) -> anyhow::Result<()> {
        self.servers.verdict().with_context(|| self.cluster.logs())?;
        let claims = self.judge.claims();
        ensure!(claims.second_owners == 0, "claims were written over standing ones: {claims:?}");
        let broken = self.broken();
        ensure!(broken.is_empty(), "the history of the store breaks invariants: {broken:#?}");
        Ok(())
    }

    /// What in the store's history so far breaks an invariant.
    #[must_use]
    pub fn broken(&self) -> Vec<String> {
        checker::violations(&self.judge.changes(), self.cluster.session_ttl())
    }

    /// Deletes these deployments, looks whether the store is as before, and ends everything.
    ///
    /// # Errors
    /// Says what is left.
    pub async fn end(self, deployments: &[&str]) -> anyhow::Result<()> {
        for deployment in deployments {
            self.cluster.delete(deployment).await?;
        }
        eventually("the store is as before", Duration::from_secs(10), async || {
            let now = keys(&self.cluster)?;
            ensure!(now == self.base, "{now:#?}, and before: {:#?}", self.base);
            Ok(())
        })
        .await?;
        self.cluster.end().await
    }
}

fn keys(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    // Who leads, and who has a session, may be just changing; rings of the fleet and its nodes stay.
    let passing = |key: &String| {
        ["leader", "sessions/", "events/fleet/", "events/node/"].iter().any(|prefix| key.starts_with(prefix))
    };
    Ok(cluster.etcd.keys()?.into_iter().filter(|key| !passing(key)).collect())
}

/// Without what a re-claim changes.
fn processes(standing: &BTreeMap<String, Standing>) -> BTreeMap<&String, (&String, i64, i32)> {
    standing.iter().map(|(id, s)| (id, (&s.node, s.pid, s.restarts))).collect()
}
