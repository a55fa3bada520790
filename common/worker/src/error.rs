//! Why a sequence did not come to its end here.

use baton_node::{limits, status};
use baton_scheduler::SubmitError;
use baton_transfer::{AbortReason, ReserveError};
use tonic::{Code, Status};

/// Why a sequence was refused or ended early. Becomes a status with a stable reason ([`SequenceError::reason`]).
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SequenceError {
    /// Not taken into the queue.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// Nothing was reserved.
    #[error(transparent)]
    Reserve(#[from] ReserveError),
    /// The handoff came to nothing.
    #[error("the handoff came to nothing: {0}")]
    Handoff(AbortReason),
    /// The reader of its updates fell too far behind.
    #[error("the stream's reader fell too far behind")]
    SlowReader,
    /// The engine refused the step that it was in.
    #[error("the engine refused a step: {0}")]
    StepRefused(String),
    /// The engine's device is gone, or its thread has ended.
    #[error("the node's engine is lost")]
    EngineLost,
}

impl SequenceError {
    /// Stable, UPPER_SNAKE_CASE.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Submit(SubmitError::QueueFull { .. }) => "QUEUE_FULL",
            Self::Submit(SubmitError::TooLong { .. }) => status::reasons::CONTEXT_LENGTH,
            Self::Submit(SubmitError::EmptyPrompt) | Self::Reserve(ReserveError::EmptyPrompt) => {
                status::reasons::INVALID_FIELD
            }
            Self::Reserve(ReserveError::OutOfBlocks(_)) => "KV_EXHAUSTED",
            Self::Reserve(ReserveError::TooManyHandoffs { .. }) => "TOO_MANY_HANDOFFS",
            Self::Reserve(ReserveError::StaleAttempt { .. }) => "STALE_ATTEMPT",
            Self::Reserve(ReserveError::IdentityMismatch) => "IDENTITY_MISMATCH",
            Self::Reserve(ReserveError::DeadlinePassed) => status::reasons::DEADLINE,
            Self::Handoff(reason) => abort_code(*reason),
            Self::SlowReader => "SLOW_READER",
            Self::StepRefused(_) => "STEP_REFUSED",
            Self::EngineLost => "ENGINE_LOST",
        }
    }

    /// The gRPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::Submit(SubmitError::QueueFull { .. })
            | Self::Reserve(ReserveError::OutOfBlocks(_) | ReserveError::TooManyHandoffs { .. })
            | Self::SlowReader => Code::ResourceExhausted,
            Self::Submit(_) | Self::Reserve(ReserveError::EmptyPrompt) => Code::InvalidArgument,
            Self::Reserve(ReserveError::StaleAttempt { .. }) => Code::Aborted,
            Self::Reserve(ReserveError::IdentityMismatch) => Code::FailedPrecondition,
            Self::Reserve(ReserveError::DeadlinePassed) => Code::DeadlineExceeded,
            Self::Handoff(reason) => match reason {
                AbortReason::Cancelled => Code::Cancelled,
                AbortReason::LeaseEnded | AbortReason::Deadline => Code::DeadlineExceeded,
                AbortReason::Superseded | AbortReason::Rejected(_) => Code::Aborted,
                AbortReason::StreamClosed | AbortReason::Node => Code::Unavailable,
            },
            Self::StepRefused(_) => Code::Internal,
            Self::EngineLost => Code::Unavailable,
        }
    }

    fn retry_helps(&self) -> bool {
        match self {
            Self::Handoff(AbortReason::Rejected(reject)) => reject.retry_helps(),
            Self::Handoff(AbortReason::LeaseEnded | AbortReason::StreamClosed | AbortReason::Node) => true,
            Self::Submit(SubmitError::QueueFull { .. })
            | Self::Reserve(ReserveError::OutOfBlocks(_) | ReserveError::TooManyHandoffs { .. })
            | Self::EngineLost => true,
            _ => false,
        }
    }
}

impl From<SequenceError> for Status {
    fn from(error: SequenceError) -> Self {
        let mut status = status::error(error.code(), error.reason(), error.to_string());
        if error.retry_helps() {
            status = status.retry_after(limits::SHED_RETRY);
        }
        if let SequenceError::Handoff(AbortReason::Rejected(reject)) = error {
            status = status.with("reject", reject.code());
        }
        status.build()
    }
}

/// The stable code of an aborted handoff.
pub(crate) fn abort_code(reason: AbortReason) -> &'static str {
    match reason {
        AbortReason::Cancelled => "CANCELLED",
        AbortReason::LeaseEnded => "LEASE_ENDED",
        AbortReason::Deadline => status::reasons::DEADLINE,
        AbortReason::Superseded => "SUPERSEDED",
        AbortReason::StreamClosed => "PEER_LOST",
        AbortReason::Rejected(_) => "HANDOFF_REJECTED",
        AbortReason::Node => "NODE_REFUSED",
    }
}
