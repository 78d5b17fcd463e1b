//! What an etcd error means to a caller: above all, whether a write may have taken effect.
//!
//! Messages and codes: etcd's `api/v3rpc/rpctypes/error.go`. etcd uses UNAVAILABLE both for what it refused before doing
//! anything ("no leader") and for what it lost sight of ("request timed out"), so messages are looked at.

use crate::store::Error;
use std::{error::Error as _, time::Duration};
use tonic::{Code, ConnectError, Status};

/// Whether a call may change something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
}

const NO_SPACE: &str = "database space exceeded";
const LEASE_NOT_FOUND: &str = "requested lease not found";
const COMPACTED: &str = "required revision has been compacted";
/// How messages of etcd and of its gRPC library begin.
const FROM_SERVER: [&str; 2] = ["etcdserver:", "grpc:"];
/// Said before anything is proposed: nothing was done.
const NOTHING_DONE: [&str; 4] = ["no leader", "too many requests", "not capable", "corrupt cluster"];

/// The error of a call that etcd answered with an error, or whose connection broke.
pub(super) fn map(error: &etcd_client::Error, kind: Kind, what: &str) -> Error {
    match error {
        etcd_client::Error::GRpcStatus(status) => map_status(status, kind, what),
        other => lost(kind, format!("{what}: {other}")),
    }
}

/// As [`map`], for a bare status.
pub(super) fn map_status(status: &Status, kind: Kind, what: &str) -> Error {
    let message = status.message();
    let said = format!("{what}: {message}");
    if message.contains(NO_SPACE) {
        return Error::NoSpace(said);
    }
    if message.contains(LEASE_NOT_FOUND) {
        return Error::LeaseGone;
    }
    if never_sent(status) || NOTHING_DONE.iter().any(|m| message.contains(m)) {
        return Error::Unavailable(said);
    }
    // These codes are refusals when the server says them; the client also makes some up, for a connection that broke.
    let from_server = FROM_SERVER.iter().any(|start| message.starts_with(start));
    match status.code() {
        Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented
        | Code::ResourceExhausted
            if from_server =>
        {
            Error::Rejected(said)
        }
        _ => lost(kind, said),
    }
}

/// The error of a call that was not answered in time.
pub(super) fn silence(kind: Kind, what: &str, after: Duration) -> Error {
    lost(kind, format!("{what}: no answer within {} ms", after.as_millis()))
}

/// The error of a watch that etcd cancelled; `compacted` is its compact_revision.
pub(super) fn cancelled(compacted: i64, reason: &str) -> Error {
    if compacted > 0 || reason.contains(COMPACTED) {
        Error::Compacted(compacted)
    } else {
        Error::Unavailable(format!("etcd cancelled the watch: {reason}"))
    }
}

/// Whether a call can be sent again without any risk: it never left, or it is a read and its trouble may pass.
pub(super) fn harmless_to_repeat(error: &etcd_client::Error, kind: Kind) -> bool {
    let etcd_client::Error::GRpcStatus(status) = error else { return false };
    let passing = matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Internal);
    never_sent(status) || (kind == Kind::Read && passing)
}

fn lost(kind: Kind, said: String) -> Error {
    match kind {
        Kind::Read => Error::Unavailable(said),
        Kind::Write => Error::OutcomeUnknown(said),
    }
}

/// A connection could not even be made.
fn never_sent(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(status: Status, kind: Kind) -> Error {
        map_status(&status, kind, "transaction")
    }

    #[test]
    fn a_write_without_an_answer_has_an_unknown_outcome_and_a_read_has_none() {
        let lost = [
            Status::unavailable("etcdserver: request timed out"),
            Status::unavailable("etcdserver: request timed out, possibly due to previous leader failure"),
            Status::unavailable("etcdserver: server stopped"),
            Status::unavailable("keep-alive timed out"),
            Status::deadline_exceeded("context deadline exceeded"),
            Status::cancelled("operation was canceled"),
            Status::unknown("transport error"),
            Status::internal("stream reset"),
            // As the client reports GOAWAY "too_many_pings".
            Status::resource_exhausted("h2 protocol error: http2 error"),
        ];
        for status in lost {
            assert!(matches!(mapped(status.clone(), Kind::Write), Error::OutcomeUnknown(_)), "{status:?}");
            assert!(matches!(mapped(status.clone(), Kind::Read), Error::Unavailable(_)), "{status:?}");
        }
    }

    #[test]
    fn what_etcd_refused_before_doing_anything_is_no_unknown_outcome() {
        let refused =
            [Status::unavailable("etcdserver: no leader"), Status::resource_exhausted("etcdserver: too many requests")];
        for status in refused {
            assert!(matches!(mapped(status.clone(), Kind::Write), Error::Unavailable(_)), "{status:?}");
        }
    }

    #[test]
    fn space_leases_and_defects_are_told_apart() {
        let space = Status::resource_exhausted("etcdserver: mvcc: database space exceeded");
        assert!(matches!(mapped(space, Kind::Write), Error::NoSpace(_)));
        let lease = Status::not_found("etcdserver: requested lease not found");
        assert!(matches!(mapped(lease, Kind::Write), Error::LeaseGone));
        let defect = Status::invalid_argument("etcdserver: duplicate key given in txn request");
        assert!(matches!(mapped(defect, Kind::Write), Error::Rejected(_)));
        assert!(matches!(cancelled(7, ""), Error::Compacted(7)));
        assert!(matches!(cancelled(0, "etcdserver: no leader"), Error::Unavailable(_)));
    }
}
