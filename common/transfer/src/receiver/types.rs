//! What goes into a receiver and what comes out.

use std::ops::Range;

use baton_kv::{
    Attempt, BlockId, BlockName, Epoch, Generation, HandoffId, KvIdentity, KvLayout, NodeId, OutOfBlocks, RequestId,
    Time, TokenId,
};

use crate::{Capability, FirstToken, Reject};

/// One push stream on this node, drawn by the transport: unique within the process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct StreamId(pub u64);

/// What a receiver knows of its node.
#[derive(Clone, Debug)]
pub struct ReceiverConfig {
    /// This node's name.
    pub node: NodeId,
    /// host:port at which its Handoff service listens.
    pub address: String,
    /// This process's life.
    pub epoch: Epoch,
    /// What its KV means.
    pub identity: KvIdentity,
    /// The pool's shape.
    pub layout: KvLayout,
    /// Tokens are below it.
    pub vocabulary: usize,
    /// Newest version of the handoff that it speaks.
    pub protocol_max: u32,
    /// See [`crate::limits::LEASE_MS`].
    pub lease_ms: u64,
    /// See [`crate::limits::DRAIN_MS`].
    pub drain_ms: u64,
    /// See [`crate::limits::MAX_HANDOFFS`].
    pub max_handoffs: usize,
}

/// A request for blocks.
#[derive(Clone, Debug)]
pub struct Reserve {
    /// Whose prompt.
    pub request: RequestId,
    /// Which dispatch of it.
    pub attempt: Attempt,
    /// The identity that the router wants.
    pub identity: KvIdentity,
    /// Parent of the first block's name.
    pub root: BlockName,
    /// The prompt (with a replay: prompt and output so far). At least one token.
    pub prompt: Vec<TokenId>,
    /// The request's deadline on this node's clock.
    pub deadline: Time,
    /// Drawn by the driver.
    pub capability: Capability,
}

/// Why nothing was reserved. Nothing was changed, except that an older attempt of the same request may have been aborted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReserveError {
    /// The pool is full. A retry helps.
    #[error(transparent)]
    OutOfBlocks(#[from] OutOfBlocks),
    /// The table is full. A retry helps.
    #[error("{limit} handoffs are under way already")]
    TooManyHandoffs {
        /// `max_handoffs`.
        limit: usize,
    },
    /// This or a newer attempt of the request is here already. No retry helps.
    #[error("attempt {} of the request is here already", current.0)]
    StaleAttempt {
        /// The attempt that is here.
        current: Attempt,
    },
    /// The node's KV does not mean what the router wants. Another node helps.
    #[error("this node has another KV identity")]
    IdentityMismatch,
    /// The prompt is empty. No retry helps.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The deadline has passed. No retry helps.
    #[error("the request's deadline has passed")]
    DeadlinePassed,
}

/// Where a handoff is. `Drained` and `Released` are moments, not states: a drained handoff's blocks are free, a released one is forgotten.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HandoffState {
    /// Blocks are granted; no stream yet. Ends with the lease.
    Reserved,
    /// A stream fills them. Ends with the lease.
    Filling,
    /// All bytes are right; the driver is about to decode from them. Ends with the request's deadline.
    Verified,
    /// The blocks belong to a sequence. Ends with the request's deadline, or when the driver says so.
    Decoding,
    /// Aborted; a write may still land. Ends when drained, at the drain deadline unless a copy is under way right then.
    Aborting,
}

/// Why a handoff was aborted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum AbortReason {
    /// The router closed its stream, or asked for it.
    #[error("cancelled by the router")]
    Cancelled,
    /// Nobody renewed the lease.
    #[error("the lease ended")]
    LeaseEnded,
    /// The request's deadline passed.
    #[error("the request's deadline passed")]
    Deadline,
    /// A newer attempt of the request arrived.
    #[error("a newer attempt arrived")]
    Superseded,
    /// The push stream closed before the KV was verified.
    #[error("the push stream closed early")]
    StreamClosed,
    /// The push was refused.
    #[error("the push was refused: {0}")]
    Rejected(Reject),
    /// The node could not go on (its queue was full, it is shutting down).
    #[error("the decode node could not go on")]
    Node,
}

