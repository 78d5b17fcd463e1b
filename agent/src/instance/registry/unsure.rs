//! Runs whose process can't be told, as where /proc does not show it: what is done with them goes by what is known.
//!
//! One that answers at its socket for its model goes on serving, under its claim. None is signalled, and nothing is started
//! in its place. Each is looked at again with every set of claims, and taken back as soon as it can be told.

use super::super::{
    adopt::{Left, Unsure},
    board::Entry,
    claim::Claim,
    context::Context,
    supervisor::{self, Begin},
};
use super::{Inner, Kind, Known, Registry};
use crate::{
    clock,
    proxy::{Route, RouteState},
};
use drover_proto::v1::{InstanceState, Severity};
use drover_shim::record::Directory;

/// Tells that a run can't be told.
pub(super) fn tell(context: &Context, instance: &str, unsure: &Unsure) {
    context.events.tell(instance, "IdentityUnknown", Severity::Warning, message(true, unsure));
}

fn message(wanted: bool, unsure: &Unsure) -> String {
    let Unsure { why, pid, answers, .. } = unsure;
    let state = if *answers { "its socket answers for its model" } else { "its socket does not answer for its model" };
    let then = match (wanted, answers) {
        (true, true) => "it goes on serving".to_owned(),
        (true, false) => "nothing is started in its place".to_owned(),
        (false, _) => {
            format!("it is not signalled before that can be told: if pid {pid} is its server, end it by hand")
        }
    };
    format!("it can't be told whether its server still runs: {why}; {state}: {then}")
}

/// The way to a run that can't be told.
pub(super) fn route(context: &Context, claim: &Claim, wanted: bool, unsure: &Unsure) -> Route {
    Route {
        instance: claim.instance.clone(),
        token: claim.token,
        socket: context.settings.socket_of(&claim.instance),
        log_dir: Directory::new(context.settings.instances_dir().join(&claim.instance)).log(),
        state: if wanted && unsure.answers { RouteState::Open } else { RouteState::Draining },
    }
}

impl Registry {
    /// Looks again at what could not be told.
    pub(super) async fn look_again(&self, inner: &mut Inner) {
        let unknown = inner.instances.iter().filter(|(_, known)| matches!(known.kind, Kind::Unknown(..)));
        let unknown: Vec<String> = unknown.map(|(instance, _)| instance.clone()).collect();
        // Each waits for an answer of a server: all at the same time, as others wait for this.
        let looks = unknown.iter().map(|instance| self.context.machine.look(&self.context, instance.clone()));
        let found = futures::future::join_all(looks).await;
        for (instance, (claim, directory, left)) in unknown.into_iter().zip(found) {
            let token = claim.token;
            let kind = match left {
                Left::Unknown(unsure) => {
                    if let Some(Known { kind: Kind::Unknown(_, before), .. }) = inner.instances.get_mut(&instance) {
                        if *before != unsure {
                            tell(&self.context, &instance, &unsure);
                        }
                        *before = unsure;
                    }
                    continue;
                }
                Left::Ended(ended) => Kind::Dormant(Box::new(claim), ended),
                Left::Living { run, ready } => {
                    let message = format!("pid {} can be told again: it is its server", run.living.pid());
                    self.context.events.tell(&instance, "IdentityKnown", Severity::Info, message);
                    let begin = Begin::Adopted { run, ready };
                    Kind::Supervised(supervisor::spawn(self.context.clone(), claim, directory, begin))
                }
            };
            inner.instances.insert(instance, Known { token, kind });
        }
    }

    /// Keeps a run that can't be told as its claim wants it, as far as that goes.
    pub(super) async fn keep_unsure(&self, claim: &Claim, wanted: bool, unsure: &Unsure) {
        let route = route(&self.context, claim, wanted, unsure);
        if !self.context.routes.has(&route) {
            self.context.routes.set(route).await;
        }
        let state = match (wanted, unsure.answers) {
            (true, true) => InstanceState::Ready,
            // It has its time as any other start: one that gets nowhere is given up.
            (true, false) if unsure.starting => InstanceState::Starting,
            (true, false) => InstanceState::Suspect,
            (false, _) => InstanceState::Draining,
        };
        let message = message(wanted, unsure);
        let before = self.context.board.get(&claim.instance).filter(|entry| entry.state == state);
        // Since when it is ready an earlier agent may know.
        let stored = claim.since.filter(|(since, _)| *since == state).map(|(_, at)| at);
        let since = before.map(|entry| entry.since).or(stored).unwrap_or_else(clock::now);
        let entry = Entry {
            token: claim.token,
            owned: true,
            state,
            pid: unsure.pid,
            restarts: claim.restarts,
            message,
            since,
            progressed_at: since,
            traceparent: String::new(),
            exit_code: None,
            exit_signal: None,
            memory_bytes: claim.memory_bytes,
        };
        self.context.board.set(&claim.instance, entry);
    }
}
