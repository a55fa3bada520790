//! Connections to nodes, and what their errors mean.

use std::pin::Pin;

use baton_node::{grpc, status};
use futures_util::Stream;
use tonic::{Code, Status, transport::Channel};

use crate::{core::request::LegError, limits};

/// One leg's events.
pub(crate) type LegStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A channel to a node, which connects on first use.
pub(crate) fn connect(address: &str) -> Result<Channel, grpc::AddressError> {
    let endpoint = grpc::endpoint(address)?
        .http2_keep_alive_interval(limits::NODE_KEEPALIVE)
        .keep_alive_timeout(limits::NODE_KEEPALIVE);
    Ok(endpoint.connect_lazy())
}

/// What a leg's status says. Every error that a node itself gives carries a reason; one without was made by the connection.
pub(crate) fn leg_error(status: &Status) -> LegError {
    let Some(reason) = status::reason(status) else {
        return match status.code() {
            // The node lives, and does not know what it was asked.
            Code::Unimplemented | Code::InvalidArgument | Code::OutOfRange => LegError::Failed {
                code: "PROTOCOL".to_owned(),
                message: status.message().to_owned(),
                retryable: false,
            },
            _ => LegError::Lost,
        };
    };
    let retryable = status::retry_after(status).is_some();
    match (status.code(), reason.as_str()) {
        (Code::ResourceExhausted, "SLOW_READER") => {}
        (Code::ResourceExhausted, _) => return LegError::Refused,
        (Code::Unavailable, "STARTING" | status::reasons::DRAINING) => return LegError::Refused,
        (_, status::reasons::DEADLINE) => return LegError::Deadline,
        _ => {}
    }
    LegError::Failed {
        code: reason,
        message: status.message().to_owned(),
        retryable,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn statuses_are_told_apart() {
        let retry = Duration::from_secs(1);
        let failed = |code: &str, message: &str, retryable| LegError::Failed {
            code: code.to_owned(),
            message: message.to_owned(),
            retryable,
        };
        let error = |code, reason: &str| status::error(code, reason, "m").build();
        for (status, expected) in [
            (Status::unavailable("connection refused"), LegError::Lost),
            (Status::unknown("h2 protocol error"), LegError::Lost),
            (Status::cancelled("h2 reset"), LegError::Lost),
            (status::shed("full", retry), LegError::Refused),
            (error(Code::ResourceExhausted, "KV_EXHAUSTED"), LegError::Refused),
            (
                error(Code::ResourceExhausted, "SLOW_READER"),
                failed("SLOW_READER", "m", false),
            ),
            (error(Code::Unavailable, "DRAINING"), LegError::Refused),
            (error(Code::DeadlineExceeded, "DEADLINE"), LegError::Deadline),
            (
                error(Code::DeadlineExceeded, "LEASE_ENDED"),
                failed("LEASE_ENDED", "m", false),
            ),
            (
                status::unavailable("ENGINE_LOST", "m", retry),
                failed("ENGINE_LOST", "m", true),
            ),
            (Status::unimplemented("what?"), failed("PROTOCOL", "what?", false)),
        ] {
            assert_eq!(leg_error(&status), expected, "{status:?}");
        }
    }
}
