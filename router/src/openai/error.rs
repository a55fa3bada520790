//! Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{
    error::{ErrorKind, Field, GenerateError},
    limits,
};

/// An error answer.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: String,
    message: String,
    param: Option<String>,
    retry_after: Option<Duration>,
}

/// How the two endpoints spell the fields that errors name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Endpoint {
    Chat,
    Completions,
}

impl Endpoint {
    fn spell(self, field: Field) -> &'static str {
        match (field, self) {
            (Field::Input, Self::Chat) => "messages",
            (Field::Input, Self::Completions) => "prompt",
            _ => field.name(),
        }
    }
}

impl ApiError {
    fn invalid(code: &str, param: Option<&str>, message: String) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "invalid_request_error",
            code: code.to_owned(),
            message,
            param: param.map(str::to_owned),
            retry_after: None,
        }
    }

    /// The body is not what it must be.
    pub(super) fn malformed(message: String) -> Self {
        Self::invalid("MALFORMED", None, message)
    }

    /// A field that this API does not have.
    pub(super) fn unknown_field(param: &str) -> Self {
        let param = &excerpt(param);
        Self::invalid("UNKNOWN_FIELD", Some(param), format!("unknown field: {param}"))
    }

    /// A field that is known, and not built yet.
    pub(super) fn not_built(param: &str) -> Self {
        Self::invalid(
            "NOT_BUILT",
            Some(param),
            format!("{param} is not built yet: leave it out"),
        )
    }

    /// A value of the wrong type or out of range.
    pub(super) fn invalid_field(param: &str, problem: &str) -> Self {
        Self::invalid("INVALID_FIELD", Some(param), format!("{param}: {problem}"))
    }

    /// No such path.
    pub(super) fn no_route() -> Self {
        let message = "no such path; there are /v1/chat/completions, /v1/completions and /v1/models".to_owned();
        Self {
            status: StatusCode::NOT_FOUND,
            ..Self::invalid("NO_ROUTE", None, message)
        }
    }

    /// The path is there, the method is not.
    pub(super) fn method_not_allowed() -> Self {
        let message = "this path does not take this method".to_owned();
        Self {
            status: StatusCode::METHOD_NOT_ALLOWED,
            ..Self::invalid("METHOD_NOT_ALLOWED", None, message)
        }
    }

    /// The body exceeds its limit.
    pub(super) fn body_too_large(limit: usize) -> Self {
        let message = format!("the body exceeds {limit} bytes");
        Self {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            ..Self::invalid("BODY_TOO_LARGE", None, message)
        }
    }

    /// The body did not come in time.
    pub(super) fn body_too_slow() -> Self {
        let message = "the body did not come in time".to_owned();
        Self {
            status: StatusCode::REQUEST_TIMEOUT,
            ..Self::invalid("BODY_TIMEOUT", None, message)
        }
    }

    /// What the router said.
    pub(super) fn from_generate(error: &GenerateError, endpoint: Endpoint) -> Self {
        let (status, kind) = match error.kind() {
            ErrorKind::InvalidArgument => (StatusCode::BAD_REQUEST, "invalid_request_error"),
            ErrorKind::NotFound => (StatusCode::NOT_FOUND, "invalid_request_error"),
            ErrorKind::Shed => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error"),
            ErrorKind::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error"),
            ErrorKind::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, "timeout_error"),
            // 499: the client closed the request. It will not read this.
            ErrorKind::Cancelled => (StatusCode::from_u16(499).expect("in range"), "cancelled_error"),
            ErrorKind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "server_error"),
        };
        Self {
            status,
            kind,
            code: error.code().to_owned(),
            message: error.to_string(),
            param: error.field().map(|field| endpoint.spell(field).to_owned()),
            retry_after: error.retry_after(),
        }
    }

    /// The body of the answer, or of a stream's last chunk.
    pub(super) fn json(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind, "param": self.param, "code": self.code } })
    }
}

/// As much of a client's own words as an error repeats.
pub(super) fn excerpt(text: &str) -> String {
    text.chars().take(limits::EXCERPT_CHARS).collect()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.json())).into_response();
        if let Some(after) = self.retry_after {
            // Whole seconds, rounded up: 0 would mean "at once".
            let seconds = after.as_millis().div_ceil(1_000).max(1) as u64;
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
