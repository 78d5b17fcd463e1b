//! What is on disk of an instance: kept for the next agent, raised to a new token, removed at the end.
//!
//! The state directory lies on a disk of this host. A write there waits for that disk; an instance whose files can't be
//! written has nothing else to do.

use super::{
    super::{
        claim::{self, Claim},
        state::{Event, Phase, Process},
    },
    Supervisor,
};
use drover_proto::v1::Token;
use drover_shim::failpoint::{self, Step};
use std::time::Duration;
use tokio::task::JoinSet;

/// How long a shim is waited for whose server has ended, and how often it is looked at.
const SHIM_PATIENCE: Duration = Duration::from_secs(1);
const SHIM_POLL: Duration = Duration::from_millis(5);

impl Supervisor {
    /// Keeps what the next agent has to know.
    pub(super) fn keep(&mut self) {
        let failed = (self.state.phase == Phase::Failed).then(|| self.state.message.clone());
        let lasting = matches!(self.state.phase, Phase::Ready | Phase::Failed);
        if failed == self.claim.failed && self.state.restarts == self.claim.restarts && !lasting {
            return;
        }
        if lasting {
            self.claim.since = Some((self.state.reported(), self.since));
        }
        self.claim.failed = failed;
        self.claim.restarts = self.state.restarts;
        if let Err(error) = self.context.machine.keep(&self.claim, &self.directory) {
            tracing::warn!(instance = self.claim.instance, %error, "what was learnt is not on disk");
        }
    }

    /// Takes what is to run, and what it reserves, from the set of claims when the file that said so was lost: the next
    /// start needs it.
    pub(super) fn restore(&mut self, claim: Claim) {
        if !self.claim.is_lost() || claim.is_lost() {
            return;
        }
        let lost = &self.claim;
        self.policy = self.context.policy(&claim.spec);
        self.claim = Claim {
            token: lost.token,
            restarts: lost.restarts,
            failed: lost.failed.clone(),
            since: lost.since,
            ..claim
        };
        if let Err(error) = self.context.machine.keep(&self.claim, &self.directory) {
            tracing::warn!(instance = self.claim.instance, %error, "the restored claim is not on disk");
        }
        self.publish();
    }

    /// Raises the token, unless a launch is under way: then its outcome comes first.
    pub(super) async fn settle_raises(&mut self) {
        if self.state.process == Process::Launching {
            return;
        }
        for (token, answer) in std::mem::take(&mut self.raises) {
            let is_higher = token > self.claim.token;
            let raised = !is_higher || self.raise(token);
            if raised {
                self.context.routes.set(self.route()).await;
                failpoint::at(Step::RaiseRouted);
            }
            if raised && is_higher {
                self.take(Event::ClaimedAgain).await;
            }
            self.publish();
            let _ = answer.send(raised);
        }
    }

    fn raise(&mut self, token: Token) -> bool {
        let claim = Claim { token, ..self.claim.clone() };
        match self.context.machine.raise(&claim, &self.directory) {
            Ok(()) => {
                failpoint::at(Step::RaiseClaimWritten);
                if let Some((_, record)) = &mut self.run {
                    record.token = claim::stored_token(token);
                }
                self.claim = claim;
                true
            }
            Err(error) => {
                tracing::error!(instance = self.claim.instance, %error, "the token could not be raised to {token}");
                false
            }
        }
    }

    /// Removes everything of the instance; false, and nothing is removed, while a shim does not let go of it.
    pub(super) async fn discard(&mut self) -> bool {
        failpoint::at(Step::StopReported);
        self.context.leases.forget(&self.claim.instance);
        let removed = async {
            // One that has made the end durable lets go in a moment.
            while !self.context.machine.remove(&self.directory, &self.socket) {
                tokio::time::sleep(SHIM_POLL).await;
            }
        };
        if tokio::time::timeout(SHIM_PATIENCE, removed).await.is_err() {
            return false;
        }
        failpoint::at(Step::StopRemoved);
        self.tasks = JoinSet::new();
        self.context.routes.remove(&self.claim.instance);
        self.context.board.remove(&self.claim.instance);
        true
    }
}
