//! One stream of a session: its queue of messages, and what was sent and answered on it.

use super::{identity, remote::Incoming, reports::Reports};
use crate::clock::boottime_ns;
use drover_proto::v1::{Heartbeat, RecordedRun, SessionRequest, session_request};
use std::{collections::VecDeque, time::Duration};
use tokio::{sync::mpsc, time::Instant};

/// Messages that wait to be written to the stream.
pub(super) const OUTGOING: usize = 256;
/// Places in that queue that reports leave to everything else: a node has as many reports as instances, and a heartbeat
/// that found no place would end the stream.
const NOT_FOR_REPORTS: usize = 64;
/// Heartbeats that may be unanswered at a time.
const HEARTBEATS_MAX: usize = 64;
/// Share of the session's time to live that a heartbeat may go unanswered: then the rest of it is worth more elsewhere.
const UNANSWERED: f64 = 0.3;
/// The same, at least: a coordinator may be busy.
const UNANSWERED_MIN: Duration = Duration::from_secs(1);
/// Times its time to live after which a stream is given up on which nothing is answered, though heartbeats are elsewhere.
const UNSERVED: f64 = 3.0;

/// One stream, after its welcome.
pub(super) struct Stream {
    outgoing: mpsc::Sender<SessionRequest>,
    pub(super) incoming: Incoming,
    pub(super) number: u64,
    pub(super) session_id: String,
    /// Generation of the store when it was welcomed.
    pub(super) generation: u64,
    pub(super) ttl: Duration,
    pub(super) interval: Duration,
    unanswered: Unanswered,
    /// Heartbeats have a stream of their own: here one is sent now and then, to see whether this stream is served.
    pub(super) beats_elsewhere: bool,
    beat_at: Option<Instant>,
    pub(super) reports: Reports,
    /// Whether reports are due that did not fit, or came too soon after others.
    pub(super) behind: bool,
    /// When the last report was sent.
    pub(super) reported: Option<Instant>,
    /// When everything is told next; `None` until the claims of the welcome were applied.
    pub(super) inventory_at: Option<Instant>,
    /// What the coordinator was told last of what runs here, and whether that was after all was tried to be claimed again.
    pub(super) runs: Option<(Vec<RecordedRun>, bool)>,
}

impl Stream {
    pub(super) fn new(
        session: identity::Session,
        generation: u64,
        ttl: Duration,
        interval: Duration,
        outgoing: mpsc::Sender<SessionRequest>,
        incoming: Incoming,
    ) -> Self {
        Self {
            outgoing,
            incoming,
            number: session.number,
            session_id: session.id,
            generation,
            ttl,
            interval,
            unanswered: Unanswered::default(),
            beats_elsewhere: false,
            beat_at: None,
            reports: Reports::default(),
            behind: false,
            reported: None,
            inventory_at: None,
            runs: None,
        }
    }

    /// Sends a heartbeat, if one is due.
    pub(super) fn heartbeat(&mut self) -> anyhow::Result<()> {
        if self.beats_elsewhere && self.beat_at.is_some_and(|at| at.elapsed() < self.ttl) {
            return Ok(());
        }
        self.beat_at = Some(Instant::now());
        let sequence = self.unanswered.send();
        self.send(session_request::Message::Heartbeat(Heartbeat { sequence }))
    }

    /// A heartbeat was answered; says when it was sent, if that is known.
    pub(super) fn answered(&mut self, answered: u64) -> Option<u64> {
        self.unanswered.answered(answered)
    }

    /// When the oldest heartbeat has gone unanswered for too long; `None` while all are answered. While others are answered
    /// elsewhere the session lives, and a coordinator that is busy for a while is no reason to leave it.
    pub(super) fn give_up_at(&self) -> Option<Instant> {
        let longest = if self.beats_elsewhere { self.ttl.mul_f64(UNSERVED) } else { patience(self.ttl) };
        self.unanswered.oldest().map(|sent| sent + longest)
    }

    /// Puts a message in line; fails when the coordinator has not read for so long that the line is full.
    pub(super) fn send(&self, content: session_request::Message) -> anyhow::Result<()> {
        self.outgoing.try_send(message(content)).map_err(|_| anyhow::anyhow!("the coordinator does not read"))
    }

    /// Whether another report leaves room for everything else.
    pub(super) fn has_room_for_reports(&self) -> bool {
        self.outgoing.capacity() > NOT_FOR_REPORTS
    }

    /// Ends our side, after what is in line.
    pub(super) fn close(&mut self) {
        let (closed, _) = mpsc::channel(1);
        self.outgoing = closed;
    }
}

/// Heartbeats of a stream that are not answered yet.
#[derive(Debug, Default)]
pub(super) struct Unanswered {
    /// Sequence, when sent (CLOCK_BOOTTIME, ns), and the same by tokio's clock.
    waiting: VecDeque<(u64, u64, Instant)>,
    sequence: u64,
}

impl Unanswered {
    /// One is sent now; returns its sequence.
    pub(super) fn send(&mut self) -> u64 {
        self.sequence += 1;
        self.waiting.push_back((self.sequence, boottime_ns(), Instant::now()));
        if self.waiting.len() > HEARTBEATS_MAX {
            self.waiting.pop_front();
        }
        self.sequence
    }

    /// One was answered, and those before it with it; says when it was sent, if that is known.
    pub(super) fn answered(&mut self, answered: u64) -> Option<u64> {
        while let Some((sequence, sent_ns, _)) = self.waiting.front().copied() {
            if sequence > answered {
                break;
            }
            self.waiting.pop_front();
            if sequence == answered {
                return Some(sent_ns);
            }
        }
        None
    }

    /// When the oldest was sent; `None` while all are answered.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.waiting.front().map(|(_, _, sent)| *sent)
    }
}

/// PURE. How long a heartbeat may go unanswered in a session with this time to live.
pub(super) fn patience(ttl: Duration) -> Duration {
    ttl.mul_f64(UNANSWERED).max(UNANSWERED_MIN)
}

pub(super) fn message(content: session_request::Message) -> SessionRequest {
    SessionRequest { message: Some(content) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_that_answers_no_heartbeat_is_left_with_time_to_spare() {
        let (ttl, interval) = (Duration::from_secs(10), Duration::from_secs(3));
        // The last one that was answered was sent just before.
        assert!(ttl - interval - patience(ttl) >= Duration::from_secs(4));
        assert_eq!(patience(Duration::from_secs(2)), Duration::from_secs(1));
    }
}
