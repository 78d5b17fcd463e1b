//! The host, as instances and the link use it: its disk, its processes, its data plane. [`Local`] is the real one; a
//! simulation has its own.
//!
//! What is here is whole steps (look at an instance, launch it, raise its token), not files and signals: which files they
//! write in which order is the business of [`run`] and [`adopt`], whose own tests go through it step by step. Must never:
//! know coordinators, or decide what an instance does.

use super::{
    adopt::{self, Left},
    claim::Claim,
    context::Context,
    health,
    run::{self, Failed, Run},
    state::{Ended, Health},
};
use crate::{
    blocking,
    host::processes::{Living, Work},
    link::{
        offers::{self, No},
        stored::{self, Stored},
    },
    lock,
    proxy::{ProxyHandle, Route},
};
use async_trait::async_trait;
use drover_proto::v1::Offer;
use drover_shim::{
    durable,
    lease::{self, Times},
    record::{Directory, Record},
};
use std::{
    fmt, fs, io,
    os::unix::{fs::DirBuilderExt as _, net::UnixListener},
    path::Path,
    sync::Arc,
    time::Duration,
};
use tokio::task::block_in_place;

/// Longest look at what offers need of this host.
const CHECK_DEADLINE: Duration = Duration::from_secs(3);

/// A host. What is not `async` waits for a local disk and gives the runtime's other tasks another thread meanwhile.
#[async_trait]
pub trait Machine: fmt::Debug + Send + Sync {
    /// The claims and runs that earlier agents left; see [`adopt::scan`].
    async fn scan(&self, context: &Arc<Context>) -> io::Result<Vec<(Claim, Directory, Left)>>;
    /// Looks at one instance; see [`adopt::look`].
    async fn look(&self, context: &Arc<Context>, instance: String) -> (Claim, Directory, Left);
    /// Launches what a claim says, or takes hold of what runs; see [`run::launch`].
    async fn launch(&self, context: &Context, claim: &Claim, directory: &Directory) -> Result<Run, Failed>;
    /// How the process of a record ended; see [`run::ended`].
    async fn ended(&self, directory: &Directory, record: &Record) -> Ended;
    /// Probes a server once; with a model it is asked what it serves too.
    async fn probe(&self, socket: &Path, model: Option<&Path>) -> Health;
    /// Makes an instance's directory and raises what lies in it to the claim's token.
    fn prepare(&self, claim: &Claim, directory: &Directory) -> Result<(), String>;
    /// Raises the token of a run everywhere it is kept; see [`run::raise`].
    fn raise(&self, claim: &Claim, directory: &Directory) -> Result<(), durable::Error>;
    /// Keeps what was learnt of a claim for the next agent.
    fn keep(&self, claim: &Claim, directory: &Directory) -> Result<(), durable::Error>;
    /// Tells the shim of an instance until when its lease lives; see [`lease::write`].
    fn keep_lease(&self, _directory: &Directory, _times: Times) -> io::Result<()> {
        Ok(())
    }
    /// What the shim of an instance was told of its lease; `None` when that can't be read.
    fn lease(&self, _directory: &Directory) -> Option<Times> {
        None
    }
    /// Removes what is left of an instance without a process; see [`adopt::remove`].
    fn remove(&self, directory: &Directory, socket: &Path) -> bool;
    /// Looks at what offers of one model need of this host: for each the memory to reserve, in bytes.
    async fn look_at_offers(
        &self,
        context: &Arc<Context>,
        model: &str,
        offers: &[Offer],
    ) -> Result<Vec<Result<i64, No>>, blocking::Error>;
    /// What is on disk of the node's session.
    fn session(&self, state_dir: &Path) -> Result<Stored, durable::Error>;
    /// Keeps the node's session; returns after the disk has it.
    fn keep_session(&self, state_dir: &Path, stored: &Stored) -> Result<(), durable::Error>;
    /// Holds a session for this agent, as long as the value lives; `None` when another agent of this host holds it, whose
    /// state folder is a copy of ours or ours of its.
    fn hold_session(&self, _id: &str) -> Option<Held> {
        Some(Held(None))
    }
}

