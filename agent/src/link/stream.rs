//! One stream of a session: its queue of messages, and what was sent and answered on it.

use super::{identity, reports::Reports};
use crate::clock::boottime_ns;
use drover_proto::v1::{Heartbeat, RecordedRun, SessionRequest, SessionResponse, session_request};
use std::{collections::VecDeque, time::Duration};
use tokio::{sync::mpsc, time::Instant};
use tonic::Streaming;

/// Messages that wait to be written to the stream.
pub(super) const OUTGOING: usize = 256;
/// Places in that queue that reports leave to everything else: a node has as many reports as instances, and a heartbeat
/// that found no place would end the stream.
const NOT_FOR_REPORTS: usize = 64;
/// Heartbeats that may be unanswered at a time.
const HEARTBEATS_MAX: usize = 64;

/// One stream, after its welcome.
pub(super) struct Stream {
    outgoing: mpsc::Sender<SessionRequest>,
    pub(super) incoming: Streaming<SessionResponse>,
    pub(super) number: u64,
    pub(super) session_id: String,
    pub(super) ttl: Duration,
    pub(super) interval: Duration,
    /// Heartbeats that are not answered yet: sequence, when sent (CLOCK_BOOTTIME, ns).
    unanswered: VecDeque<(u64, u64)>,
    pub(super) last_answer: Instant,
    sequence: u64,
    pub(super) reports: Reports,
    /// Whether reports are due that did not fit.
    pub(super) behind: bool,
    /// What the coordinator was told last of what runs here.
    pub(super) runs: Option<Vec<RecordedRun>>,
}

impl Stream {
    pub(super) fn new(
        session: identity::Session,
        ttl: Duration,
        interval: Duration,
        outgoing: mpsc::Sender<SessionRequest>,
        incoming: Streaming<SessionResponse>,
    ) -> Self {
        Self {
            outgoing,
            incoming,
            number: session.number,
            session_id: session.id,
            ttl,
            interval,
            unanswered: VecDeque::new(),
            last_answer: Instant::now(),
            sequence: 0,
            reports: Reports::default(),
            behind: false,
            runs: None,
        }
    }

    pub(super) fn heartbeat(&mut self) -> anyhow::Result<()> {
        self.sequence += 1;
        self.unanswered.push_back((self.sequence, boottime_ns()));
        if self.unanswered.len() > HEARTBEATS_MAX {
            self.unanswered.pop_front();
        }
        self.send(session_request::Message::Heartbeat(Heartbeat { sequence: self.sequence }))
    }

    /// A heartbeat was answered; says when it was sent, if that is known.
    pub(super) fn answered(&mut self, answered: u64) -> Option<u64> {
        self.last_answer = Instant::now();
        while let Some((sequence, sent_ns)) = self.unanswered.front().copied() {
            if sequence > answered {
                break;
            }
            self.unanswered.pop_front();
            if sequence == answered {
                return Some(sent_ns);
            }
        }
        None
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

pub(super) fn message(content: session_request::Message) -> SessionRequest {
    SessionRequest { message: Some(content) }
}
