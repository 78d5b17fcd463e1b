//! Errors of sessions, and of the store, as statuses.

use super::open;
use crate::store;
use drover_proto::status::{reason, with_reason};
use std::time::Duration;
use tonic::{Code, Status};

/// This coordinator can't serve a session now; another one may.
pub(super) fn away(why: &str) -> Status {
    with_reason(Code::Unavailable, reason::STORE_UNAVAILABLE, why)
}

/// Milliseconds, as the contract has them.
pub(super) fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Why a session was not opened.
pub(super) fn status_of(error: open::Error) -> Status {
    match error {
        open::Error::Refused { reason: why @ (reason::INVALID_FIELD | reason::PROTOCOL_MISMATCH), message } => {
            with_reason(Code::InvalidArgument, why, message)
        }
        open::Error::Refused { reason, message } => with_reason(Code::FailedPrecondition, reason, message),
        open::Error::Store(store::Error::LeaseGone) => {
            with_reason(Code::FailedPrecondition, reason::SESSION_EXISTS, "the session is just ending: open a new one")
        }
        open::Error::Store(error) => store_status(error),
    }
}

/// A store's error as a status.
#[must_use]
pub(crate) fn store_status(error: store::Error) -> Status {
    use store::Error as E;
    match error {
        E::OutcomeUnknown(_) => with_reason(Code::Unknown, reason::OUTCOME_UNKNOWN, error.to_string()),
        E::NoSpace(_) => with_reason(Code::ResourceExhausted, reason::STORE_UNAVAILABLE, error.to_string()),
        E::Changed(why) => with_reason(Code::Unavailable, reason::STORE_CHANGED, why),
        E::Rejected(_) | E::Corrupt { .. } => {
            tracing::error!(%error, "the store");
            with_reason(Code::Internal, reason::STORE_UNAVAILABLE, error.to_string())
        }
        E::Unavailable(_) | E::LeaseGone | E::Compacted(_) => {
            with_reason(Code::Unavailable, reason::STORE_UNAVAILABLE, error.to_string())
        }
    }
}
