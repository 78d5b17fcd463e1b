//! The host as an agent sees it: in the place of the real machine, its processes and its data plane.

use super::{Host, UNIT};
use crate::world::lock;
use async_trait::async_trait;
use drover_agent::{
    blocking, clock,
    host::processes::Work,
    instance::{
        adopt::{Left, Unsure},
        claim::Claim,
        context::Context,
        machine::{DataPlane, Machine, Process},
        run::{Failed, Run},
        state::{Ended, Health},
    },
    link::{offers::No, stored::Stored},
    mutant,
    proxy::Route,
};
use drover_proto::v1::Offer;
use drover_shim::{
    durable,
    record::{Directory, Record},
};
use std::{fmt, io, path::Path, sync::Arc, time::Duration};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

/// The host, for one agent.
#[derive(Debug)]
pub struct Here(pub Arc<Host>);

fn of(directory: &Directory) -> String {
    directory.path().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

#[async_trait]
impl Machine for Here {
    async fn scan(&self, context: &Arc<Context>) -> io::Result<Vec<(Claim, Directory, Left)>> {
        let names: Vec<String> = lock(&self.0.inner).disk.keys().cloned().collect();
        let mut found = Vec::new();
        for name in names {
            found.push(self.look(context, name).await);
        }
        Ok(found)
    }

    async fn look(&self, context: &Arc<Context>, instance: String) -> (Claim, Directory, Left) {
        let directory = Directory::new(context.settings.instances_dir().join(&instance));
        let files = lock(&self.0.inner).disk.get(&instance).cloned().unwrap_or_default();
        let claim = files.claim.unwrap_or_else(|| Claim {
            instance: instance.clone(),
            token: files.record.map(|(token, _)| token).unwrap_or_default(),
            spec: Default::default(),
            revision: 0,
            memory_bytes: 0,
            restarts: 0,
            failed: None,
            since: None,
        });
        let left = match self.0.living(&instance) {
            Some(run) => {
                // A raise that was cut off is finished.
                self.0.raise_to(&claim, &instance);
                let ready = self.probe(&context.settings.socket_of(&instance), None).await == Health::Ok;
                Left::Living { run, ready }
            }
            None if self.0.calls_off(&instance) => {
                Left::Ended(files.record.map(|_| Ended { code: Some(1), ..Ended::default() }))
            }
            None => Left::Unknown(Unsure::because("a shim that an earlier agent has started is at work")),
        };
        (claim, directory, left)
    }

    async fn launch(&self, context: &Context, claim: &Claim, directory: &Directory) -> Result<Run, Failed> {
        let instance = of(directory);
        if let Some(run) = self.0.living(&instance) {
            return Ok(run);
        }
        let does_nothing = lock(&self.0.inner).does_nothing;
        if does_nothing {
            std::future::pending::<()>().await;
        }
        let failed = |message: String, retry| Failed { message, retry, ended: None };
        let Some(deadline_ns) = context.session.start_until_ns() else {
            return Err(failed("this node has no session now".to_owned(), true));
        };
        let owned = context.board.get(&instance).is_some_and(|entry| entry.owned);
        if !owned && !mutant::on(mutant::name::START_WITHOUT_CLAIM) {
            return Err(failed("no claim covers it any more".to_owned(), true));
        }
        if let Some(files) = lock(&self.0.inner).disk.get_mut(&instance) {
            files.spec = Some((claim.token, deadline_ns));
        }
        let (word, said) = oneshot::channel();
        let shim = self.0.clone().shim(instance.clone(), claim.memory_bytes);
        // A process of its own: it goes on when the agent is gone.
        let shim = tokio::spawn(async move {
            let _ = word.send(shim.await);
        });
        let said = timeout(Duration::from_secs(15), said).await;
        if said.is_err() {
            shim.abort();
            self.0.shim_is_dead(&instance);
        }
        match (self.0.living(&instance), said) {
            (Some(run), _) => Ok(run),
            (None, Ok(Ok(Err(why)))) => Err(failed(format!("the start was refused: {why}"), !why.starts_with("11"))),
            (None, _) => Err(failed("llama-server has ended at once, or its shim is silent".to_owned(), true)),
        }
    }

    async fn ended(&self, _: &Directory, _: &Record) -> Ended {
        Ended { code: Some(1), ..Ended::default() }
    }

    async fn probe(&self, socket: &Path, _: Option<&Path>) -> Health {
        sleep(Duration::from_millis(1)).await;
        let instance = socket.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let inner = lock(&self.0.inner);
        match inner.servers.values().find(|server| server.instance == instance) {
            Some(server) if server.hangs => Health::Failing("no answer".to_owned()),
            Some(server) if server.ready => Health::Ok,
            _ => Health::Loading,
        }
    }

    fn prepare(&self, claim: &Claim, directory: &Directory) -> Result<(), String> {
        self.0.raise_to(claim, &of(directory));
        Ok(())
    }

    fn raise(&self, claim: &Claim, directory: &Directory) -> Result<(), durable::Error> {
        self.0.raise_to(claim, &of(directory));
        Ok(())
    }

    fn keep(&self, claim: &Claim, directory: &Directory) -> Result<(), durable::Error> {
        if let Some(files) = lock(&self.0.inner).disk.get_mut(&of(directory)) {
            files.claim = Some(claim.clone());
        }
        Ok(())
    }

    fn remove(&self, directory: &Directory, _: &Path) -> bool {
        let instance = of(directory);
        let mut inner = lock(&self.0.inner);
        let lives = inner.servers.values().any(|server| server.instance == instance);
        if lives || inner.disk.get(&instance).is_some_and(|files| files.locked) {
            return false;
        }
        inner.disk.remove(&instance);
        true
    }

    async fn look_at_offers(
        &self,
        context: &Arc<Context>,
        _: &str,
        offers: &[Offer],
    ) -> Result<Vec<Result<i64, No>>, blocking::Error> {
        let check = |offer: &Offer| {
            if context.session.has_passed() || offer.deadline.as_ref().is_none_or(|d| clock::until(d).is_zero()) {
                return Err(No::Late);
            }
            let faults = lock(&self.0.sim().network).faults_on();
            if faults && self.0.sim().chance().permille(30) {
                return Err(No::Unable("the host's memory is short just now".to_owned()));
            }
            Ok(UNIT)
        };
        Ok(offers.iter().map(check).collect())
    }

    fn session(&self, _: &Path) -> Result<Stored, durable::Error> {
        Ok(lock(&self.0.inner).session.clone().unwrap_or_default())
    }

    fn keep_session(&self, _: &Path, stored: &Stored) -> Result<(), durable::Error> {
        lock(&self.0.inner).session = Some(stored.clone());
        Ok(())
    }
}

/// A process that was found by its record.
pub(super) struct Living {
    pub(super) host: Arc<Host>,
    pub(super) pid: i32,
}

impl fmt::Debug for Living {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} of {}", self.pid, self.host.name)
    }
}

