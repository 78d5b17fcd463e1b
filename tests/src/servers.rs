//! The sentence that every fault run ends with: each llama-server that was wanted and not superseded lives under its old
//! pid.
//!
//! Owns: a sampler, which looks at the processes of a fleet and asks its coordinators ten times a second, for as long as
//! the value lives. It is asked beside whatever happens to the fleet: what can't be asked meanwhile is asked again.

use crate::{
    cluster::{Cluster, SECRET},
    measure::{Kind, programs_of, start_ticks},
};
use anyhow::ensure;
use drover_proto::{
    transport::{Secret, Security, Target},
    v1::{Instance, InstanceState, ListInstancesRequest, Token, fleet_service_client::FleetServiceClient},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};
use tokio::{task::JoinSet, time::timeout};

const INTERVAL: Duration = Duration::from_millis(100);
const ANSWER: Duration = Duration::from_secs(1);

/// A llama-server of a fleet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Server {
    /// Id of its instance.
    pub instance: String,
    /// Process id.
    pub pid: u32,
    /// When it began, in clock ticks since boot: with the pid it names a process.
    started: u64,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.instance, self.pid)
    }
}

/// The servers of a fleet, watched.
#[derive(Debug)]
pub struct Servers {
    seen: Arc<Mutex<Seen>>,
    folder: PathBuf,
    _tasks: JoinSet<()>,
}

/// What coordinators said of a process of an instance.
#[derive(Debug, Clone, Copy, Default)]
struct Told {
    /// The highest token that it ran under.
    token: Token,
    /// Since when it has been ready, the first time.
    ready: Option<SystemTime>,
}

/// PURE. What was seen so far.
#[derive(Debug, Default)]
struct Seen {
    told: BTreeMap<(String, u32), Told>,
    /// Instances that are wanted no more, or gone.
    unwanted: BTreeSet<String>,
    living: BTreeSet<Server>,
    /// Those that have ended, and when that was seen first.
    ended: BTreeMap<Server, SystemTime>,
    /// Processes that the test itself has ended.
    ended_on_purpose: BTreeSet<u32>,
    /// Servers of one instance that lived at the same time.
    beside: BTreeSet<Vec<Server>>,
}

impl Servers {
    /// Begins to watch the servers of a fleet.
    ///
    /// # Errors
    /// When an address of a coordinator is none.
    pub fn of(cluster: &Cluster) -> anyhow::Result<Self> {
        let (seen, folder) = (Arc::<Mutex<Seen>>::default(), cluster.folder().to_owned());
        let mut tasks = JoinSet::new();
        let security = Security { secret: Secret::new(SECRET), allow_plaintext: false };
        for coordinator in &cluster.coordinators {
            let target = Target::new(std::slice::from_ref(&coordinator.grpc), &security, None)?;
            tasks.spawn(ask(target, seen.clone()));
        }
        let watched = Self { seen, folder, _tasks: JoinSet::new() };
        watched.look();
        let (seen, folder) = (watched.seen.clone(), watched.folder.clone());
        tasks.spawn(async move {
            loop {
                tokio::time::sleep(INTERVAL).await;
                look(&folder, &seen);
            }
        });
        Ok(Self { _tasks: tasks, ..watched })
    }

    fn look(&self) {
        look(&self.folder, &self.seen);
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }

    /// The servers that live now.
    #[must_use]
    pub fn living(&self) -> BTreeSet<Server> {
        self.look();
        self.seen().living.clone()
    }

    /// Says that the test itself ends a process.
    pub fn end_on_purpose(&self, pid: u32) {
        self.seen().ended_on_purpose.insert(pid);
    }

    /// Servers of one instance that were seen to live at the same time.
    #[must_use]
    pub fn beside(&self) -> BTreeSet<Vec<Server>> {
        self.seen().beside.clone()
    }

    /// Every server that was ready at any time lives, or its instance is wanted no more, or another one was ready under a
    /// higher token before it ended.
    ///
    /// # Errors
    /// Names each that has ended for no such reason.
    pub fn verdict(&self) -> anyhow::Result<()> {
        self.look();
        let wrong = self.seen().wrong();
        ensure!(wrong.is_empty(), "servers that were wanted and not superseded have ended:\n{}", wrong.join("\n"));
        Ok(())
    }
}

impl Seen {
    fn take_living(&mut self, living: BTreeSet<Server>, now: SystemTime) {
        for gone in self.living.difference(&living) {
            self.ended.entry(gone.clone()).or_insert(now);
        }
        let mut by_instance: BTreeMap<&str, Vec<Server>> = BTreeMap::new();
        for server in &living {
            by_instance.entry(&server.instance).or_default().push(server.clone());
        }
        self.beside.extend(by_instance.into_values().filter(|servers| servers.len() > 1));
        self.living = living;
    }

    /// Takes what one coordinator says; `shown`: what it has shown before.
    fn take_told(&mut self, instances: &[Instance], shown: &mut BTreeSet<String>) {
        let now: BTreeSet<String> = instances.iter().map(|i| i.id.clone()).collect();
        // Only what this one has shown itself: a coordinator that is cut off does not know what is newer.
        self.unwanted.extend(shown.difference(&now).cloned());
        *shown = now;
        for instance in instances {
            if !instance.wanted {
                self.unwanted.insert(instance.id.clone());
            }
            let Some(pid) = u32::try_from(instance.pid).ok().filter(|pid| *pid > 0) else { continue };
            let told = self.told.entry((instance.id.clone(), pid)).or_default();
            told.token = told.token.max(instance.token.unwrap_or_default());
            if instance.state() == InstanceState::Ready && told.ready.is_none() {
                told.ready = Some(instance.since.and_then(|s| s.try_into().ok()).unwrap_or_else(SystemTime::now));
            }
        }
    }

