//! What nodes are told, and what they say: known where the messages are, as in a simulation.

use super::{Checker, Rule};
use drover_proto::v1::{ClaimSet, InstanceState, Token};

/// A message between an agent and a coordinator.
#[derive(Debug)]
pub enum Said<'a> {
    /// A hello has reached a coordinator.
    Hello {
        /// Number of the stream.
        stream: u64,
        /// Id of the session that the agent means to resume; empty for none.
        resumes: &'a str,
        /// Id that it has chosen for a new one, and may have opened already; empty for none.
        chosen: &'a str,
    },
    /// A welcome has left a coordinator.
    Welcome {
        /// Number of the stream: the welcome answers the hello that came by it.
        stream: u64,
        /// The session.
        session_id: &'a str,
        /// Its revision.
        session_revision: i64,
        /// Whether it existed before.
        resumed: bool,
    },
    /// A set of claims has left a coordinator.
    Claims(&'a ClaimSet),
    /// A claim was answered as made.
    Claimed {
        /// The instance.
        instance: &'a str,
        /// Nonce of the request.
        nonce: &'a str,
        /// The token told.
        token: Token,
    },
}

/// A hello that waits for its welcome.
#[derive(Debug, Clone)]
pub(super) struct Hello {
    resumes: String,
    chosen: String,
    revision: i64,
    stood: Option<String>,
}

impl Checker {
    /// Takes what was said; `node` is the agent's.
    pub fn told(&mut self, at_ms: i64, node: &str, said: &Said<'_>) {
        let mut broken = Vec::new();
        match said {
            Said::Hello { stream, resumes, chosen } => {
                let stood = self.state.sessions.get(node).map(|s| s.value.session_id.clone());
                let hello = Hello {
                    resumes: (*resumes).to_owned(),
                    chosen: (*chosen).to_owned(),
                    revision: self.state.revision,
                    stood,
                };
                self.hellos.insert((node.to_owned(), *stream), hello);
            }
            Said::Welcome { stream, session_id, session_revision, resumed } => {
                let hello = self.hellos.remove(&(node.to_owned(), *stream));
                if let Some(hello) = hello {
                    let named = [&hello.resumes, &hello.chosen].into_iter().any(|id| id == session_id);
                    if !named && (*resumed || hello.stood.as_deref() == Some(*session_id)) {
                        let message =
                            format!("its hello named session \"{}\", it was given {session_id}", hello.resumes);
                        broken.push((Rule::SessionHandedOver, message));
                    }
                    if *session_revision <= hello.revision {
                        let message =
                            format!("welcomed at revision {session_revision}; its hello came at {}", hello.revision);
                        broken.push((Rule::ResumedWithoutBump, message));
                    }
                }
                if !self.welcomed.insert((node.to_owned(), *session_revision)) {
                    broken.push((Rule::ResumedWithoutBump, format!("welcomed twice at revision {session_revision}")));
                }
            }
            Said::Claims(set) => self.set(set, &mut broken),
            Said::Claimed { instance, nonce, token } => {
                self.generation(*token, &mut broken);
                let key = ((*instance).to_owned(), *token);
                let made = self.made.get(&key).is_some_and(|made| made.node == node && made.nonce == *nonce);
                if !made {
                    let message =
                        format!("{node} was told that it owns {instance} under {token}: no such claim was made");
                    broken.push((Rule::AnsweredUnknownClaim, message));
                }
            }
        }
        for (rule, message) in broken {
            self.violation(rule, self.state.revision, at_ms, format!("node {node}"), message);
        }
    }

    fn generation(&self, token: Token, broken: &mut Vec<(Rule, String)>) {
        let generation = self.state.generation();
        if token.generation != generation {
            broken.push((
                Rule::TokenOfOtherGeneration,
                format!("{token} was told, the store's generation is {generation}"),
            ));
        }
    }

    fn set(&self, set: &ClaimSet, broken: &mut Vec<(Rule, String)>) {
        for owned in &set.claims {
            self.generation(owned.token.unwrap_or_default(), broken);
        }
        if set.end_runs.is_empty() {
            return;
        }
        // The last state that is not later than the set: revisions that changed no record are not kept.
        let Some(then) = self.past.iter().rev().find(|state| state.revision <= set.revision) else { return };
        for order in &set.end_runs {
            let instance = then.instances.get(&order.instance);
            let wanted = instance.is_some_and(|i| i.value.wanted);
            let token = then.token(&order.instance);
            let holds = match order.yields_to {
                // Nobody wants it, and nobody can claim it again.
                None => !wanted && (instance.is_some() || token.is_none()),
                Some(to) => token == Some(to) && then.state(&order.instance) == InstanceState::Ready,
            };
            if !holds {
                let to = order.yields_to.map_or_else(|| "nobody".to_owned(), |to| to.to_string());
                let message = format!(
                    "{} is to yield to {to} at revision {}: wanted {wanted}, claimed under {}, {}",
                    order.instance,
                    set.revision,
                    token.map_or_else(|| "none".to_owned(), |token| token.to_string()),
                    then.state(&order.instance).as_str_name()
                );
                broken.push((Rule::DrainOrder, message));
            }
        }
    }

    /// A heartbeat or a hello of a node was delivered: each may renew the lease of its session once.
    pub fn asked_for_renewal(&mut self, node: &str) {
        *self.renewals.entry(node.to_owned()).or_default() -= 1;
    }

    /// The lease of a node's session was renewed.
    pub fn renewed(&mut self, at_ms: i64, node: &str) {
        let more = self.renewals.entry(node.to_owned()).or_default();
        *more += 1;
        if *more > 0 {
            let more = *more;
            let message = format!("{more} renewals more than were asked for");
            self.violation(Rule::RenewedWithoutHeartbeat, self.state.revision, at_ms, format!("node {node}"), message);
        }
    }

    /// An agent takes `deadline_ms` for the end of its session, whose lease lives until `lease_until_ms` as things stand.
    pub fn deadline(&mut self, at_ms: i64, node: &str, deadline_ms: i64, lease_until_ms: i64) {
        if deadline_ms > lease_until_ms {
            let message = format!("its deadline is {} ms after the end of its lease", deadline_ms - lease_until_ms);
            self.violation(Rule::DeadlineBeyondLease, self.state.revision, at_ms, format!("node {node}"), message);
        }
    }

    /// A task has panicked.
    pub fn panicked(&mut self, at_ms: i64, program: &str, what: &str) {
        self.violation(Rule::Panicked, self.state.revision, at_ms, program.to_owned(), what.to_owned());
    }

    /// The fleet has not come to what was asked of it.
    pub fn not_reached(&mut self, at_ms: i64, what: &str) {
        self.violation(Rule::EndState, self.state.revision, at_ms, "fleet".to_owned(), what.to_owned());
    }
}
