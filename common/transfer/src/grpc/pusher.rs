//! The prefill node's end of a push.

use std::sync::Arc;

use baton_kv::{BlockName, Epoch, KvIdentity, KvMemory, NodeId, TokenId};
use tonic::metadata::MetadataMap;

use crate::{PushFailure, Ticket, WireError, grpc::PushInput};

/// What a pusher knows of its node.
#[derive(Clone, Debug)]
pub struct PusherConfig {
    /// This node's name.
    pub node: NodeId,
    /// This process's life.
    pub epoch: Epoch,
    /// What its KV means.
    pub identity: KvIdentity,
}

/// One push.
pub struct PushJob {
    /// The right to it, as it arrived.
    pub ticket: Ticket,
    /// Parent of the prompt's first block.
    pub root: BlockName,
    /// The prompt.
    pub prompt: Vec<TokenId>,
    /// What is left of the request's deadline, ms.
    pub deadline_ms: u64,
    /// Sent with the call (trace context).
    pub metadata: MetadataMap,
    /// What has been computed, as it goes.
    pub input: PushInput,
}

/// A push that was verified.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PushReport {
    /// Payload (a block sent twice counts once).
    pub kv_bytes: u64,
    /// Blocks.
    pub kv_blocks: usize,
    /// From the first token to the decode node's verdict.
    pub transfer_ms: f64,
    /// Payload over the time in which pieces were being sent.
    pub bytes_per_s: f64,
}

/// Why a push did not end verified. The decode node drains by itself.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The ticket does not fit the prompt or this node. No retry helps.
    #[error("the ticket cannot be used: {0}")]
    Ticket(#[from] WireError),
    /// The decode node cannot be reached. Another decode node helps.
    #[error("decode node at {address} cannot be reached: {message}")]
    Connect {
        /// Where.
        address: String,
        /// What the transport said.
        message: String,
    },
    /// The stream broke. A new attempt helps.
    #[error("the stream to the decode node broke: {0}")]
    Stream(String),
    /// Refused, or out of time.
    #[error(transparent)]
    Failed(#[from] PushFailure),
    /// The feed was dropped before the first token.
    #[error("the push was abandoned")]
    Abandoned,
    /// The node's own blocks could not be read.
    #[error("the prompt's KV could not be read")]
    Memory,
}

impl PushError {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Ticket(_) => "BAD_TICKET",
            Self::Connect { .. } => "PEER_UNREACHABLE",
            Self::Stream(_) => "PEER_LOST",
            Self::Failed(PushFailure::Rejected(reject)) => reject.code(),
            Self::Failed(PushFailure::LeaseEnded) => "LEASE_ENDED",
            Self::Failed(PushFailure::Deadline) => "DEADLINE_EXCEEDED",
            Self::Failed(PushFailure::Protocol) => "PEER_PROTOCOL",
            Self::Abandoned => "ABANDONED",
            Self::Memory => "KV_UNREADABLE",
        }
    }
}

/// Pushes prompts' KV to decode nodes; one per process.
pub struct Pusher {
    _private: (),
}

#[allow(unused_variables, clippy::todo)]
impl Pusher {
    /// Reads blocks from `memory`, whose layout it offers.
    pub fn new(config: PusherConfig, memory: Arc<dyn KvMemory>) -> Self {
        todo!()
    }

    /// Opens the stream at once and keeps the lease while the prompt waits or is computed; sends blocks as the feed reports them; ends with the decode node's verdict.
    ///
    /// Start it as soon as the ticket has arrived. Cancel-safe: dropping the future closes the stream, which aborts the handoff.
    pub async fn push(&self, job: PushJob) -> Result<PushReport, PushError> {
        todo!()
    }
}
