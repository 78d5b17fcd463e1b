//! Opening a stream: hello and welcome, and which session of this host they are about.

use super::{
    super::{
        heartbeats::Wanted,
        remote::Incoming,
        stream::{OUTGOING, Stream, message},
    },
    Session, lives_from, milliseconds,
};
use crate::clock::boottime_ns;
use anyhow::{Context as _, bail};
use drover_proto::{
    PROTOCOL_MAX, PROTOCOL_MIN, VERSION,
    status::{reason, reason_of},
    v1::{Hello, SessionRequest, Welcome, session_request, session_response},
};
use std::{collections::HashMap, time::Duration};
use tokio::{sync::mpsc, time::timeout};

/// Longest wait for the answer to a hello.
const WELCOME_DEADLINE: Duration = Duration::from_secs(5);
/// The same while the session lives: what is left of it must do for another coordinator too.
const WELCOME_DEADLINE_MIN: Duration = Duration::from_secs(1);

impl Session {
    pub(super) async fn open(&mut self, first: &mut usize) -> anyhow::Result<Stream> {
        let hello = self.hello()?;
        let (at, mut coordinator) = self.coordinators.connect(*first).await?;
        *first = at;
        let (outgoing, requests) = mpsc::channel(OUTGOING);
        let sent_ns = boottime_ns();
        let deadline = welcome_deadline(self.registry.context().session.left());
        outgoing.send(message(session_request::Message::Hello(hello))).await?;
        let opened =
            timeout(deadline, coordinator.session(requests)).await.context("the coordinator does not answer")?;
        let mut incoming = opened.map_err(|status| explain(&status))?;
        let answer = timeout(deadline, incoming.message()).await.context("no answer to the hello in time")?;
        let answer = answer.map_err(|status| explain(&status))?.context("the coordinator closed the stream")?;
        let Some(session_response::Message::Welcome(welcome)) = answer.message else {
            bail!("the coordinator's first message is no welcome");
        };
        self.welcomed(welcome, at, outgoing, incoming, sent_ns)
    }

    /// Holds the session that is to be resumed; false when another agent of this host has it.
    fn hold(&mut self, id: &str) -> bool {
        if id.is_empty() || self.held.as_ref().is_some_and(|(held, _)| held == id) {
            return true;
        }
        let held = self.registry.context().machine.hold_session(id);
        let Some(held) = held else { return false };
        self.held = Some((id.to_owned(), held));
        true
    }

    /// Lets go of a session that this agent knows from its disk alone: it may be that of another agent of this host, which
    /// must not wait for one that is refused.
    pub(super) fn let_go(&mut self) {
        let ours = self.identity.session().id;
        self.held.take_if(|(held, _)| *held != ours);
    }

    fn hello(&mut self) -> anyhow::Result<Hello> {
        let runs = self.registry.recorded_runs();
        runs.iter().filter_map(|run| run.token).for_each(|token| self.identity.saw(token));
        let about = self.identity.introduction();
        if !self.hold(&about.session_id) {
            bail!(
                "another agent of this host has this node's session: state_dir = {} is a copy of its, or its of this one: \
                 run one agent, or give this one a name and a state_dir of its own",
                self.registry.context().settings.state_dir.display()
            );
        }
        Ok(Hello {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL_MAX,
            agent_version: VERSION.to_owned(),
            machine_id: self.about.machine_id.clone(),
            boot_id: self.about.boot_id.clone(),
            agent_id: about.agent_id,
            resume_session_id: about.session_id,
            new_session_id: about.next_session_id,
            store_id: about.store_id,
            store_generation: about.store_generation,
            store_revision: about.store_revision,
            labels: self.about.labels.clone().into_iter().collect::<HashMap<_, _>>(),
            capacity: Some(self.capacity.borrow().clone()),
            proxy_address: self.about.proxy_address.clone(),
            runs,
            models: Some(self.models.borrow().clone()),
        })
    }

    fn welcomed(
        &mut self,
        welcome: Welcome,
        coordinator: usize,
        outgoing: mpsc::Sender<SessionRequest>,
        incoming: Incoming,
        sent_ns: u64,
    ) -> anyhow::Result<Stream> {
        let (ttl, interval) = (milliseconds(welcome.ttl_ms), milliseconds(welcome.heartbeat_interval_ms));
        if ttl.is_zero() || interval.is_zero() {
            bail!("the coordinator's welcome has ttl {ttl:?} and heartbeat interval {interval:?}");
        }
        if !(PROTOCOL_MIN..=PROTOCOL_MAX).contains(&welcome.protocol) {
            bail!(
                "the coordinator speaks protocol {}, this agent {PROTOCOL_MIN} to {PROTOCOL_MAX}: upgrade the older one",
                welcome.protocol
            );
        }
        self.identity.welcome(&welcome, coordinator, &self.registry.context().events).map_err(anyhow::Error::msg)?;
        if !self.hold(&welcome.session_id) {
            tracing::warn!(
                session = welcome.session_id,
                "another process of this host has a name made of this session's id"
            );
        }
        self.registry.context().session.welcome(&welcome.session_id, lives_from(sent_ns), ttl);
        let session = self.identity.session();
        tracing::info!(
            session = welcome.session_id,
            coordinator = welcome.coordinator,
            resumed = welcome.resumed,
            ttl_ms = welcome.ttl_ms,
            "this node has a session"
        );
        self.models.mark_unchanged();
        // What has changed since the hello was written is told once more.
        self.capacity.mark_changed();
        let stream = Stream::new(session, welcome.store_generation, ttl, interval, outgoing, incoming);
        self.beating.send_replace(Some(Wanted {
            stream: stream.number,
            session_id: stream.session_id.clone(),
            revision: welcome.session_revision,
            coordinator,
            ttl,
            interval,
        }));
        self.take_claims(&stream, welcome.claims.unwrap_or_default());
        Ok(stream)
    }
}

/// PURE. How long to wait for the answer to a hello when so much is left of the session.
fn welcome_deadline(left: Duration) -> Duration {
    if left.is_zero() { WELCOME_DEADLINE } else { (left / 2).clamp(WELCOME_DEADLINE_MIN, WELCOME_DEADLINE) }
}

/// What a refusal means, with the way out.
pub(super) fn explain(status: &tonic::Status) -> anyhow::Error {
    let text = format!("{}: {}", status.code(), status.message());
    match reason_of(status).as_deref() {
        Some(reason::SESSION_EXISTS) => anyhow::anyhow!(
            "the node has a session that this agent does not get; it ends by itself unless its owner returns, and this agent waits ({text})"
        ),
        Some(reason::NODE_BOUND) => anyhow::anyhow!("this node's name belongs to another machine: rename one ({text})"),
        Some(reason::UNAUTHENTICATED) => {
            anyhow::anyhow!("the join secret is not the fleet's: see join_secret_file ({text})")
        }
        _ => anyhow::anyhow!("{text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_waits_no_longer_than_half_of_what_is_left_of_the_session() {
        let deadline = |left_ms: u64| welcome_deadline(Duration::from_millis(left_ms)).as_millis();
        assert_eq!([0, 100, 4_000, 60_000].map(deadline), [5_000, 1_000, 2_000, 5_000]);
    }
}