    fn wrong(&self) -> Vec<String> {
        let ended = self.ended.iter().filter(|(server, _)| !self.ended_on_purpose.contains(&server.pid));
        ended.filter_map(|(server, at)| self.wrongly_ended(server, *at)).collect()
    }

    /// Why the end of a server was wrong, if it was.
    fn wrongly_ended(&self, server: &Server, at: SystemTime) -> Option<String> {
        let told = self.told.get(&(server.instance.clone(), server.pid)).filter(|told| told.ready.is_some())?;
        if self.unwanted.contains(&server.instance) {
            return None;
        }
        let others = self.told.iter().filter(|((id, pid), _)| *id == server.instance && *pid != server.pid);
        // Its end lies within one look before it was seen.
        let superseded = |other: &Told| other.token > told.token && other.ready.is_some_and(|ready| ready <= at);
        let others: Vec<_> = others.collect();
        if others.iter().any(|(_, other)| superseded(other)) {
            return None;
        }
        let others: Vec<String> = others
            .iter()
            .map(|((_, pid), other)| format!("pid {pid} under {}, ready since {:?}", other.token, other.ready))
            .collect();
        Some(format!("  {server} under {}, seen to have ended at {at:?}; others of it: {others:?}", told.token))
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn look(folder: &Path, seen: &Mutex<Seen>) {
    let servers = programs_of(folder, None).into_iter().filter(|program| program.kind == Kind::Server);
    let living = servers.filter_map(|program| {
        // One that ends in this moment has no start time any more.
        let started = start_ticks(program.pid)?;
        Some(Server { instance: program.name, pid: program.pid, started })
    });
    let living = living.collect();
    lock(seen).take_living(living, SystemTime::now());
}

/// Asks one coordinator again and again, whether or not it answers.
async fn ask(target: Target, seen: Arc<Mutex<Seen>>) {
    let mut shown = BTreeSet::new();
    let mut client = FleetServiceClient::new(target.connect_lazy());
    loop {
        let request = ListInstancesRequest { page_size: 1000, ..ListInstancesRequest::default() };
        if let Ok(Ok(answer)) = timeout(ANSWER, client.list_instances(request)).await {
            lock(&seen).take_told(&answer.into_inner().instances, &mut shown);
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn server(pid: u32) -> Server {
        Server { instance: "m-1".to_owned(), pid, started: 7 }
    }

    fn instance(pid: i64, revision: i64, state: InstanceState, since: u64) -> Instance {
        Instance {
            id: "m-1".to_owned(),
            token: Some(Token { generation: 1, revision }),
            pid,
            state: state.into(),
            since: Some(at(since).into()),
            wanted: true,
            ..Instance::default()
        }
    }

    /// One server, ready under token 5, seen to have ended at 20.
    fn ended(later: &[Instance]) -> Seen {
        let (mut seen, mut shown) = (Seen::default(), BTreeSet::new());
        seen.take_living(BTreeSet::from([server(1)]), at(9));
        seen.take_told(&[instance(1, 5, InstanceState::Ready, 10)], &mut shown);
        seen.take_living(BTreeSet::new(), at(20));
        seen.take_told(later, &mut shown);
        seen
    }

    #[test]
    fn a_server_may_end_only_when_another_was_ready_under_a_higher_token_before() {
        let wrong = |later: Instance| ended(&[later]).wrong().len();
        assert_eq!(wrong(instance(0, 5, InstanceState::Backoff, 20)), 1, "nothing has taken its place");
        assert_eq!(wrong(instance(2, 9, InstanceState::Ready, 19)), 0);
        assert_eq!(wrong(instance(2, 9, InstanceState::Ready, 21)), 1, "ready too late");
        assert_eq!(wrong(instance(2, 9, InstanceState::Loading, 15)), 1, "not ready");
        assert_eq!(wrong(instance(2, 5, InstanceState::Ready, 15)), 1, "under no higher token");
        assert_eq!(wrong(Instance { wanted: false, ..instance(0, 5, InstanceState::Stopped, 20) }), 0);
        assert_eq!(ended(&[]).wrong().len(), 0, "its instance is gone");
        let mut on_purpose = ended(&[instance(0, 5, InstanceState::Backoff, 20)]);
        on_purpose.ended_on_purpose.insert(1);
        assert!(on_purpose.wrong().is_empty());
    }

    #[test]
    fn a_coordinator_that_never_knew_of_an_instance_does_not_say_that_it_is_gone() {
        let mut seen = ended(&[instance(0, 5, InstanceState::Backoff, 20)]);
        seen.take_told(&[], &mut BTreeSet::new());
        assert_eq!(seen.wrong().len(), 1);
    }

    #[test]
    fn servers_of_one_instance_beside_each_other_are_remembered() {
        let mut seen = Seen::default();
        seen.take_living(BTreeSet::from([server(1), Server { instance: "m-2".to_owned(), ..server(3) }]), at(1));
        assert!(seen.beside.is_empty());
        seen.take_living(BTreeSet::from([server(1), server(2)]), at(2));
        assert_eq!(seen.beside, BTreeSet::from([vec![server(1), server(2)]]));
    }
}
