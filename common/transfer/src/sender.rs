//! One push on a prefill node.

use std::ops::Range;

use baton_kv::{BlockId, BlockName, Checksum, Epoch, Generation, KvIdentity, KvLayout, NodeId, Time, TokenId};

use crate::{Claims, FinalClaims, Reject, Ticket, WireError};

/// Where a push is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SenderState {
    /// OPEN is to be sent, or to be answered.
    Opening,
    /// Blocks are sent as they are computed.
    Sending,
    /// FINAL is sent; the verdict is awaited.
    Awaiting,
    /// The decode node has verified everything.
    Verified,
    /// It will not.
    Failed(PushFailure),
}

/// Why a push failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PushFailure {
    /// The decode node refused.
    #[error("the decode node refused the push: {0}")]
    Rejected(Reject),
    /// The lease ended without an answer to the heartbeats.
    #[error("the lease ended")]
    LeaseEnded,
    /// The request's deadline passed.
    #[error("the request's deadline passed")]
    Deadline,
    /// The decode node asked for something that makes no sense.
    #[error("the decode node broke the protocol")]
    Protocol,
}

/// One block to read and send, as runs of layers ([`layer_runs`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockToSend {
    /// Index into the ticket's slots.
    pub slot: usize,
    /// The slot's generation.
    pub generation: Generation,
    /// Where it lies on this node.
    pub block: BlockId,
    /// Tokens to send.
    pub valid_tokens: usize,
}

/// What the driver sends next.
#[derive(Clone, PartialEq, Debug)]
pub enum SenderAction {
    /// OPEN.
    Open(Claims),
    /// All pieces of one block; then [`Sender::sent`].
    Block(BlockToSend),
    /// HEARTBEAT.
    Heartbeat,
    /// FINAL.
    Final(FinalClaims),
}

/// Cuts a block's layers into runs of at most [`crate::limits::PIECE_BYTES`] (at least one layer), nearly equal in size.
pub fn layer_runs(layout: &KvLayout, valid_tokens: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let layer_bytes = layout.valid_bytes(valid_tokens) / layout.layers;
    let per_piece = (crate::limits::PIECE_BYTES / layer_bytes.max(1)).clamp(1, layout.layers);
    let layers = layout.layers;
    let run = layers.div_ceil(layers.div_ceil(per_piece));
    (0..layers)
        .step_by(run)
        .map(move |first| first..(first + run).min(layers))
}

/// One push. Pure; the driver asks [`Sender::next`] what to send, and tells it what came back.
pub struct Sender {
    _private: (),
}

#[allow(unused_variables, clippy::todo)]
impl Sender {
    /// For `ticket`, which arrived at `now`: until the first answer the lease counts from then. `root` is the parent of the prompt's first block.
    /// Fails when the ticket's slots do not fit the prompt or this node's layout, identity and protocol.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        ticket: Ticket,
        node: NodeId,
        epoch: Epoch,
        identity: KvIdentity,
        layout: KvLayout,
        root: BlockName,
        prompt: &[TokenId],
        deadline: Time,
        now: Time,
    ) -> Result<Self, WireError> {
        todo!()
    }

    /// Positions `0..tokens` of the prompt are in the pool, in the blocks of `table`. Never goes back; blocks that were sent are not looked at again.
    pub fn computed(&mut self, tokens: usize, table: &[BlockId]) {
        todo!()
    }

    /// The first token was drawn: the prompt is complete.
    pub fn first_token(&mut self, token: TokenId, logprob: f32) {
        todo!()
    }

    /// What to send now, in order; `None` until something happens or [`Sender::wake_at`].
    pub fn next(&mut self, now: Time) -> Option<SenderAction> {
        todo!()
    }

    /// All pieces of a slot were sent, and this is the checksum of what was read.
    pub fn sent(&mut self, slot: usize, checksum: Checksum) {
        todo!()
    }

    /// ACCEPTED.
    pub fn accepted(&mut self, lease_ms: u64, now: Time) {
        todo!()
    }

    /// RENEWED.
    pub fn renewed(&mut self, lease_ms: u64, now: Time) {
        todo!()
    }

    /// RESEND.
    pub fn resend(&mut self, slots: &[usize]) {
        todo!()
    }

    /// VERIFIED.
    pub fn verified(&mut self) {
        todo!()
    }

    /// REJECTED.
    pub fn rejected(&mut self, reject: Reject) {
        todo!()
    }

    /// When to call [`Sender::next`] again at the latest.
    pub fn wake_at(&self) -> Time {
        todo!()
    }

    /// Where the push is, at `now`.
    pub fn state(&self) -> SenderState {
        todo!()
    }

    /// Blocks that have to travel.
    pub fn blocks(&self) -> usize {
        todo!()
    }

    /// Their payload.
    pub fn bytes(&self) -> u64 {
        todo!()
    }
}
