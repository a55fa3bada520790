//! What a failed push tells the router.

use baton_node::{limits, status};
use baton_transfer::{PushFailure, grpc::PushError, path::PathError};
use tonic::{Code, Status};

/// A status whose reason is the error's code, but for refusals: those are ABORTED `HANDOFF_REJECTED`, with the decode node's code as metadata `reject`.
pub(crate) fn push_status(error: &PushError) -> Status {
    let message = error.to_string();
    let retry = limits::SHED_RETRY;
    match error {
        PushError::Failed(PushFailure::Rejected(reject)) => {
            let status = status::error(Code::Aborted, "HANDOFF_REJECTED", message).with("reject", reject.code());
            if reject.retry_helps() {
                status.retry_after(retry)
            } else {
                status
            }
            .build()
        }
        PushError::Failed(PushFailure::Deadline) => {
            status::error(Code::DeadlineExceeded, status::reasons::DEADLINE, message).build()
        }
        PushError::Failed(PushFailure::LeaseEnded) => status::error(Code::DeadlineExceeded, error.code(), message)
            .retry_after(retry)
            .build(),
        PushError::Connect { .. } | PushError::Stream(_) => status::unavailable(error.code(), message, retry),
        PushError::Path(PathError::Unavailable { .. }) => {
            status::error(Code::FailedPrecondition, error.code(), message).build()
        }
        PushError::Path(PathError::Slow { .. }) => status::unavailable(error.code(), message, retry),
        PushError::Ticket(_) => status::error(Code::InvalidArgument, error.code(), message)
            .field("ticket")
            .build(),
        PushError::Failed(PushFailure::Protocol) | PushError::Memory => {
            status::error(Code::Internal, error.code(), message).build()
        }
    }
}
