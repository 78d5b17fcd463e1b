//! Opening a session, and resuming one.

use super::{Settings, admit, outbox};
use crate::{
    control::{clock, mutant, view::View},
    plan::snapshot::Stored,
    store::{self, Compare, Op, Store, Txn, keys, records},
};
use drover_proto::{PROTOCOL_MAX, PROTOCOL_MIN, VERSION, status::reason, store::v1 as record, v1::Hello, world};
use prost_types::Timestamp;
use std::time::Duration;

/// Why a session was not opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is refused; `reason` is one of `drover_proto::status::reason`.
    #[error("{message}")]
    Refused {
        /// Word for programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] store::Error),
}

pub(super) fn refused(reason: &'static str, message: impl Into<String>) -> Error {
    Error::Refused { reason, message: message.into() }
}

/// An open session.
#[derive(Debug, Clone)]
pub struct Opened {
    /// Its id.
    pub session_id: String,
    /// Its lease.
    pub lease: i64,
    /// Revision of its record.
    pub revision: i64,
    /// Random id of this stream, of which the record names one: an older one of the same session ends.
    pub stream: String,
    /// Time to live that the store has granted.
    pub ttl: Duration,
    /// Generation of the store.
    pub generation: u64,
    /// Revision of the store's schema.
    pub schema: i64,
    /// Whether it existed before.
    pub resumed: bool,
    /// When, as the node's record says; tells whether the node has joined again since.
    pub joined_at: Option<Timestamp>,
}

#[cfg(test)]
impl Opened {
    /// One for tests.
    pub(super) fn example(session: &str, stream: &str) -> Self {
        Self {
            session_id: session.to_owned(),
            lease: 1,
            revision: 1,
            stream: stream.to_owned(),
            ttl: Duration::from_secs(10),
            generation: 0,
            schema: 1,
            resumed: false,
            joined_at: None,
        }
    }
}

/// The protocol version that both sides speak.
pub fn protocol(hello: &Hello) -> Result<u32, Error> {
    let common = PROTOCOL_MAX.min(hello.protocol_max);
    if common < PROTOCOL_MIN.max(hello.protocol_min) {
        let message = format!(
            "agent {} speaks protocol {} to {}, coordinator {VERSION} speaks {PROTOCOL_MIN} to {PROTOCOL_MAX}: upgrade the older one",
            hello.agent_version, hello.protocol_min, hello.protocol_max
        );
        return Err(refused(reason::PROTOCOL_MISMATCH, message));
    }
    Ok(common)
}

/// Opens or resumes a node's session.
pub async fn open(store: &Store, view: &View, settings: &Settings, node: &str, hello: &Hello) -> Result<Opened, Error> {
    if hello.machine_id.is_empty() {
        return Err(refused(
            reason::INVALID_FIELD,
            "machine_id: is empty; the agent must say which machine it runs on",
        ));
    }
    let snapshot = view.snapshot();
    let (true, Some(schema)) = (view.live(), snapshot.schema.clone()) else {
        // A session that is opened and can't be told of is one that nobody knows.
        return Err(store::Error::Unavailable("this coordinator does not see the store now".to_owned()).into());
    };
    let read = vec![Op::Get(keys::node(node)), Op::Get(keys::session(node))];
    let read = store.txn(Txn { then: read, ..Txn::default() }).await?;
    admit::check_store(hello, &schema.value, read.revision)?;
    let [known, existing] = [0, 1].map(|n| read.reads.get(n).and_then(|kvs| kvs.first()));
    if let Some(known) = known {
        let bound = records::decode::<record::Node>(known)?.machine_id;
        if bound != hello.machine_id {
            let message = format!("the name {node} is bound to another machine: give this host a name of its own");
            return Err(refused(reason::NODE_BOUND, message));
        }
    }
    let opening = Opening {
        store,
        settings,
        node,
        hello,
        told: record_of(hello),
        schema: &schema,
        compare: vec![
            Compare::ModRevision(keys::SCHEMA.to_owned(), schema.mod_revision),
            Compare::ModRevision(keys::node(node), known.map_or(0, |k| k.mod_revision)),
        ],
        stream: world::uuid(),
    };
    match existing {
        Some(existing) => opening.resume(existing).await,
        None => opening.create().await,
    }
}

/// A session about to be opened.
struct Opening<'a> {
    store: &'a Store,
    settings: &'a Settings,
    node: &'a str,
    hello: &'a Hello,
    told: record::Node,
    schema: &'a Stored<record::Schema>,
    compare: Vec<Compare>,
    stream: String,
}