/// What layers of one block claim about themselves; their bytes stay with the transport.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RunHeader {
    /// Index into the ticket's slots.
    pub slot: usize,
    /// The slot's generation.
    pub generation: Generation,
    /// Which layers.
    pub layers: Range<usize>,
    /// Tokens of the block that travel.
    pub valid_tokens: usize,
    /// Over shared memory: where it lies in the sender's pool.
    pub source_block: BlockId,
}

/// One frame of KV. Taken whole or not at all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PiecesHeader {
    /// The version whose frame it is.
    pub protocol: u32,
    /// At most [`crate::limits::FRAME_RUNS`].
    pub runs: Vec<RunHeader>,
    /// Bytes that came: those of the runs in their order; none over shared memory.
    pub bytes: usize,
}

/// Layers of one block that are to be copied to their place.
#[derive(PartialEq, Eq, Debug)]
pub struct PieceWrite {
    pub(super) slot: usize,
    pub(super) block: BlockId,
    pub(super) layers: Range<usize>,
    pub(super) valid_tokens: usize,
    pub(super) bytes: Range<usize>,
    pub(super) source_block: BlockId,
}

impl PieceWrite {
    /// Where to.
    pub fn block(&self) -> BlockId {
        self.block
    }

    /// Which layers.
    pub fn layers(&self) -> Range<usize> {
        self.layers.clone()
    }

    /// Tokens of each layer's piece.
    pub fn valid_tokens(&self) -> usize {
        self.valid_tokens
    }

    /// Where in the frame's bytes the pieces lie, layer after layer; over shared memory only the length counts.
    pub fn bytes(&self) -> Range<usize> {
        self.bytes.clone()
    }

    /// Over shared memory: the block of the sender's pool to copy from. Not checked against that pool.
    pub fn source_block(&self) -> BlockId {
        self.source_block
    }
}

/// The right to copy what one frame brought into blocks, until it is given back to [`crate::Receiver::landed`]. Counted: its blocks are not reused before.
#[must_use = "give it back with Receiver::landed"]
#[derive(PartialEq, Eq, Debug)]
pub struct WritePermit {
    pub(super) handoff: HandoffId,
    pub(super) writes: Vec<PieceWrite>,
}

impl WritePermit {
    /// Whose.
    pub fn handoff(&self) -> HandoffId {
        self.handoff
    }

    /// What to copy; never empty.
    pub fn writes(&self) -> &[PieceWrite] {
        &self.writes
    }
}

/// What the checksums said.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// All right: [`ReceiverAction::Verified`] was emitted; tell the sender.
    Verified,
    /// These slots are wanted once more, and FINAL after them.
    Resend {
        /// Indices into the ticket's slots.
        slots: Vec<usize>,
    },
}

/// What the driver does next.
#[derive(Clone, PartialEq, Debug)]
pub enum ReceiverAction {
    /// The prompt's KV is here. Submit the sequence and call [`Receiver::decoding`], or [`Receiver::abort`].
    Verified {
        /// The reservation.
        handoff: HandoffId,
        /// Whose.
        request: RequestId,
        /// Which dispatch.
        attempt: Attempt,
        /// Blocks of the whole prompt, held and received, in order; each is held once for the sequence to come.
        table: Vec<BlockId>,
        /// Output index 0.
        first: FirstToken,
        /// Payload that was received (a block sent twice counts once).
        kv_bytes: u64,
        /// Blocks that were received.
        kv_blocks: usize,
        /// When (the last) FINAL came.
        final_at: Time,
    },
    /// The handoff ends without (further) tokens: tell the router. If it was decoding, cancel the sequence, which owns the blocks. Emitted at most once.
    Aborted {
        /// The reservation.
        handoff: HandoffId,
        /// Whose.
        request: RequestId,
        /// Which dispatch.
        attempt: Attempt,
        /// Why.
        reason: AbortReason,
    },
    /// Close this stream from this side (`grpc::Fences::fence`), telling the peer why where that still goes.
    Fence {
        /// The stream.
        stream: StreamId,
        /// What to tell the peer.
        reject: Reject,
    },
    /// Forgotten; none of its blocks is granted or quarantined any more. Exactly once per reservation.
    Released {
        /// The reservation.
        handoff: HandoffId,
    },
    /// The drain deadline has passed and a copy is still under way on this node: a fault of the driver, to be logged. The blocks stay quarantined.
    DrainOverdue {
        /// The reservation.
        handoff: HandoffId,
        /// Permits not given back.
        in_flight: usize,
    },
}
