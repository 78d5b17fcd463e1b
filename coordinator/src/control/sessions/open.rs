//! Opening a session, and resuming one.

use super::{Settings, outbox};
use crate::{
    control::{clock, view::View},
    store::{self, Compare, Op, Store, Txn, keys, records},
};
use drover_proto::{PROTOCOL_MAX, PROTOCOL_MIN, VERSION, status::reason, store::v1 as record, v1::Hello};
use prost_types::Timestamp;
use uuid::Uuid;

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

fn refused(reason: &'static str, message: impl Into<String>) -> Error {
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
    /// Whether it existed before.
    pub resumed: bool,
    /// When, as the node's record says; tells whether the node has joined again since.
    pub joined_at: Option<Timestamp>,
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
    let Some(schema) = snapshot.schema.clone() else {
        return Err(store::Error::Unavailable("this coordinator has not read the store yet".to_owned()).into());
    };
    if hello.store_generation > schema.value.generation {
        let message = format!(
            "the agent knows generation {} of the store, this one has generation {}: it is older or another one",
            hello.store_generation, schema.value.generation
        );
        return Err(refused(reason::SESSION_MOVED, message));
    }
    let known = store.get(&keys::node(node)).await?;
    if let Some(known) = &known {
        let bound = records::decode::<record::Node>(known)?.machine_id;
        if bound != hello.machine_id {
            let message = format!("the name {node} is bound to another machine: give this host a name of its own");
            return Err(refused(reason::NODE_BOUND, message));
        }
    }
    let told = record_of(hello, &snapshot, node);
    let compare = vec![
        Compare::ModRevision(keys::SCHEMA.to_owned(), schema.mod_revision),
        Compare::ModRevision(keys::node(node), known.map_or(0, |k| k.mod_revision)),
    ];
    let existing = store.get(&keys::session(node)).await?;
    match existing {
        Some(existing) => resume(store, settings, node, hello, &existing, compare, &told).await,
        None => create(store, settings, node, compare, &told).await,
    }
}

async fn create(
    store: &Store,
    settings: &Settings,
    node: &str,
    mut compare: Vec<Compare>,
    told: &record::Node,
) -> Result<Opened, Error> {
    let lease = store.grant(settings.ttl).await?;
    let session = record::Session {
        session_id: Uuid::new_v4().to_string(),
        lease,
        coordinator: settings.coordinator.clone(),
        version: 1,
        opened_at: Some(clock::now()),
    };
    compare.push(Compare::CreateRevision(keys::session(node), 0));
    let txn = Txn { compare, then: puts(node, &session, told), otherwise: vec![] };
    // An unknown outcome leaves the lease to run out: nobody renews it, so what may have been written goes with it.
    let outcome = store.txn(txn).await?;
    if outcome.succeeded {
        let (session_id, joined_at) = (session.session_id, told.joined_at);
        return Ok(Opened { session_id, lease, revision: outcome.revision, resumed: false, joined_at });
    }
    store.revoke(lease).await?;
    Err(refused(reason::SESSION_EXISTS, format!("{node} was joined by another agent at the same moment: try again")))
}

/// A resume bumps the session before its claims are read, so that a claim still under way is dead or already visible.
async fn resume(
    store: &Store,
    settings: &Settings,
    node: &str,
    hello: &Hello,
    existing: &store::KeyValue,
    mut compare: Vec<Compare>,
    told: &record::Node,
) -> Result<Opened, Error> {
    let session = records::decode::<record::Session>(existing)?;
    if hello.resume_session_id != session.session_id {
        let message = format!(
            "{node} has a session that this agent does not know; it ends within {} ms unless its owner returns",
            settings.ttl.as_millis()
        );
        return Err(refused(reason::SESSION_EXISTS, message));
    }
    store.renew(session.lease).await?;
    compare.push(Compare::ModRevision(keys::session(node), existing.mod_revision));
    let bumped =
        record::Session { version: session.version + 1, coordinator: settings.coordinator.clone(), ..session.clone() };
    let txn = Txn { compare, then: puts(node, &bumped, told), otherwise: vec![] };
    let outcome = store.txn(txn).await?;
    if !outcome.succeeded {
        return Err(refused(reason::SESSION_MOVED, format!("the session of {node} has just changed: try again")));
    }
    let (session_id, lease, joined_at) = (session.session_id, session.lease, told.joined_at);
    Ok(Opened { session_id, lease, revision: outcome.revision, resumed: true, joined_at })
}

fn puts(node: &str, session: &record::Session, told: &record::Node) -> Vec<Op> {
    vec![records::put(keys::session(node), session, session.lease), records::put(keys::node(node), told, 0)]
}

/// What the store keeps of a node.
fn record_of(hello: &Hello, snapshot: &crate::plan::snapshot::Snapshot, node: &str) -> record::Node {
    record::Node {
        machine_id: hello.machine_id.clone(),
        labels: hello.labels.clone(),
        capacity: hello.capacity.clone(),
        proxy_address: hello.proxy_address.clone(),
        agent_version: hello.agent_version.clone(),
        joined_at: Some(clock::now()),
        unclaimed: outbox::unclaimed(&hello.runs, snapshot, node),
        models: hello.models.clone(),
    }
}
