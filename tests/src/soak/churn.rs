//! What an operator and bad luck do all the while: deployments come, change and go, servers are killed.

use super::Faults;
use drover_proto::{
    transport::Connection,
    v1::{
        ApplyDeploymentRequest, DeleteDeploymentRequest, DeploymentSpec, GetDeploymentRequest, Instance, InstanceState,
        ListInstancesRequest, ListNodesRequest, ListProcessesRequest, ScaleDeploymentRequest, WatchEventsRequest,
        fleet_service_client::FleetServiceClient,
    },
};
use drover_tests::{
    cluster::{Cluster, SOON},
    programs::eventually,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

/// Most deployments and most replicas of each at a time: servers of the churn must fit beside the steady ones.
const DEPLOYMENTS_MAX: usize = 3;
const REPLICAS_MAX: i32 = 3;
/// Longest pause between two operations, in milliseconds; half of it on average.
const PAUSE_MAX_MS: u64 = 1_200;
/// A call that takes longer has failed.
const CALL_DEADLINE: Duration = Duration::from_secs(20);

/// How often each thing was done. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Counts(Arc<Mutex<BTreeMap<&'static str, u64>>>);

impl Counts {
    /// One more.
    pub fn add(&self, what: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(what).or_default() += 1;
    }

    /// All so far.
    #[must_use]
    pub fn all(&self) -> BTreeMap<&'static str, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Their sum.
    #[must_use]
    pub fn sum(&self) -> u64 {
        self.all().values().sum()
    }
}

/// The churn.
pub struct Churn {
    random: StdRng,
    apis: Vec<FleetServiceClient<Connection>>,
    template: DeploymentSpec,
    /// What there is, with the number of replicas asked for.
    living: Vec<(String, i32)>,
    number: u64,
    names: watch::Sender<Vec<String>>,
    counts: Counts,
    faults: Faults,
}

impl Churn {
    /// Over all coordinators; tells `names` which deployments there are.
    pub async fn new(
        cluster: &Cluster,
        seed: u64,
        names: watch::Sender<Vec<String>>,
        faults: &Faults,
    ) -> anyhow::Result<Self> {
        let mut apis = Vec::new();
        for n in 0..cluster.coordinators.len() {
            apis.push(cluster.client(n).await?);
        }
        Ok(Self {
            random: StdRng::seed_from_u64(seed),
            apis,
            template: cluster.spec("", 1),
            living: Vec::new(),
            number: 0,
            names,
            counts: Counts::default(),
            faults: faults.clone(),
        })
    }

    /// How often each thing was done.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts.clone()
    }

    /// Works until then. `mark`: what the command lines of this fleet's servers contain.
    pub async fn work(&mut self, until: Instant, mark: &str) {
        while Instant::now() < until {
            let step = timeout(CALL_DEADLINE, self.step(mark)).await;
            match step {
                Ok(Ok(())) => {}
                Ok(Err(status)) => {
                    self.faults.add(format!("a call was refused: {} {}", status.code(), status.message()))
                }
                Err(_) => self.faults.add(format!("a call was not answered within {CALL_DEADLINE:?}")),
            }
            let pause = Duration::from_millis(self.random.random_range(0..PAUSE_MAX_MS));
            sleep(pause.min(until.saturating_duration_since(Instant::now()))).await;
        }
    }

    /// Deletes what there is, and waits until it is gone.
    pub async fn finish(&mut self) {
        for (name, _) in std::mem::take(&mut self.living) {
            let mut api = self.apis[0].clone();
            let gone = async {
                api.delete_deployment(DeleteDeploymentRequest { name: name.clone(), generation: 0 }).await?;
                eventually(&format!("{name} is gone"), SOON * 2, async || {
                    match api.get_deployment(GetDeploymentRequest { name: name.clone() }).await {
                        Err(status) if status.code() == tonic::Code::NotFound => Ok(()),
                        Err(status) => Err(status.into()),
                        Ok(answer) => anyhow::bail!("{:?}", answer.into_inner()),
                    }
                })
                .await
            };
            if let Err(error) = gone.await {
                self.faults.add(format!("the end of {name}: {error:#}"));
            }
        }
        self.tell();
    }

    async fn step(&mut self, mark: &str) -> Result<(), tonic::Status> {
        let which = self.random.random_range(0..self.apis.len());
        let mut api = self.apis[which].clone();
        let dice = self.random.random_range(0..100);
        if self.living.is_empty() || (dice < 25 && self.living.len() < DEPLOYMENTS_MAX) {
            self.number += 1;
            let (name, replicas) = (format!("churn-{}", self.number), self.random.random_range(1..=REPLICAS_MAX));
            let spec = DeploymentSpec { name: name.clone(), replicas: Some(replicas), ..self.template.clone() };
            self.counts.add("deployment applied");
            self.living.push((name, replicas));
            let applied = api.apply_deployment(ApplyDeploymentRequest { spec: Some(spec), generation: 0 }).await;
            self.tell();
            return applied.map(drop);
        }
        let chosen = self.random.random_range(0..self.living.len());
        match dice {
            0..35 => {
                let (name, _) = self.living.swap_remove(chosen);
                self.counts.add("deployment deleted");
                self.tell();
                api.delete_deployment(DeleteDeploymentRequest { name, generation: 0 }).await.map(drop)
            }
            35..65 => {
                let replicas = self.random.random_range(0..=REPLICAS_MAX);
                let up = replicas >= std::mem::replace(&mut self.living[chosen].1, replicas);
                self.counts.add(if up { "scaled up" } else { "scaled down" });
                let name = self.living[chosen].0.clone();
                let request = ScaleDeploymentRequest { name, replicas: Some(replicas), generation: 0 };
                api.scale_deployment(request).await.map(drop)
            }
            65..90 => {
                let name = self.living[chosen].0.clone();
                let request = ListInstancesRequest { deployment: name, ..ListInstancesRequest::default() };
                let instances = api.list_instances(request).await?.into_inner().instances;
                let ready: Vec<&Instance> = instances.iter().filter(|i| i.state() == InstanceState::Ready).collect();
                if !ready.is_empty() && kill_server(ready[self.random.random_range(0..ready.len())], mark) {
                    self.counts.add("server killed");
                }
                Ok(())
            }
            _ => {
                self.counts.add("looked at");
                look(&mut api).await
            }
        }
    }

    fn tell(&self) {
        self.names.send_replace(self.living.iter().filter(|(_, n)| *n > 0).map(|(name, _)| name.clone()).collect());
    }
}

/// Kills an instance's server, if the pid is still that of a server of this fleet.
fn kill_server(instance: &Instance, mark: &str) -> bool {
    let line = std::fs::read(format!("/proc/{}/cmdline", instance.pid)).unwrap_or_default();
    let line = String::from_utf8_lossy(&line);
    let ours = line.contains(mark) && line.contains(&instance.id);
    ours && i32::try_from(instance.pid).is_ok_and(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok())
}

/// What an operator looks at.
async fn look(api: &mut FleetServiceClient<Connection>) -> Result<(), tonic::Status> {
    api.list_nodes(ListNodesRequest::default()).await?;
    api.list_processes(ListProcessesRequest::default()).await?;
    let mut events = api.watch_events(WatchEventsRequest::default()).await?.into_inner();
    while events.message().await?.is_some() {}
    Ok(())
}