impl Opening<'_> {
    async fn create(mut self) -> Result<Opened, Error> {
        let (store, node, hello) = (self.store, self.node, self.hello);
        let lease = store.grant(self.settings.ttl).await?;
        // An agent that has chosen the id, and kept it, finds its session again should this answer get lost.
        let session_id = if is_id(&hello.new_session_id) { hello.new_session_id.clone() } else { world::uuid() };
        let session =
            self.written(record::Session { session_id, lease, opened_at: Some(clock::now()), ..Default::default() });
        self.compare.push(Compare::CreateRevision(keys::session(node), 0));
        let txn = Txn { compare: self.compare.clone(), then: puts(node, &session, &self.told), otherwise: vec![] };
        // An unknown outcome leaves the lease to run out: nobody renews it, so what may have been written goes with it.
        let outcome = store.txn(txn).await?;
        if outcome.succeeded {
            return Ok(self.opened(&session, outcome.revision, self.settings.ttl, false));
        }
        store.revoke(lease).await?;
        Err(refused(
            reason::SESSION_EXISTS,
            format!("{node} was joined by another agent at the same moment: try again"),
        ))
    }

    /// A resume bumps the session before its claims are read, so that a claim still under way is dead or already visible.
    async fn resume(mut self, existing: &store::KeyValue) -> Result<Opened, Error> {
        let (store, node) = (self.store, self.node);
        let session = records::decode::<record::Session>(existing)?;
        let unmoved = Compare::ModRevision(keys::session(node), existing.mod_revision);
        if let Err(withheld) = admit::may_resume(node, &session, self.hello, self.settings.ttl) {
            if withheld.orphaned && session.absent_until.is_some() {
                // It is kept for an agent that can't come back for it.
                let ends = record::Session { version: session.version + 1, absent_until: None, ..session.clone() };
                let then = vec![records::put(keys::session(node), &ends, session.lease)];
                self.compare.push(unmoved);
                store.txn(Txn { compare: self.compare, then, otherwise: vec![] }).await?;
            }
            return Err(refused(reason::SESSION_EXISTS, withheld.message));
        }
        let ttl = store.renew(session.lease).await?;
        self.compare.push(unmoved);
        let bumped = self.written(session);
        let mut txn = Txn { compare: self.compare.clone(), then: puts(node, &bumped, &self.told), otherwise: vec![] };
        let without_bump = mutant::on(mutant::name::RESUME_WITHOUT_BUMP);
        if without_bump {
            txn.then.remove(0);
        }
        let mut outcome = store.txn(txn).await?;
        if without_bump {
            outcome.revision = existing.mod_revision;
        }
        if !outcome.succeeded {
            return Err(refused(reason::SESSION_MOVED, format!("the session of {node} has just changed: try again")));
        }
        Ok(self.opened(&bumped, outcome.revision, ttl, true))
    }

    /// The record as this stream writes it.
    fn written(&self, session: record::Session) -> record::Session {
        record::Session {
            version: session.version + 1,
            coordinator: self.settings.coordinator.clone(),
            boot_id: self.hello.boot_id.clone(),
            agent_id: self.hello.agent_id.clone(),
            stream: self.stream.clone(),
            absent_until: None,
            ..session
        }
    }

    fn opened(&self, session: &record::Session, revision: i64, ttl: Duration, resumed: bool) -> Opened {
        Opened {
            session_id: session.session_id.clone(),
            lease: session.lease,
            revision,
            stream: self.stream.clone(),
            ttl,
            generation: self.schema.value.generation,
            schema: self.schema.mod_revision,
            resumed,
            joined_at: self.told.joined_at,
        }
    }
}

/// Whether an agent may choose this as the id of a session.
fn is_id(chosen: &str) -> bool {
    (16..=64).contains(&chosen.len()) && chosen.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn puts(node: &str, session: &record::Session, told: &record::Node) -> Vec<Op> {
    let mut told = told.clone();
    // Where nothing runs there is nothing to claim again, and nothing to wait for.
    if told.unclaimed.is_empty() {
        told.inventory_of.clone_from(&session.session_id);
    }
    vec![records::put(keys::session(node), session, session.lease), records::put(keys::node(node), &told, 0)]
}

/// What the store keeps of a node.
fn record_of(hello: &Hello) -> record::Node {
    record::Node {
        machine_id: hello.machine_id.clone(),
        labels: hello.labels.clone(),
        capacity: hello.capacity.clone(),
        proxy_address: hello.proxy_address.clone(),
        agent_version: hello.agent_version.clone(),
        joined_at: Some(clock::now()),
        unclaimed: outbox::alive(&hello.runs),
        models: hello.models.clone(),
        inventory_of: String::new(),
        lost_at: None,
        protocol: PROTOCOL_MAX.min(hello.protocol_max),
    }
}
