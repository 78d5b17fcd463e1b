//! What others may ask of an instance's supervisor. Everything may be said again: it is level-triggered.

use super::claim::Claim;
use drover_proto::v1::Token;
use tokio::sync::{mpsc, oneshot};

/// What the registry asks of a supervisor.
#[derive(Debug)]
pub(super) enum Command {
    Want(bool, String),
    Force,
    Restore(Box<Claim>),
    Raise(Token, oneshot::Sender<bool>),
    Discard(oneshot::Sender<bool>),
}

/// Speaks to a supervisor. Everything may be said again: it is level-triggered.
#[derive(Debug, Clone)]
pub struct Handle(pub(super) mpsc::Sender<Command>);

impl Handle {
    /// Says whether the instance should run, and the traceparent of who says so.
    pub async fn want(&self, wanted: bool, traceparent: &str) {
        let _ = self.0.send(Command::Want(wanted, traceparent.to_owned())).await;
    }

    /// Ends the instance without waiting for what is in flight. False when its supervisor is gone, or too busy to hear it.
    #[must_use]
    pub fn force(&self) -> bool {
        self.0.try_send(Command::Force).is_ok()
    }

    /// Says what is claimed: a supervisor whose own file of it was lost takes it from here.
    pub async fn restore(&self, claim: Claim) {
        let _ = self.0.send(Command::Restore(Box::new(claim))).await;
    }

    /// Raises the token of the run, on disk first. False when that has failed.
    pub async fn raise(&self, token: Token) -> bool {
        let (answer, answered) = oneshot::channel();
        self.0.send(Command::Raise(token, answer)).await.is_ok() && answered.await.unwrap_or(false)
    }

    /// Removes everything of the instance. False, and nothing is done, while there is or may be a process.
    pub async fn discard(&self) -> bool {
        let (answer, answered) = oneshot::channel();
        self.0.send(Command::Discard(answer)).await.is_ok() && answered.await.unwrap_or(false)
    }
}
