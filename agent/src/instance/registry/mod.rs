//! All instances of this node: what runs, what is owned, and what follows when the set of claims changes.
//!
//! The set of claims is full and level-triggered: applying it twice, or a later one only, leads to the same end. What
//! runs without a claim goes on running until it is told to end; what has no process and no claim is removed.

mod claims;
mod runs;
mod unsure;

pub use runs::Unowned;

use self::runs::{Holds, Published};
use super::{
    adopt::{Left, Unsure},
    claim::Claim,
    context::Context,
    handle::Handle,
    state::Ended,
    supervisor::{self, Begin},
};
use crate::mutant;
use drover_proto::v1::{ClaimSet, Severity, Token};
use drover_shim::{
    failpoint::{self, Step},
    record::Directory,
};
use std::{collections::BTreeMap, io, sync::Arc};
use tokio::sync::Mutex;

/// A set of claims, and the stream that it came on.
#[derive(Debug, Clone)]
pub struct SessionSet {
    /// Number of the stream; rises with every one that was welcomed.
    pub stream: u64,
    /// Id of its session.
    pub session: String,
    /// The set.
    pub set: ClaimSet,
}

impl SessionSet {
    /// When the set was read, as a token: revisions of one generation of the store say nothing about another's.
    fn read_at(&self) -> Token {
        Token { generation: self.set.store_generation, revision: self.set.revision }
    }

    /// Whether a claim with this token was made before the set was read, so that it is in it if it stands.
    fn covers(&self, token: Token) -> bool {
        if mutant::on(mutant::name::REVISION_WITHOUT_GENERATION) {
            return self.set.revision >= token.revision;
        }
        self.read_at() >= token
    }
}

/// What is here of an instance.
#[derive(Debug)]
enum Kind {
    /// A supervisor.
    Supervised(Handle),
    /// Files only: its server has ended under an earlier agent. Started again when a claim says so.
    Dormant(Box<Claim>, Option<Ended>),
    /// It can't be told whether its server lives; looked at again each time.
    Unknown(Box<Claim>, Unsure),
    /// Nothing, though it is claimed: it is not wanted, or could not be begun.
    Nothing,
}

#[derive(Debug)]
struct Known {
    token: Token,
    kind: Kind,
}

/// What is known of each instance. What others are told of it follows every change at once.
#[derive(Debug, Default)]
struct Instances {
    known: BTreeMap<String, Known>,
    published: Arc<Published>,
}

impl Instances {
    fn get(&self, instance: &str) -> Option<&Known> {
        self.known.get(instance)
    }

    fn contains(&self, instance: &str) -> bool {
        self.known.contains_key(instance)
    }

    fn iter(&self) -> impl Iterator<Item = (&String, &Known)> {
        self.known.iter()
    }

    fn get_mut(&mut self, instance: &str) -> Option<&mut Known> {
        self.known.get_mut(instance)
    }

    fn insert(&mut self, instance: String, known: Known) {
        let holds = match &known.kind {
            Kind::Supervised(handle) => Holds::Process(handle.clone()),
            Kind::Dormant(claim, _) => Holds::Files(claim.memory_bytes),
            Kind::Unknown(claim, _) => Holds::Unknown(claim.memory_bytes),
            Kind::Nothing => Holds::Nothing,
        };
        self.published.set(&instance, known.token, holds);
        self.known.insert(instance, known);
    }

    /// Takes what is known out, to put something in its place: for others nothing has changed until that is done.
    fn take(&mut self, instance: &str) -> Option<Known> {
        self.known.remove(instance)
    }

    /// Says that an instance is about to be begun: from then on it counts as one that may have a process.
    fn begins(&self, instance: &str, token: Token, memory_bytes: i64) {
        self.published.set(instance, token, Holds::Unknown(memory_bytes));
    }

    fn remove(&mut self, instance: &str) {
        self.known.remove(instance);
        self.published.remove(instance);
    }
}

#[derive(Debug, Default)]
struct Inner {
    instances: Instances,
    /// Claims under way, with the memory that they would reserve.
    claiming: BTreeMap<String, i64>,
    /// The set of claims applied last.
    latest: Option<SessionSet>,
}

/// The instances of this node.
#[derive(Debug)]
pub struct Registry {
    context: Arc<Context>,
    /// Held while a launch is waited for, which may take long: who only wants to know what runs reads `published`.
    inner: Mutex<Inner>,
    published: Arc<Published>,
}

impl Registry {
    /// Takes back what earlier agents left, then gives the proxy the routes to it.
    pub async fn adopt(context: Arc<Context>) -> io::Result<Self> {
        let mut instances = Instances::default();
        for (claim, directory, left) in context.machine.scan(&context).await? {
            let (instance, token) = (claim.instance.clone(), claim.token);
            let kind = match left {
                Left::Living { run, ready } => {
                    let pid = run.living.pid();
                    tracing::info!(instance, pid, ready, %token, "a running server is taken back");
                    let begin = Begin::Adopted { run, ready };
                    let handle = supervisor::spawn(context.clone(), claim, directory, begin);
                    failpoint::at(Step::AdoptAdopted);
                    Kind::Supervised(handle)
                }
                Left::Ended(ended) => {
                    if let Some(ended) = ended.as_ref().filter(|ended| ended.lease_lost) {
                        let message = format!("token {token}, while no agent ran: llama-server {ended}");
                        context.events.tell(&instance, "LeaseLost", Severity::Warning, message);
                    }
                    Kind::Dormant(Box::new(claim), ended)
                }
                Left::Unknown(unsure) => {
                    unsure::tell(&context, &instance, &unsure);
                    if unsure.answers {
                        // Its requests go on until the claims are known.
                        context.routes.prepare(unsure::route(&context, &claim, true, &unsure));
                    }
                    Kind::Unknown(Box::new(claim), unsure)
                }
            };
            instances.insert(instance, Known { token, kind });
        }
        context.routes.announce();
        failpoint::at(Step::AdoptRouted);
        let published = instances.published.clone();
        Ok(Self { context, inner: Mutex::new(Inner { instances, ..Inner::default() }), published })
    }

    /// What all instances share.
    #[must_use]
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    fn directory(&self, instance: &str) -> Directory {
        Directory::new(self.context.settings.instances_dir().join(instance))
    }
}
