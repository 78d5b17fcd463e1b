//! What every instance of this node shares.

use super::{
    arguments::Known, board::Board, leases::Leases, machine::Machine, routes::Routes, session::Deadline, state::Policy,
    turns::Turns,
};
use crate::config::Settings;
use drover_proto::v1::{DeploymentSpec, NodeEvent, Severity};
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};
use tokio::sync::mpsc;

/// Events that wait to be sent while there is no session.
const WAITING: usize = 1024;

/// Shared by all instances.
#[derive(Debug)]
pub struct Context {
    /// Configuration.
    pub settings: Arc<Settings>,
    /// The host.
    pub machine: Arc<dyn Machine>,
    /// Boot that this is.
    pub boot_id: String,
    /// Folder for the cgroups of its instances; `None` where the host offers none.
    pub cgroup_base: Option<PathBuf>,
    /// Flags that the installed llama-server knows.
    pub known: Known,
    /// Routes through the proxy.
    pub routes: Routes,
    /// What is known of each instance.
    pub board: Board,
    /// Who is launched when.
    pub turns: Turns,
    /// Until when something may be started.
    pub session: Deadline,
    /// What ends with the session's lease.
    pub leases: Leases,
    /// Events on their way to the coordinator.
    pub events: Events,
    /// Memory that processes take which are none of this node's instances, in bytes.
    pub taken_bytes: AtomicI64,
}

/// Sends events of this node to the coordinator. Bounded: what does not fit is logged only.
#[derive(Debug, Clone)]
pub struct Events(mpsc::Sender<NodeEvent>);

impl Events {
    /// A queue of events, and its end.
    #[must_use]
    pub fn new() -> (Self, mpsc::Receiver<NodeEvent>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self(sender), receiver)
    }

    /// Tells an event. `reason` is a word for programs, `message` a sentence for people.
    pub fn tell(&self, instance: &str, reason: &str, severity: Severity, message: String) {
        match severity {
            Severity::Info | Severity::Unspecified => tracing::info!(instance, reason, "{message}"),
            Severity::Warning => tracing::warn!(instance, reason, "{message}"),
            Severity::Error => tracing::error!(instance, reason, "{message}"),
        }
        let event =
            NodeEvent { instance: instance.to_owned(), reason: reason.to_owned(), message, severity: severity.into() };
        if self.0.try_send(event).is_err() {
            tracing::debug!("an event was not sent: too many wait already");
        }
    }
}

impl Context {
    /// Memory that instances of this node may reserve, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> i64 {
        self.settings.memory_bytes.saturating_sub(self.taken_bytes.load(Ordering::Relaxed)).max(0)
    }

    /// Bounds of an instance: the node's own, with what its deployment says.
    #[must_use]
    pub fn policy(&self, spec: &DeploymentSpec) -> Policy {
        let base = self.settings.restarts.policy();
        let or = |value: Option<i64>, default: u64| value.and_then(|v| u64::try_from(v).ok()).unwrap_or(default);
        Policy {
            drain_ms: or(spec.drain_timeout_ms, base.drain_ms),
            grace_ms: or(spec.stop_grace_ms, base.grace_ms),
            load_timeout_ms: or(spec.load_timeout_ms, base.load_timeout_ms),
            ..base
        }
    }
}
