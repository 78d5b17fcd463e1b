//! What follows from claims: instances are begun, raised to a new token, told to stop, removed.

use super::super::{
    adopt::Unsure,
    board::Entry,
    claim::Claim,
    supervisor::{self, Begin},
    trace,
};
use super::{Inner, Kind, Known, Registry, SessionSet, Unowned};
use crate::{clock, mutant};
use drover_proto::v1::{EndRun, InstanceState, OwnedClaim, Severity, Token};
use drover_shim::failpoint::{self, Step};
use tracing::Span;

impl Registry {
    /// A claim was made under the session of this id: starts the instance, or raises the token of the run that is here. A
    /// set of claims that was read later and applied before this answer was heard knows better: a stop wins over a start in
    /// flight, and a claim that is gone starts nothing. With its session every claim is gone: then the set of the next one
    /// tells.
    pub async fn claimed(&self, session: &str, claim: Claim, span: Span) {
        failpoint::at(Step::StartClaimed);
        let mut inner = self.inner.lock().await;
        inner.claiming.remove(&claim.instance);
        if !self.context.session.is(session) && !mutant::on(mutant::name::START_UNDER_A_LOST_SESSION) {
            let (instance, token) = (&claim.instance, claim.token);
            tracing::warn!(instance, %token, "the answer to a claim came when its session was gone, and the claim with it");
            return;
        }
        let later = inner.latest.as_ref().filter(|latest| latest.covers(claim.token));
        let (wanted, traceparent) = match later {
            None => (true, String::new()),
            Some(SessionSet { set, .. }) => {
                let same = |o: &&OwnedClaim| o.instance == claim.instance && o.token == Some(claim.token);
                let Some(owned) = set.claims.iter().find(same) else {
                    tracing::warn!(instance = claim.instance, token = %claim.token, "the claim is gone before its answer came");
                    return;
                };
                (owned.wanted, owned.traceparent.clone())
            }
        };
        self.own(&mut inner, session, claim, wanted, &traceparent, Some(span)).await;
    }

    /// Applies a set of claims of a session; of one session, an older set after a newer one is void. Returns the runs
    /// that no claim covers and that nobody has ordered to end.
    pub async fn apply(&self, set: SessionSet) -> Vec<Unowned> {
        let mut inner = self.inner.lock().await;
        let newer = |latest: &SessionSet| latest.stream == set.stream && latest.read_at() > set.read_at();
        if inner.latest.as_ref().is_some_and(newer) {
            return Vec::new();
        }
        let session = set.session.clone();
        inner.latest = Some(set);
        let unowned = self.reconcile(&mut inner).await;
        // Whatever the session before has owned has heard by now that it is owned no more.
        self.context.session.settle(&session);
        unowned
    }

    /// Applies the last set again: what could not be done then may be possible now.
    pub async fn apply_again(&self) -> Vec<Unowned> {
        let mut inner = self.inner.lock().await;
        if inner.latest.is_none() { Vec::new() } else { self.reconcile(&mut inner).await }
    }

    async fn reconcile(&self, inner: &mut Inner) -> Vec<Unowned> {
        let Some(latest) = inner.latest.clone() else { return Vec::new() };
        let set = &latest.set;
        self.look_again(inner).await;
        for owned in &set.claims {
            // Where a claim is under way its own answer comes first.
            if !inner.claiming.contains_key(&owned.instance) {
                self.own(inner, &latest.session, claim_of(owned), owned.wanted, &owned.traceparent, None).await;
            }
        }
        let mut unowned = Vec::new();
        let others: Vec<String> = inner
            .instances
            .iter()
            .filter(|(instance, known)| {
                let claimed = set.claims.iter().any(|c| c.instance == **instance);
                // A claim made after the set was read can't be in it.
                let later = self.context.board.get(instance).is_some_and(|e| e.owned) && !latest.covers(known.token);
                !claimed && !later && !inner.claiming.contains_key(*instance)
            })
            .map(|(instance, _)| instance.clone())
            .collect();
        for instance in others {
            self.context.board.set_owned(&instance, false);
            let order = set.end_runs.iter().find(|order| order.instance == instance);
            if let Some(run) = self.disown(inner, &instance, order).await {
                unowned.push(run);
            }
        }
        unowned
    }

