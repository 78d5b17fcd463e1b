//! What others may ask of an instance's supervisor. Everything may be said again: it is level-triggered.

use super::claim::Claim;
use drover_proto::v1::Token;
use std::time::Duration;
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

/// How long a raise is waited for.
const RAISE_WITHIN: Duration = Duration::from_secs(1);
/// How long a supervisor whose queue is full is waited for. What it does not hear is said again with the next round.
const HEARD_WITHIN: Duration = Duration::from_secs(1);
/// How long the removal of an instance is waited for: its shim has a second of it.
const DISCARDED_WITHIN: Duration = Duration::from_secs(3);

/// What the registry asks of a supervisor.
#[derive(Debug)]
pub(super) enum Command {
    Want(bool, String),
    Own(bool),
    Force,
    Restore(Box<Claim>),
    Raise(Token, oneshot::Sender<bool>),
    Discard(oneshot::Sender<bool>),
}

/// Speaks to a supervisor. Everything may be said again: it is level-triggered. Who asks holds up all other instances of the node,
/// so no supervisor is waited for without a deadline: one may hang with the disk that it writes to.
#[derive(Debug, Clone)]
pub struct Handle(pub(super) mpsc::Sender<Command>);

impl Handle {
    /// Says whether the instance should run, and the traceparent of who says so.
    pub async fn want(&self, wanted: bool, traceparent: &str) {
        self.say(Command::Want(wanted, traceparent.to_owned())).await;
    }

    /// Says whether a claim of this node covers the instance. To be said after what it wants, which a claim brings along.
    pub async fn own(&self, owned: bool) {
        self.say(Command::Own(owned)).await;
    }

    async fn say(&self, command: Command) {
        let _ = timeout(HEARD_WITHIN, self.0.send(command)).await;
    }

    /// Whether its supervisor has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.is_closed()
    }

    /// Ends the instance without waiting for what is in flight. False when its supervisor is gone, or too busy to hear it.
    #[must_use]
    pub fn force(&self) -> bool {
        self.0.try_send(Command::Force).is_ok()
    }

    /// Says what is claimed: a supervisor whose own file of it was lost takes it from here.
    pub async fn restore(&self, claim: Claim) {
        self.say(Command::Restore(Box::new(claim))).await;
    }

    /// Raises the token of the run, on disk first. False when that has failed, or is not done in a moment: a launch comes first,
    /// and who asks keeps everybody else waiting. What is done later stands, and raising again to the same token is no error.
    pub async fn raise(&self, token: Token) -> bool {
        let (answer, answered) = oneshot::channel();
        let raised =
            async { self.0.send(Command::Raise(token, answer)).await.is_ok() && answered.await.unwrap_or(false) };
        timeout(RAISE_WITHIN, raised).await.unwrap_or(false)
    }

    /// Removes everything of the instance. False, and nothing is done, while there is or may be a process; also when it is not
    /// done in time.
    pub async fn discard(&self) -> bool {
        let (answer, answered) = oneshot::channel();
        let discarded =
            async { self.0.send(Command::Discard(answer)).await.is_ok() && answered.await.unwrap_or(false) };
        timeout(DISCARDED_WITHIN, discarded).await.unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_supervisor_that_hangs_keeps_nobody_waiting_for_ever() {
        let (commands, mut inbox) = mpsc::channel(1);
        let handle = Handle(commands);
        let begun = tokio::time::Instant::now();
        handle.own(true).await;
        handle.want(true, "").await;
        assert!(!handle.discard().await && !handle.is_over());
        assert_eq!(begun.elapsed(), HEARD_WITHIN + DISCARDED_WITHIN);
        assert!(matches!(inbox.recv().await, Some(Command::Own(true))));
        drop(inbox);
        assert!(handle.is_over() && !handle.discard().await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_supervisor_that_launches_keeps_nobody_waiting_for_a_raise() {
        let (commands, mut inbox) = mpsc::channel(1);
        let (handle, token) = (Handle(commands), Token { generation: 1, revision: 7 });
        let begun = tokio::time::Instant::now();
        assert!(!handle.raise(token).await, "it is not heard");
        assert!(matches!(inbox.recv().await, Some(Command::Raise(..))));
        assert_eq!(begun.elapsed(), RAISE_WITHIN);
        let raised = tokio::spawn(async move { handle.raise(token).await });
        let Some(Command::Raise(asked, answer)) = inbox.recv().await else { panic!("no raise") };
        assert!(asked == token && answer.send(true).is_ok());
        assert!(raised.await.unwrap());
    }
}
