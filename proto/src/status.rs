//! gRPC statuses with details: a reason for programs, the field and the way out for people.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// Domain of every `ErrorInfo` that Drover sends.
pub const DOMAIN: &str = "drover";

/// Reasons that clients may branch on. Words are only added.
pub mod reason {
    /// A field has a value that is not allowed.
    pub const INVALID_FIELD: &str = "INVALID_FIELD";
    /// No such object.
    pub const NOT_FOUND: &str = "NOT_FOUND";
    /// It exists, and the call was to create it.
    pub const ALREADY_EXISTS: &str = "ALREADY_EXISTS";
    /// It was changed since the generation that the call names.
    pub const GENERATION_MISMATCH: &str = "GENERATION_MISMATCH";
    /// It is being deleted.
    pub const DELETING: &str = "DELETING";
    /// The store can't be reached or did not answer in time.
    pub const STORE_UNAVAILABLE: &str = "STORE_UNAVAILABLE";
    /// The caller gave no valid secret.
    pub const UNAUTHENTICATED: &str = "UNAUTHENTICATED";
    /// The other side speaks no protocol version of ours.
    pub const PROTOCOL_MISMATCH: &str = "PROTOCOL_MISMATCH";
    /// The node's name belongs to another machine.
    pub const NODE_BOUND: &str = "NODE_BOUND";
    /// The node has a session that the agent does not know; it ends with its lease.
    pub const SESSION_EXISTS: &str = "SESSION_EXISTS";
    /// The session is not the one named, or has moved on: resume first.
    pub const SESSION_MOVED: &str = "SESSION_MOVED";
    /// The store is not the one that the caller knows, or an older copy of it.
    pub const STORE_CHANGED: &str = "STORE_CHANGED";
    /// Somebody holds a claim on the instance.
    pub const ALREADY_CLAIMED: &str = "ALREADY_CLAIMED";
    /// The offer was withdrawn, replaced, used, or names other nodes.
    pub const OFFER_GONE: &str = "OFFER_GONE";
    /// Claiming is halted.
    pub const HALTED: &str = "HALTED";
    /// The node has not enough left.
    pub const NO_CAPACITY: &str = "NO_CAPACITY";
    /// The node had claimed it in vain, and may not claim it again yet.
    pub const AVOIDED: &str = "AVOIDED";
    /// Nobody holds a claim on the instance.
    pub const NOT_CLAIMED: &str = "NOT_CLAIMED";
    /// The node's agent has not left on purpose, or is back.
    pub const NOT_ABSENT: &str = "NOT_ABSENT";
    /// The outcome of the call is not known.
    pub const OUTCOME_UNKNOWN: &str = "OUTCOME_UNKNOWN";
    /// The node that would have to answer can't be reached.
    pub const NODE_UNREACHABLE: &str = "NODE_UNREACHABLE";
}

/// A status with an `ErrorInfo`.
#[must_use]
pub fn with_reason(code: Code, reason: &str, message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, std::collections::HashMap::new());
    Status::with_error_details(code, message, details)
}

/// INVALID_ARGUMENT for one or more fields, each with a sentence that names the value and the way out.
#[must_use]
pub fn invalid_fields(violations: Vec<(String, String)>) -> Status {
    let message = violations.iter().map(|(field, what)| format!("{field}: {what}")).collect::<Vec<_>>().join("; ");
    let mut details = ErrorDetails::with_error_info(reason::INVALID_FIELD, DOMAIN, std::collections::HashMap::new());
    details.set_bad_request(
        violations.into_iter().map(|(field, what)| FieldViolation::new(field, what)).collect::<Vec<_>>(),
    );
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// INVALID_ARGUMENT for one field.
#[must_use]
pub fn invalid_field(field: &str, what: impl Into<String>) -> Status {
    invalid_fields(vec![(field.to_owned(), what.into())])
}

/// The reason that a status carries, when it is one of ours.
#[must_use]
pub fn reason_of(status: &Status) -> Option<String> {
    let info = status.get_error_details().error_info().cloned()?;
    (info.domain == DOMAIN).then_some(info.reason)
}
