//! The decode node's table of incoming handoffs.

use std::ops::Range;

use baton_kv::{
    Attempt, BlockId, BlockName, Checksum, Epoch, Generation, HandoffId, KvIdentity, KvLayout, NodeId, OutOfBlocks,
    Pool, RequestId, Time, TokenId,
};

use crate::{Capability, Claims, FinalClaims, Reject, Ticket};

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

/// What a piece of KV claims about itself; its bytes stay with the transport.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PieceHeader {
    /// Index into the ticket's slots.
    pub slot: usize,
    /// The slot's generation.
    pub generation: Generation,
    /// Which layers.
    pub layers: Range<usize>,
    /// Tokens of the block that travel.
    pub valid_tokens: usize,
    /// Bytes that came.
    pub bytes: usize,
}

/// The right to copy one piece into a block, until it is given back to [`Receiver::landed`]. Counted: its block is not reused before.
#[must_use = "give it back with Receiver::landed"]
#[derive(PartialEq, Eq, Debug)]
pub struct WritePermit {
    handoff: HandoffId,
    slot: usize,
    block: BlockId,
    layers: Range<usize>,
    valid_tokens: usize,
}

impl WritePermit {
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
}

/// One block to be summed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VerifySlot {
    /// Index into the ticket's slots.
    pub slot: usize,
    /// Where it lies.
    pub block: BlockId,
    /// Over how many of its tokens.
    pub valid_tokens: usize,
}

/// Checksums to be taken where the bytes lie now. Counted like a write until it is given back to [`Receiver::sums`].
#[must_use = "give it back with Receiver::sums"]
#[derive(PartialEq, Eq, Debug)]
pub struct Verify {
    handoff: HandoffId,
    slots: Vec<VerifySlot>,
}

impl Verify {
    /// Whose.
    pub fn handoff(&self) -> HandoffId {
        self.handoff
    }

    /// The blocks, in slot order.
    pub fn slots(&self) -> &[VerifySlot] {
        &self.slots
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
        first_token: TokenId,
        /// Its log-probability.
        logprob: f32,
        /// Payload that was received (a block sent twice counts once).
        kv_bytes: u64,
        /// Blocks that were received.
        kv_blocks: usize,
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
    /// The drain deadline has passed and a copy or a sum is still under way on this node: a fault of the driver, to be logged. The blocks stay quarantined.
    DrainOverdue {
        /// The reservation.
        handoff: HandoffId,
        /// Permits not given back.
        in_flight: usize,
    },
}

/// The table of incoming handoffs. Pure; the driver keeps it beside the pool, behind one lock, and calls [`Receiver::tick`] at
/// [`Receiver::next_deadline`].
pub struct Receiver {
    config: ReceiverConfig,
}

#[allow(unused_variables, clippy::todo)]
impl Receiver {
    /// Empty.
    pub fn new(config: ReceiverConfig) -> Self {
        Self { config }
    }

    /// Finds the prompt's prefix in the pool (at most all but its last token) and grants blocks for the rest. An older attempt of the
    /// same request is aborted first.
    pub fn reserve(
        &mut self,
        reserve: Reserve,
        now: Time,
        pool: &mut Pool,
        actions: &mut Vec<ReceiverAction>,
    ) -> Result<Ticket, ReserveError> {
        todo!()
    }

    /// Extends the lease (the router, until it has dispatched; the sender's heartbeats do it through [`Receiver::heartbeat`]). Returns what remains, ms.
    pub fn renew(&mut self, handoff: HandoffId, now: Time) -> Result<u64, Reject> {
        todo!()
    }

    /// A stream's first frame. On success the stream is the only one that may fill the handoff; returns what remains of the lease, ms.
    pub fn opened(&mut self, stream: StreamId, claims: &Claims, now: Time) -> Result<u64, Reject> {
        todo!()
    }

    /// The sender is alive. Returns what remains of the lease, ms.
    pub fn heartbeat(&mut self, stream: StreamId, now: Time) -> Result<u64, Reject> {
        todo!()
    }

    /// A piece has come: says where it goes and renews the lease; `None` when it is here already and is to be dropped.
    pub fn begin_write(
        &mut self,
        stream: StreamId,
        piece: &PieceHeader,
        now: Time,
    ) -> Result<Option<WritePermit>, Reject> {
        todo!()
    }

    /// The copy has ended, well or (`written` false) not. Returns the checksums to take if this was the last piece and FINAL is here.
    pub fn landed(
        &mut self,
        permit: WritePermit,
        written: bool,
        now: Time,
        pool: &mut Pool,
        actions: &mut Vec<ReceiverAction>,
    ) -> Option<Verify> {
        todo!()
    }

    /// FINAL has come. Returns the checksums to take if every piece has landed.
    pub fn finished(&mut self, stream: StreamId, claims: &FinalClaims, now: Time) -> Result<Option<Verify>, Reject> {
        todo!()
    }

    /// The checksums of `verify`'s slots in their order; `None` when they could not be taken (counts as a mismatch of all).
    pub fn sums(
        &mut self,
        verify: Verify,
        sums: Option<&[Checksum]>,
        now: Time,
        pool: &mut Pool,
        actions: &mut Vec<ReceiverAction>,
    ) -> Result<Verdict, Reject> {
        todo!()
    }

    /// The sequence was submitted: the table's blocks are its own now. False when the handoff ended meanwhile: it was aborted
    /// ([`ReceiverAction::Aborted`] said so) and the blocks were given back.
    pub fn decoding(&mut self, handoff: HandoffId) -> bool {
        todo!()
    }

    /// The sequence has ended and the handoff is forgotten. Unknown handoffs and other states are ignored.
    pub fn released(&mut self, handoff: HandoffId, actions: &mut Vec<ReceiverAction>) {
        todo!()
    }

    /// Ends a handoff in any state before `Aborting`. In `Decoding` the sequence is the driver's to cancel. Unknown handoffs are ignored.
    pub fn abort(
        &mut self,
        handoff: HandoffId,
        reason: AbortReason,
        now: Time,
        pool: &mut Pool,
        actions: &mut Vec<ReceiverAction>,
    ) {
        todo!()
    }

    /// The transport has closed the stream: no byte can come from it any more. Before `Verified` this aborts the handoff, with
    /// `refused` as the reason where the stream was closed for that.
    pub fn stream_closed(
        &mut self,
        stream: StreamId,
        refused: Option<Reject>,
        now: Time,
        pool: &mut Pool,
        actions: &mut Vec<ReceiverAction>,
    ) {
        todo!()
    }

    /// Ends what has passed its deadline.
    pub fn tick(&mut self, now: Time, pool: &mut Pool, actions: &mut Vec<ReceiverAction>) {
        todo!()
    }

    /// When [`Receiver::tick`] has something to do next, if nothing else happens.
    pub fn next_deadline(&self) -> Option<Time> {
        todo!()
    }

    /// Where a handoff is; `None` when released or unknown.
    pub fn state(&self, handoff: HandoffId) -> Option<HandoffState> {
        todo!()
    }

    /// Live handoffs, aborting ones included. 0 when idle.
    pub fn handoffs(&self) -> usize {
        todo!()
    }
}