    /// Makes what is here fit a claim that this node holds under a session.
    async fn own(
        &self,
        inner: &mut Inner,
        session: &str,
        claim: Claim,
        wanted: bool,
        traceparent: &str,
        span: Option<Span>,
    ) {
        let (instance, token) = (claim.instance.clone(), claim.token);
        self.context.leases.cover(&self.context, session, &claim, self.directory(&instance));
        let known = inner.instances.take(&instance);
        let kind = match known {
            // An answer that was overtaken: a higher token is known here already.
            Some(known) if known.token > token => {
                inner.instances.insert(instance, known);
                return;
            }
            Some(Known { kind: Kind::Supervised(handle), token: old }) => {
                if token > old && !handle.raise(token).await {
                    // Not durable: it stays under the old token, and this is tried again.
                    inner.instances.insert(instance, Known { token: old, kind: Kind::Supervised(handle) });
                    return;
                }
                self.context.board.set_owned(&instance, true);
                handle.restore(claim).await;
                handle.want(wanted, traceparent).await;
                handle.own(true).await;
                Kind::Supervised(handle)
            }
            Some(Known { kind: Kind::Unknown(stored, unsure), token: old }) => {
                let raised =
                    if token > old { self.context.machine.raise(&claim, &self.directory(&instance)) } else { Ok(()) };
                let claim = Claim { restarts: stored.restarts, since: stored.since, ..claim };
                self.keep_unsure(&claim, wanted, &unsure).await;
                let kind = Kind::Unknown(stored, unsure);
                if let Err(error) = raised {
                    // It serves on all the same; not durable: it stays under the old token, and this is tried again.
                    tracing::warn!(instance, %error, "the token could not be raised to {token} on disk");
                    inner.instances.insert(instance, Known { token: old, kind });
                    return;
                }
                kind
            }
            Some(Known { kind: Kind::Dormant(stored, ended), .. }) if wanted => {
                let claim =
                    Claim { restarts: stored.restarts, failed: stored.failed.clone(), since: stored.since, ..claim };
                let begin = match (&claim.failed, ended.clone()) {
                    (Some(message), _) => Begin::Failed(message.clone()),
                    (None, Some(ended)) => Begin::Ended(ended),
                    (None, None) => Begin::Claimed(trace::start(&instance, &claim.spec.name, traceparent)),
                };
                match self.begin(inner, claim, begin) {
                    // What an earlier agent has learnt counts with the next attempt too.
                    Kind::Nothing => Kind::Dormant(stored, ended),
                    kind => kind,
                }
            }
            Some(Known { kind: Kind::Dormant(stored, _), .. }) => {
                if self.remove(&instance) {
                    self.post(&claim, InstanceState::Stopped, "");
                    Kind::Nothing
                } else {
                    Kind::Unknown(stored, Unsure::because("what an ended run has left is still at work"))
                }
            }
            Some(Known { kind: Kind::Nothing, .. }) | None if wanted && !self.has_stopped(&claim) => {
                let span = span.unwrap_or_else(|| trace::start(&instance, &claim.spec.name, traceparent));
                self.begin(inner, claim, Begin::Claimed(span))
            }
            // Nothing is here, and it is not wanted, or was reported stopped: that is all there is to say.
            Some(Known { kind: Kind::Nothing, .. }) | None => {
                self.post(&claim, InstanceState::Stopped, "");
                Kind::Nothing
            }
        };
        inner.instances.insert(instance, Known { token, kind });
    }

