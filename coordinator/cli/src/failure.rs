//! Why a command did not succeed, and with which exit code it ends.
//!
//! Owns the mapping from gRPC statuses to one clear sentence. Must never print a debug form of anything.

use drover_proto::{status, transport};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// What a command ends with when it does not succeed. The exit codes are documented in `drover --help`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// Drover answered with a failure, or a step of the command failed: exit code 1.
    Answered(String),
    /// Drover answered that it did nothing for now, for want of the store or since it is shutting down: exit code 1.
    Unavailable(String),
    /// The command line or a file is wrong; nothing was sent: exit code 2.
    Input(String),
    /// No coordinator (or no gateway) answered: exit code 3.
    Unreachable(String),
    /// What was waited for did not come in time: exit code 4.
    TimedOut(String),
    /// Ended by a signal of this number, as shells report it: exit code 128 + number.
    Interrupted(u8),
    /// Whoever read the output has left (`| head`): quiet, exit code 0.
    ReaderLeft,
}

impl Failure {
    /// Exit code of the process.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Answered(_) | Self::Unavailable(_) => 1,
            Self::Input(_) => 2,
            Self::Unreachable(_) => 3,
            Self::TimedOut(_) => 4,
            Self::Interrupted(signal) => 128_u8.saturating_add(*signal),
            Self::ReaderLeft => 0,
        }
    }

    /// What to tell the person; `None` when silence is right.
    #[must_use]
    pub fn message(&self) -> Option<&str> {
        match self {
            Self::Answered(text)
            | Self::Unavailable(text)
            | Self::Input(text)
            | Self::Unreachable(text)
            | Self::TimedOut(text) => Some(text),
            Self::Interrupted(_) | Self::ReaderLeft => None,
        }
    }

    /// A status that a coordinator (or the transport) answered, as one sentence.
    #[must_use]
    pub fn of_status(status: &Status) -> Self {
        let text = sentence(status);
        if is_transport(status) {
            Self::Unreachable(format!("the coordinator did not answer: {text}"))
        } else if did_nothing(status) {
            Self::Unavailable(text)
        } else {
            Self::Answered(text)
        }
    }

    /// What went wrong when the output was written.
    #[must_use]
    pub fn of_write(error: &std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            Self::ReaderLeft
        } else {
            Self::Answered(format!("the output can't be written: {error}"))
        }
    }
}

impl From<transport::Error> for Failure {
    fn from(error: transport::Error) -> Self {
        match error {
            transport::Error::Unreachable { .. } => Self::Unreachable(error.to_string()),
            // The transport names the key of a configuration file; of a command it is an option.
            _ => Self::Input(error.to_string().replace("set allow_plaintext = true", "give --allow-plaintext")),
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::of_write(&error)
    }
}

/// True when no coordinator made this status: the connection failed. Drover's own refusals carry a reason.
#[must_use]
pub fn is_transport(status: &Status) -> bool {
    let ours = status::reason_of(status).is_some();
    let by_code = matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded);
    // What a server sent has no source: this one was made here, of a connection that could not be made or broke.
    let made_here = std::error::Error::source(status).is_some();
    !ours && (by_code || made_here || (status.code() == Code::Unknown && status.message().contains("transport error")))
}

/// True when another coordinator may do what this one could not: it did not answer, or did nothing for want of the store
/// or because it is shutting down. Of a change this says that nothing was changed only where [`is_transport`] does not hold.
#[must_use]
pub fn is_elsewhere(status: &Status) -> bool {
    is_transport(status) || did_nothing(status)
}

/// True when a coordinator says that it did nothing for now, and why: another one may.
#[must_use]
pub fn did_nothing(status: &Status) -> bool {
    status.code() == Code::Unavailable
        && status::reason_of(status).as_deref() == Some(status::reason::STORE_UNAVAILABLE)
}

/// Message, fields that the message does not name already, and the reason.
fn sentence(status: &Status) -> String {
    let mut text = match status.message().trim() {
        "" => status.code().description().to_owned(),
        message => one_line(message),
    };
    for violation in status.get_error_details().bad_request().map(|b| b.field_violations.as_slice()).unwrap_or_default()
    {
        if !text.contains(&violation.description) {
            text.push_str(&one_line(&format!("; {}: {}", violation.field, violation.description)));
        }
    }
    let reason = status::reason_of(status);
    if reason.as_deref() == Some(status::reason::UNAUTHENTICATED) {
        text.push_str("; with this command: --join-secret-file FILE, or DROVER_JOIN_SECRET_FILE");
    }
    if let Some(reason) = reason {
        text.push_str(&format!(" ({reason})"));
    }
    text
}

fn one_line(text: &str) -> String {
    crate::output::printable(&text.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_message_fields_and_reason_in_one_line() {
        let status = status::invalid_fields(vec![
            ("replicas".to_owned(), "-1 is below 1".to_owned()),
            ("name".into(), "x".into()),
        ]);
        let failure = Failure::of_status(&status);
        assert_eq!(failure, Failure::Answered("replicas: -1 is below 1; name: x (INVALID_FIELD)".to_owned()));
        assert_eq!(failure.exit_code(), 1);
    }

    #[test]
    fn violations_that_the_message_leaves_out_are_added() {
        let details = tonic_types::ErrorDetails::with_bad_request_violation("slots", "0 is too few");
        let status = Status::with_error_details(Code::InvalidArgument, "bad\nrequest", details);
        assert_eq!(Failure::of_status(&status).message(), Some("bad request; slots: 0 is too few"));
    }

    #[test]
    fn a_broken_connection_is_told_from_an_answer() {
        assert_eq!(Failure::of_status(&Status::unavailable("tcp connect error")).exit_code(), 3);
        let ours = status::with_reason(Code::Unavailable, status::reason::STORE_UNAVAILABLE, "the store is away");
        assert_eq!(Failure::of_status(&ours).exit_code(), 1);
        assert!(is_elsewhere(&ours) && did_nothing(&ours) && !is_transport(&ours));
        let full = status::with_reason(Code::ResourceExhausted, status::reason::STORE_UNAVAILABLE, "out of space");
        assert!(!is_elsewhere(&full), "the store is the same for all of them");
    }

    #[test]
    fn a_refusal_for_want_of_a_secret_names_the_option() {
        let status = status::with_reason(Code::Unauthenticated, status::reason::UNAUTHENTICATED, "no valid secret");
        let failure = Failure::of_status(&status);
        assert!(failure.message().is_some_and(|m| m.contains("--join-secret-file")), "{failure:?}");
        let security =
            transport::Security { secret: transport::Secret::new("0123456789abcdef"), allow_plaintext: false };
        let error = transport::Target::new(&["10.0.0.1:7400".to_owned()], &security, None).unwrap_err();
        let failure = Failure::from(error);
        assert!(failure.message().is_some_and(|m| m.contains("--allow-plaintext")), "{failure:?}");
    }

    #[test]
    fn a_reader_that_left_is_no_error() {
        let broken = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert_eq!((Failure::of_write(&broken).exit_code(), Failure::of_write(&broken).message()), (0, None));
        assert_eq!(Failure::Interrupted(2).exit_code(), 130);
    }
}
