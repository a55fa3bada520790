//! Connections to nodes, and what their errors mean.

use std::{future, pin::Pin};

use baton_node::{grpc, status};
use futures_util::{Stream, StreamExt, TryFutureExt, TryStreamExt, stream};
use tonic::{
    Code, Response, Status, Streaming,
    transport::{Channel, ClientTlsConfig},
};

use crate::{core::request::LegError, limits};

/// One leg's events; `None`, first, when the node has taken the call.
pub(crate) type LegStream<T> = Pin<Box<dyn Stream<Item = Result<Option<T>, Status>> + Send>>;

/// The events of the call that `open` opens.
pub(crate) fn leg<T: Send + 'static>(
    open: impl Future<Output = Result<Response<Streaming<T>>, Status>> + Send + 'static,
) -> LegStream<T> {
    let opened = open.map_ok(|answer| {
        let events = answer.into_inner().map_ok(Some);
        stream::once(future::ready(Ok(None))).chain(events)
    });
    Box::pin(opened.try_flatten_stream())
}

/// A channel to a node, which connects on first use.
pub(crate) fn connect(address: &str, tls: Option<&ClientTlsConfig>) -> Result<Channel, grpc::AddressError> {
    let endpoint = grpc::endpoint(address, tls)?
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
        (Code::ResourceExhausted, "SLOW_READER") => return LegError::SlowReader,
        (Code::InvalidArgument, status::reasons::CONTEXT_LENGTH) => {
            return LegError::TooLong(status.message().to_owned());
        }
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
            (error(Code::ResourceExhausted, "SLOW_READER"), LegError::SlowReader),
            (
                error(Code::InvalidArgument, "CONTEXT_LENGTH"),
                LegError::TooLong("m".to_owned()),
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
