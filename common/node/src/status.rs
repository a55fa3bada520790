//! Errors on the wire: `google.rpc` statuses with details.
//!
//! Every error of Baton carries an `ErrorInfo` whose domain is [`DOMAIN`] and whose reason is a stable code in UPPER_SNAKE_CASE.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Domain of our reasons.
pub const DOMAIN: &str = "baton";

/// Reasons that more than one crate uses. A crate's own enums name further ones.
pub mod reasons {
    /// A field's value cannot be served.
    pub const INVALID_FIELD: &str = "INVALID_FIELD";
    /// Known, and not built yet.
    pub const NOT_BUILT: &str = "NOT_BUILT";
    /// No such model in this cluster.
    pub const UNKNOWN_MODEL: &str = "UNKNOWN_MODEL";
    /// The prompt does not fit the model's context.
    pub const CONTEXT_LENGTH: &str = "CONTEXT_LENGTH";
    /// Shed: queues are full.
    pub const OVERLOADED: &str = "OVERLOADED";
    /// No node can serve this now.
    pub const NO_NODES: &str = "NO_NODES";
    /// A node died on the way.
    pub const NODE_LOST: &str = "NODE_LOST";
    /// This process is about to stop.
    pub const DRAINING: &str = "DRAINING";
    /// The request's deadline has passed.
    pub const DEADLINE: &str = "DEADLINE";
    /// A defect of Baton.
    pub const INTERNAL: &str = "INTERNAL";
}

/// An error status under construction.
#[derive(Clone, Debug)]
#[must_use]
pub struct ErrorStatus {
    code: Code,
    reason: String,
    message: String,
    metadata: HashMap<String, String>,
    violations: Vec<(String, String)>,
    retry_after: Option<Duration>,
}

/// Starts an error: its code, its stable reason, and a message fit for a client.
pub fn error(code: Code, reason: &str, message: impl Into<String>) -> ErrorStatus {
    ErrorStatus {
        code,
        reason: reason.to_owned(),
        message: message.into(),
        metadata: HashMap::new(),
        violations: Vec::new(),
        retry_after: None,
    }
}

impl ErrorStatus {
    /// Names the field at fault, in the request's own words (`sampling.temperature`). The message describes it.
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.violations.push((field.into(), self.message.clone()));
        self
    }

    /// A retry helps, after this long.
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.retry_after = Some(delay);
        self
    }

    /// One more entry of ErrorInfo's metadata, e.g. a limit that was passed.
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    /// The status.
    pub fn build(self) -> Status {
        let mut details = ErrorDetails::new();
        details.set_error_info(self.reason, DOMAIN, self.metadata);
        for (field, description) in self.violations {
            details.add_bad_request_violation(field, description);
        }
        if let Some(delay) = self.retry_after {
            details.set_retry_info(Some(delay));
        }
        Status::with_error_details(self.code, self.message, details)
    }
}

impl From<ErrorStatus> for Status {
    fn from(error: ErrorStatus) -> Self {
        error.build()
    }
}

/// INVALID_ARGUMENT for one field.
pub fn invalid_field(field: &str, message: impl Into<String>) -> Status {
    error(Code::InvalidArgument, reasons::INVALID_FIELD, message)
        .field(field)
        .build()
}

/// UNIMPLEMENTED for a field that is known and not built yet.
pub fn not_built(field: &str) -> Status {
    error(
        Code::Unimplemented,
        reasons::NOT_BUILT,
        format!("{field} is not built yet"),
    )
    .field(field)
    .build()
}

/// RESOURCE_EXHAUSTED: shed at once, with the time after which to try again.
pub fn shed(message: impl Into<String>, retry_after: Duration) -> Status {
    error(Code::ResourceExhausted, reasons::OVERLOADED, message)
        .retry_after(retry_after)
        .build()
}

/// UNAVAILABLE: a retry helps.
pub fn unavailable(reason: &str, message: impl Into<String>, retry_after: Duration) -> Status {
    error(Code::Unavailable, reason, message)
        .retry_after(retry_after)
        .build()
}

/// INTERNAL: a defect.
pub fn internal(message: impl Into<String>) -> Status {
    error(Code::Internal, reasons::INTERNAL, message).build()
}

/// The stable reason; `None` when the status is not one of ours.
pub fn reason(status: &Status) -> Option<String> {
    status
        .get_details_error_info()
        .filter(|info| info.domain == DOMAIN)
        .map(|info| info.reason)
}

/// The field at fault, if one was named.
pub fn field(status: &Status) -> Option<String> {
    status
        .get_details_bad_request()?
        .field_violations
        .into_iter()
        .next()
        .map(|violation| violation.field)
}

/// After what time a retry helps.
pub fn retry_after(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay
}

/// An entry of ErrorInfo's metadata.
pub fn metadata(status: &Status, key: &str) -> Option<String> {
    status.get_details_error_info()?.metadata.remove(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a client on the other side of a connection gets: the status through its headers.
    fn over_the_wire(status: Status) -> Status {
        let response = status.into_http::<()>();
        Status::from_header_map(response.headers()).expect("a status in the headers")
    }

    #[test]
    fn details_survive_the_wire() {
        let status = over_the_wire(
            error(
                Code::ResourceExhausted,
                reasons::OVERLOADED,
                "256 requests wait already",
            )
            .field("input")
            .retry_after(Duration::from_millis(1_500))
            .with("limit", 256)
            .build(),
        );
        assert_eq!(
            (status.code(), status.message()),
            (Code::ResourceExhausted, "256 requests wait already")
        );
        assert_eq!(reason(&status).as_deref(), Some("OVERLOADED"));
        assert_eq!(field(&status).as_deref(), Some("input"));
        assert_eq!(retry_after(&status), Some(Duration::from_millis(1_500)));
        assert_eq!(metadata(&status, "limit").as_deref(), Some("256"));
        assert_eq!(metadata(&status, "other"), None);
    }

    #[test]
    fn builders_set_code_and_reason() {
        let cases = [
            (
                invalid_field("sampling.temperature", "must be 0 to 2"),
                Code::InvalidArgument,
                "INVALID_FIELD",
            ),
            (not_built("sampling.n"), Code::Unimplemented, "NOT_BUILT"),
            (
                shed("full", Duration::from_secs(1)),
                Code::ResourceExhausted,
                "OVERLOADED",
            ),
            (
                unavailable(reasons::NODE_LOST, "gone", Duration::from_secs(1)),
                Code::Unavailable,
                "NODE_LOST",
            ),
            (internal("defect"), Code::Internal, "INTERNAL"),
        ];
        for (status, code, expected) in cases {
            let status = over_the_wire(status);
            assert_eq!((status.code(), reason(&status).as_deref()), (code, Some(expected)));
        }
    }

    #[test]
    fn foreign_statuses_have_no_reason() {
        assert_eq!(reason(&Status::unavailable("connection refused")), None);
        assert_eq!(retry_after(&Status::unavailable("connection refused")), None);
        let foreign = Status::with_error_details(
            Code::Internal,
            "x",
            ErrorDetails::with_error_info("R", "example.org", HashMap::new()),
        );
        assert_eq!(reason(&foreign), None);
    }
}
