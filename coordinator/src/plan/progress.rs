//! PURE. Which claims are given up: those that get nowhere, or fail again and again.
//!
//! | state | given up when | after |
//! |---|---|---|
//! | claimed, starting | nothing was heard that shows progress | `progress_deadline_ms` |
//! | loading | the same; the node itself ends a load that makes none after `load_timeout_ms` | both together |
//! | backoff, failed | it was never ready since it failed first | `give_up_after_ms` |
//! | ready, suspect, draining, stopped; wanted | never: what serves, or may, is nobody's to take away | – |
//! | the same; wanted no more | nothing was heard of an end | `progress_deadline_ms`, the drain and the grace that its deployment asks for |
//!
//! What is wanted is given up only when another node can take it, which is offered it by the same transaction; what is
//! wanted no more when its owner does nothing about it. Times are this leader's, counted from what it has seen itself: the
//! clocks of hosts are never compared, and after a change of leader or a break in what it sees they begin anew.

use super::{Input, snapshot::Stored};
use drover_proto::{limits, store::v1 as record, v1::InstanceState};
use std::fmt;

/// For how long a standing claim has been seen as it is, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Without progress.
    pub idle_ms: i64,
    /// Since it failed first, if it was not ready since.
    pub failing_ms: Option<i64>,
    /// Since it became ready, if it was since.
    pub ready_ms: Option<i64>,
}

/// What follows for a claim.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    Stands,
    /// Nothing for so long, in milliseconds.
    In(i64),
    /// It is to be given up.
    GiveUp(Why),
    /// Its node has served it for a while: what went wrong there before is forgiven.
    Forgive,
}

/// Why a claim is given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Why {
    state: InstanceState,
    /// For how long, in milliseconds.
    for_ms: i64,
    /// What the node says of it.
    says: String,
}

impl Why {
    /// The same without what changes from one moment to the next: it is written only when it says something new.
    pub(super) fn lasting(&self) -> String {
        match self.state {
            InstanceState::Failed => format!("it has failed there: {}", self.says),
            InstanceState::Backoff => "it fails there again and again".to_owned(),
            state => format!("it makes no progress there ({})", word(state)),
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (state, seconds) = (word(self.state), self.for_ms / 1000);
        match self.state {
            InstanceState::Failed | InstanceState::Backoff => {
                write!(f, "{state}, and not ready for {seconds} s since it failed first")?;
            }
            _ => write!(f, "{state}, without progress for {seconds} s")?,
        }
        if self.says.is_empty() { Ok(()) } else { write!(f, ": {}", self.says) }
    }
}

fn word(state: InstanceState) -> String {
    state.as_str_name().trim_start_matches("INSTANCE_STATE_").to_ascii_lowercase()
}

/// What follows for the standing claim of an instance.
pub(super) fn judge(
    input: &Input<'_>,
    id: &str,
    instance: &record::Instance,
    claim: &Stored<record::Claim>,
) -> Verdict {
    let Some(held) = input.held_for.get(id) else { return Verdict::Stands };
    let settings = input.settings;
    let state = input.snapshot.state(id);
    // What its owner has said under this claim.
    let status = input.snapshot.statuses.get(id).map(|status| &status.value);
    let status = status.filter(|status| status.token == input.snapshot.token(id));
    let (for_ms, limit_ms) = match state {
        InstanceState::Ready if instance.wanted => return forgive(input, instance, claim, *held),
        InstanceState::Backoff | InstanceState::Failed if instance.wanted => {
            (held.failing_ms.unwrap_or(0), settings.give_up_after_ms)
        }
        InstanceState::Claimed
        | InstanceState::Starting
        | InstanceState::Loading
        | InstanceState::Backoff
        | InstanceState::Failed => {
            // An older agent tells no progress: its own deadlines, which end in one of the states above, must do.
            if instance.wanted && status.is_some_and(|status| status.progressed_at.is_none()) {
                return Verdict::Stands;
            }
            let spec = input.snapshot.spec_of(instance);
            let load_ms = spec.and_then(|spec| spec.load_timeout_ms).unwrap_or(limits::defaults::LOAD_TIMEOUT_MS);
            let its_own = if state == InstanceState::Loading { load_ms } else { 0 };
            (held.idle_ms, settings.progress_deadline_ms.saturating_add(its_own))
        }
        InstanceState::Ready | InstanceState::Suspect | InstanceState::Draining | InstanceState::Stopped
            if !instance.wanted =>
        {
            (held.idle_ms, settings.progress_deadline_ms.saturating_add(end_ms(input, instance)))
        }
        InstanceState::Ready
        | InstanceState::Suspect
        | InstanceState::Draining
        | InstanceState::Stopped
        | InstanceState::Pending
        | InstanceState::Unspecified => return Verdict::Stands,
    };
    if for_ms < limit_ms {
        return Verdict::In(limit_ms - for_ms);
    }
    Verdict::GiveUp(Why { state, for_ms, says: status.map(|status| status.message.clone()).unwrap_or_default() })
}

/// Longest time that an end in order takes, in milliseconds: streams drain, then the server has its grace.
fn end_ms(input: &Input<'_>, instance: &record::Instance) -> i64 {
    let spec = input.snapshot.spec_of(instance);
    let drain_ms = spec.and_then(|spec| spec.drain_timeout_ms).unwrap_or(limits::defaults::DRAIN_TIMEOUT_MS);
    drain_ms.saturating_add(spec.and_then(|spec| spec.stop_grace_ms).unwrap_or(limits::defaults::STOP_GRACE_MS))
}

/// Ready for as long as it may take to make progress: not one that answers once and ends.
fn forgive(input: &Input<'_>, instance: &record::Instance, claim: &Stored<record::Claim>, held: Held) -> Verdict {
    if instance.avoid.iter().all(|avoid| avoid.node != claim.value.node) {
        return Verdict::Stands;
    }
    match input.settings.progress_deadline_ms - held.ready_ms.unwrap_or(0) {
        left @ 1.. => Verdict::In(left),
        _ => Verdict::Forgive,
    }
}