#[async_trait]
impl Process for Living {
    fn pid(&self) -> i32 {
        self.pid
    }

    async fn ended(&self) {
        let watched = lock(&self.host.inner).servers.get(&self.pid).map(|server| server.ended.subscribe());
        if let Some(mut ended) = watched {
            let _ = ended.wait_for(|ended| *ended).await;
        }
    }

    /// It loads in much less than a load may take, so that one which still loads then does nothing.
    fn work(&self) -> Option<Work> {
        Some(Work { cpu_ticks: 0, read: (0, 0) })
    }

    fn terminate(&self) -> io::Result<()> {
        self.host.signal(self.pid, false);
        Ok(())
    }

    fn kill_tree(&self) -> io::Result<()> {
        self.host.signal(self.pid, true);
        Ok(())
    }
}

/// The host's data plane: takes every route at once, and drains in a moment.
#[derive(Debug)]
pub struct Plane(pub Arc<Host>);

#[async_trait]
impl DataPlane for Plane {
    fn set_routes(&self, _: Vec<Route>) {}

    async fn wait_applied(&self, _: Duration) -> bool {
        true
    }

    async fn wait_drained(&self, _: &str, within: Duration) -> bool {
        let ms = self.0.sim().chance().between(0, 1500);
        sleep(Duration::from_millis(ms).min(within)).await;
        true
    }
}
