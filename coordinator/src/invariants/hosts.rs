//! What hosts do: known in a simulation.

use super::{Checker, Rule};
use drover_proto::v1::{OnLeaseLost, Token};
use std::collections::BTreeMap;

/// A process of a host.
#[derive(Debug, Clone)]
pub struct Process {
    /// The instance.
    pub instance: String,
    /// Token under which it was released.
    pub token: Token,
    /// Memory that it takes, in bytes.
    pub memory_bytes: i64,
}

/// Something that happened on a host. A host is one machine: a clone of a node's name is another.
#[derive(Debug, Clone)]
pub enum HostEvent {
    /// A process was released.
    Started {
        /// Its id on that host.
        pid: i32,
        /// What it is.
        process: Process,
        /// Highest token in the files of its instance there.
        on_disk: Token,
        /// The host's memory, in bytes.
        capacity: i64,
    },
    /// The token of a living process was raised.
    Raised {
        /// Its id.
        pid: i32,
        /// The token.
        token: Token,
    },
    /// A process was signalled, by the agent.
    Signalled {
        /// Its id.
        pid: i32,
        /// Whether it was ready.
        ready: bool,
    },
    /// A process was signalled, by its shim, because its lease was not renewed in time.
    LeaseLost {
        /// Its id.
        pid: i32,
        /// Whether it was ready.
        ready: bool,
    },
    /// A process has ended.
    Ended {
        /// Its id.
        pid: i32,
    },
}

#[derive(Debug, Default)]
pub(super) struct Hosts {
    alive: BTreeMap<(String, i32), Process>,
    /// Highest token released on a host for an instance.
    released: BTreeMap<(String, String), Token>,
}

impl Checker {
    /// Takes what has happened on `host`, which bears the node name `node`.
    pub fn host(&mut self, at_ms: i64, host: &str, node: &str, event: &HostEvent) {
        let mut broken = Vec::new();
        match event {
            HostEvent::Started { pid, process, on_disk, capacity } => {
                self.started(at_ms, host, node, process, *on_disk, *capacity, &mut broken);
                self.hosts.alive.insert((host.to_owned(), *pid), process.clone());
            }
            HostEvent::Raised { pid, token } => {
                if let Some(process) = self.hosts.alive.get_mut(&(host.to_owned(), *pid)) {
                    process.token = *token;
                }
            }
            HostEvent::Signalled { pid, ready } => {
                if let Some(process) = self.hosts.alive.get(&(host.to_owned(), *pid)).filter(|_| *ready) {
                    let key = (process.instance.clone(), process.token);
                    if self.made.get(&key).is_some_and(|made| !made.may_end) {
                        let message = format!(
                            "{} under {}: it was wanted and ready, and nothing above it was",
                            process.instance, process.token
                        );
                        broken.push((Rule::SignalledWhileWanted, message));
                    }
                }
            }
            HostEvent::LeaseLost { pid, ready } => {
                if let Some(process) = self.hosts.alive.get(&(host.to_owned(), *pid)).filter(|_| *ready) {
                    let key = (process.instance.clone(), process.token);
                    let keeps = !self.ends_with_lease(&process.instance);
                    if keeps && self.made.get(&key).is_some_and(|made| !made.may_end) {
                        let message = format!(
                            "{} under {}: it was wanted and ready, and its deployment does not let it end with the lease",
                            process.instance, process.token
                        );
                        broken.push((Rule::SignalledWhileWanted, message));
                    }
                }
            }
            HostEvent::Ended { pid } => {
                self.hosts.alive.remove(&(host.to_owned(), *pid));
            }
        }
        for (rule, message) in broken {
            self.violation(rule, self.state.revision, at_ms, format!("host {host}"), message);
        }
    }

    /// Whether the deployment of an instance says so, as it stands.
    fn ends_with_lease(&self, instance: &str) -> bool {
        let instance = self.state.instances.get(instance);
        let spec = instance.and_then(|instance| self.state.spec_of(&instance.value));
        spec.is_some_and(|spec| spec.on_lease_lost() == OnLeaseLost::Stop)
    }

    /// A claim went with its lease: what was to end before that lives no more.
    pub(super) fn outlived(&mut self, at_ms: i64, revision: i64, instance: &str) {
        if !self.ends_with_lease(instance) {
            return;
        }
        let mut broken = Vec::new();
        for ((host, pid), process) in self.hosts.alive.iter().filter(|(_, process)| process.instance == instance) {
            let made = self.made.get(&(instance.to_owned(), process.token));
            if made.is_some_and(|made| made.gone == Some((at_ms, true))) {
                broken.push((host.clone(), format!("pid {pid} of {instance} lives under {}", process.token)));
            }
        }
        for (host, message) in broken {
            self.violation(Rule::OutlivedLease, revision, at_ms, format!("host {host}"), message);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "one place")]
    fn started(
        &mut self,
        at_ms: i64,
        host: &str,
        node: &str,
        process: &Process,
        on_disk: Token,
        capacity: i64,
        broken: &mut Vec<(Rule, String)>,
    ) {
        let Process { instance, token, memory_bytes } = process;
        let place = (host.to_owned(), instance.clone());
        let highest = self.hosts.released.get(&place).copied().unwrap_or_default().max(on_disk);
        if *token < highest {
            broken.push((Rule::LowerTokenStarted, format!("{instance} under {token}; {highest} is known there")));
        }
        self.hosts.released.insert(place, highest.max(*token));
        match self.made.get(&(instance.clone(), *token)) {
            Some(made) if made.node == node => {
                if let Some((gone_ms, true)) = made.gone {
                    let message = format!("{instance} under {token}: its lease ran out {} ms ago", at_ms - gone_ms);
                    broken.push((Rule::StartedTooLate, message));
                }
            }
            other => {
                let owner = other.map_or("nobody", |made| made.node.as_str());
                broken
                    .push((Rule::StartedWithoutClaim, format!("{instance} under {token}, which {owner} has claimed")));
            }
        }
        for ((of, pid), other) in &self.hosts.alive {
            if other.instance == *instance && (of == host || other.token == *token) {
                broken.push((
                    Rule::SecondProcess,
                    format!("{instance} under {token}, and pid {pid} lives on {of} under {}", other.token),
                ));
            }
        }
        let others = self.hosts.alive.iter().filter(|((of, _), _)| of == host).map(|(_, other)| other.memory_bytes);
        let total = others.fold(*memory_bytes, i64::saturating_add);
        if total > capacity {
            broken.push((Rule::HostOversold, format!("live servers take {total} bytes of {capacity}")));
        }
    }
}