    /// What follows when no claim of this node covers an instance.
    async fn disown(&self, inner: &mut Inner, instance: &str, order: Option<&EndRun>) -> Option<Unowned> {
        let known = inner.instances.get(instance)?;
        let token = known.token;
        // An agent that has found it so has nothing of it on the board before it is claimed.
        let stored = if let Kind::Unknown(claim, _) = &known.kind { Some(claim.memory_bytes) } else { None };
        let gone = match &known.kind {
            Kind::Nothing => {
                self.context.board.remove(instance);
                true
            }
            Kind::Dormant(claim, _) => {
                if !self.remove(instance) {
                    // A shim is at work: what comes of it is seen when this is looked at again.
                    let unsure = Unsure::because("what an ended run has left is still at work");
                    let kind = Kind::Unknown(claim.clone(), unsure);
                    inner.instances.insert(instance.to_owned(), Known { token, kind });
                    return None;
                }
                true
            }
            // One that serves is claimed again as any other that does.
            Kind::Unknown(_, unsure) if !unsure.answers => return None,
            Kind::Unknown(..) => false,
            Kind::Supervised(handle) => {
                handle.own(false).await;
                // Void once this node holds the token that it is to yield to.
                let ordered = order.is_some_and(|order| order.yields_to.is_none_or(|to| to > token));
                if ordered {
                    self.tell_ordered(instance, token, order);
                    handle.want(false, "").await;
                }
                // One that was discarded too late to be heard has left nothing either.
                handle.discard().await || (handle.is_over() && self.context.board.get(instance).is_none())
            }
        };
        if gone {
            inner.instances.remove(instance);
            return None;
        }
        let entry = self.context.board.get(instance);
        let ending =
            entry.as_ref().is_some_and(|e| matches!(e.state, InstanceState::Draining | InstanceState::Stopped));
        let memory_bytes = entry.map(|entry| entry.memory_bytes).or(stored)?;
        (!ending).then(|| Unowned { instance: instance.to_owned(), token, memory_bytes })
    }

    /// Tells, once, that a run ends which this node does not own.
    fn tell_ordered(&self, instance: &str, token: Token, order: Option<&EndRun>) {
        let ending = |entry: &Entry| matches!(entry.state, InstanceState::Draining | InstanceState::Stopped);
        let Some(entry) = self.context.board.get(instance).filter(|entry| !ending(entry)) else { return };
        let why = match order.and_then(|order| order.yields_to) {
            Some(to) => format!("it serves elsewhere under token {to}"),
            None => "it is wanted no more".to_owned(),
        };
        let message = format!("pid {}, token {token}: {why}; it is drained and stopped here", entry.pid);
        self.context.events.tell(instance, "Superseded", Severity::Info, message);
    }

    /// Begins an instance: its directory first, then its supervisor.
    fn begin(&self, inner: &Inner, claim: Claim, begin: Begin) -> Kind {
        inner.instances.begins(&claim.instance, claim.token, claim.memory_bytes);
        let directory = self.directory(&claim.instance);
        match self.context.machine.prepare(&claim, &directory) {
            Ok(()) => {
                failpoint::at(Step::StartClaimWritten);
                Kind::Supervised(supervisor::spawn(self.context.clone(), claim, directory, begin))
            }
            Err(error) => {
                let message = format!("its directory can't be prepared; this is tried again: {error}");
                if self.post(&claim, InstanceState::Backoff, &message) {
                    self.context.events.tell(&claim.instance, "BackOff", Severity::Warning, message);
                }
                Kind::Nothing
            }
        }
    }

    /// Whether it has stopped under this token. That is final: its report gives the claim back.
    fn has_stopped(&self, claim: &Claim) -> bool {
        let entry = self.context.board.get(&claim.instance);
        entry.is_some_and(|entry| entry.token == claim.token && entry.state == InstanceState::Stopped)
    }

    /// Puts the state of an instance without a supervisor on the board. False when it is there already.
    fn post(&self, claim: &Claim, state: InstanceState, message: &str) -> bool {
        let before = self.context.board.get(&claim.instance).filter(|e| e.state == state && e.message == message);
        let is_news = before.is_none();
        let since = before.map_or_else(clock::now, |entry| entry.since);
        let entry = Entry {
            token: claim.token,
            owned: true,
            state,
            pid: 0,
            restarts: claim.restarts,
            message: message.to_owned(),
            since,
            progressed_at: since,
            traceparent: String::new(),
            exit_code: None,
            exit_signal: None,
            memory_bytes: 0,
        };
        self.context.board.set(&claim.instance, entry);
        is_news
    }

    /// Removes the files of an instance without a process; false while a shim is at work there.
    fn remove(&self, instance: &str) -> bool {
        self.context.leases.forget(instance);
        self.context.machine.remove(&self.directory(instance), &self.context.settings.socket_of(instance))
    }
}

fn claim_of(owned: &OwnedClaim) -> Claim {
    Claim {
        instance: owned.instance.clone(),
        token: owned.token.unwrap_or_default(),
        spec: owned.spec.clone().unwrap_or_default(),
        revision: owned.revision,
        memory_bytes: owned.memory_bytes,
        restarts: 0,
        failed: None,
        since: None,
    }
}