/// A session that no other agent of the host may have.
#[derive(Debug)]
pub struct Held(#[allow(dead_code, reason = "it is held as long as it is open")] Option<UnixListener>);

/// A process whose whole identity was verified, and which the handle names from then on.
#[async_trait]
pub trait Process: fmt::Debug + Send + Sync {
    /// Its process id, for people.
    fn pid(&self) -> i32;
    /// Waits until it has ended.
    async fn ended(&self);
    /// What it has done so far; `None` when it can't be read.
    fn work(&self) -> Option<Work>;
    /// Asks it to end.
    fn terminate(&self) -> io::Result<()>;
    /// Ends it and what it has started.
    fn kill_tree(&self) -> io::Result<()>;
}

/// The host's data plane.
#[async_trait]
pub trait DataPlane: fmt::Debug + Send + Sync {
    /// Gives it the full set of routes.
    fn set_routes(&self, routes: Vec<Route>);
    /// Waits until the last set is in force; false when it is not in time.
    async fn wait_applied(&self, within: Duration) -> bool;
    /// Waits until an instance whose route takes no requests has none in flight; false when it still has in the end.
    async fn wait_drained(&self, instance: &str, within: Duration) -> bool;
}

/// This host.
#[derive(Debug, Default)]
pub struct Local;

#[async_trait]
impl Machine for Local {
    async fn scan(&self, context: &Arc<Context>) -> io::Result<Vec<(Claim, Directory, Left)>> {
        adopt::scan(context).await
    }

    async fn look(&self, context: &Arc<Context>, instance: String) -> (Claim, Directory, Left) {
        adopt::look(context.clone(), instance).await
    }

    async fn launch(&self, context: &Context, claim: &Claim, directory: &Directory) -> Result<Run, Failed> {
        run::launch(context, claim, directory).await
    }

    async fn ended(&self, directory: &Directory, record: &Record) -> Ended {
        run::ended(directory, Some(record)).await
    }

    async fn probe(&self, socket: &Path, model: Option<&Path>) -> Health {
        match model {
            None => health::probe(socket).await,
            Some(model) => health::probe_for(socket, model).await,
        }
    }

    fn prepare(&self, claim: &Claim, directory: &Directory) -> Result<(), String> {
        block_in_place(|| {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(directory.path());
            made.map_err(|e| format!("{}: {e}", directory.path().display()))?;
            // Spec and record, where there are any, get the token first: no lower one can start anything from then on.
            run::raise(directory, claim).map_err(|e| e.to_string())
        })
    }

    fn raise(&self, claim: &Claim, directory: &Directory) -> Result<(), durable::Error> {
        block_in_place(|| run::raise(directory, claim))
    }

    fn keep(&self, claim: &Claim, directory: &Directory) -> Result<(), durable::Error> {
        let directory = directory.path();
        // After a crash of the host only that it can't be served is worth knowing.
        block_in_place(|| if claim.failed.is_some() { claim.write(directory) } else { claim.place(directory) })
    }

    fn keep_lease(&self, directory: &Directory, times: Times) -> io::Result<()> {
        lease::write(&directory.lease(), times)
    }

    fn lease(&self, directory: &Directory) -> Option<Times> {
        block_in_place(|| lease::read(&directory.lease()).ok())
    }

    fn remove(&self, directory: &Directory, socket: &Path) -> bool {
        block_in_place(|| adopt::remove(directory, socket))
    }

    async fn look_at_offers(
        &self,
        context: &Arc<Context>,
        model: &str,
        offers: &[Offer],
    ) -> Result<Vec<Result<i64, No>>, blocking::Error> {
        let (context, offers) = (context.clone(), offers.to_vec());
        // The model may lie on another host, which may be away: other claims wait for this one.
        let look = move || offers.iter().map(|offer| offers::check(&context, offer)).collect();
        blocking::within(CHECK_DEADLINE, model, look).await
    }

    fn session(&self, state_dir: &Path) -> Result<Stored, durable::Error> {
        stored::read(state_dir)
    }

    fn keep_session(&self, state_dir: &Path, stored: &Stored) -> Result<(), durable::Error> {
        stored::write(state_dir, stored)
    }

    fn hold_session(&self, id: &str) -> Option<Held> {
        lock::session(id).map(Held)
    }
}

#[async_trait]
impl Process for Living {
    fn pid(&self) -> i32 {
        self.pid()
    }

    async fn ended(&self) {
        self.ended().await;
    }

    fn work(&self) -> Option<Work> {
        self.work()
    }

    fn terminate(&self) -> io::Result<()> {
        self.terminate()
    }

    fn kill_tree(&self) -> io::Result<()> {
        self.kill_tree()
    }
}

#[async_trait]
impl DataPlane for ProxyHandle {
    fn set_routes(&self, routes: Vec<Route>) {
        self.set_routes(routes);
    }

    async fn wait_applied(&self, within: Duration) -> bool {
        self.wait_applied(within).await
    }

    async fn wait_drained(&self, instance: &str, within: Duration) -> bool {
        self.wait_drained(instance, within).await
    }
}
