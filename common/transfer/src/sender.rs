//! One push on a prefill node.

mod slots;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use baton_kv::{BlockId, BlockName, Checksum, Epoch, KvIdentity, KvLayout, Lease, NodeId, Time, TokenId, name_blocks};
use baton_proto::PROTOCOL_MIN;

use crate::{Claims, FinalClaims, FirstToken, ManifestEntry, Reject, Ticket, Transport, WireError, limits};
use slots::Slots;

pub use slots::RunToSend;

/// Where a push is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SenderState {
    /// OPEN is to be sent, or to be answered.
    Opening,
    /// The decode node has not mapped this node's pool, or not any more, and has taken nothing: [`Sender::reopen`], once, after it was offered again.
    Unmapped,
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

/// What the driver sends next.
#[derive(Clone, PartialEq, Debug)]
pub enum SenderAction {
    /// OPEN.
    Open(Claims),
    /// One frame of KV, never empty; then [`Sender::sent`] for each run. Of version 1: one run.
    Pieces(Vec<RunToSend>),
    /// HEARTBEAT.
    Heartbeat,
    /// FINAL.
    Final(FinalClaims),
}

/// How finely a sender knows when it handed its frames over: an answer counts from an earlier one's time rather than from a later one's.
const MARKS_PER_HEARTBEAT: u64 = 8;

/// What a sender knows of its node and its request.
#[derive(Clone, Debug)]
pub struct SenderConfig<'a> {
    /// This node's name.
    pub node: NodeId,
    /// This process's life.
    pub epoch: Epoch,
    /// What this node's KV means.
    pub identity: KvIdentity,
    /// This node's pool's shape.
    pub layout: KvLayout,
    /// Newest version of the handoff that it speaks.
    pub protocol_max: u32,
    /// How the KV is to travel; version 1 knows gRPC only.
    pub transport: Transport,
    /// Parent of the prompt's first block.
    pub root: BlockName,
    /// The prompt.
    pub prompt: &'a [TokenId],
    /// The request's deadline on this node's clock.
    pub deadline: Time,
}

/// One push. Pure; the driver asks [`Sender::next`] what to send, and tells it what came back.
pub struct Sender {
    claims: Claims,
    /// Of the full blocks, from the first slot's on.
    names: Vec<BlockName>,
    state: SenderState,
    deadline: Time,
    lease: Lease,
    open_sent: bool,
    /// Frames handed over so far.
    frames: u64,
    /// Of some frames that were not answered yet: their numbers, and when they were handed over. At most [`MARKS_PER_HEARTBEAT`] of each heartbeat's time.
    marks: VecDeque<(u64, Time)>,
    heartbeat_ms: u64,
    next_heartbeat: Time,
    prompt_tokens: usize,
    slots: Slots,
    first: Option<FirstToken>,
    resent: bool,
    reopened: bool,
}

impl Sender {
    /// For `ticket`, which arrived at `now`: until the first answer the lease counts from then. Fails when the ticket's slots do not fit
    /// the prompt, or its layout, identity or protocol are not this node's.
    pub fn new(ticket: Ticket, config: SenderConfig<'_>, now: Time) -> Result<Self, WireError> {
        let blocks = config.layout.blocks_for(config.prompt.len());
        if ticket.identity != config.identity {
            return Err(WireError("ticket.kv_identity"));
        }
        if ticket.layout != config.layout {
            return Err(WireError("ticket.layout"));
        }
        let protocol = ticket.protocol.min(config.protocol_max);
        if protocol < PROTOCOL_MIN {
            return Err(WireError("ticket.protocol"));
        }
        if ticket.slots.is_empty() || ticket.held_blocks.checked_add(ticket.slots.len()) != Some(blocks) {
            return Err(WireError("ticket.slots"));
        }
        let mut names = name_blocks(config.root, config.prompt, config.layout.block_tokens);
        names.drain(..ticket.held_blocks);
        let lease = Lease::grant(now, ticket.lease_ms, config.deadline);
        let heartbeat_ms = heartbeat_ms(ticket.lease_ms);
        Ok(Self {
            claims: Claims {
                protocol,
                sender_epoch: config.epoch,
                sender_node: config.node,
                request: ticket.request,
                attempt: ticket.attempt,
                epoch: ticket.epoch,
                handoff: ticket.handoff,
                capability: ticket.capability.clone(),
                identity: config.identity,
                layout: config.layout,
                transport: if protocol < 2 {
                    Transport::Grpc
                } else {
                    config.transport
                },
            },
            names,
            state: SenderState::Opening,
            deadline: config.deadline,
            lease,
            open_sent: false,
            frames: 0,
            marks: VecDeque::new(),
            heartbeat_ms,
            next_heartbeat: now.after_ms(heartbeat_ms),
            prompt_tokens: config.prompt.len(),
            slots: Slots::new(&ticket, config.prompt.len(), protocol),
            first: None,
            resent: false,
            reopened: false,
        })
    }

    /// Positions `0..tokens` of the prompt are in the pool, in the blocks of `table`. Progress never goes
    /// back: where it would, the call changes nothing.
    pub fn computed(&mut self, tokens: usize, table: &[BlockId]) {
        self.slots.computed(tokens.min(self.prompt_tokens), table);
    }

    /// The first `layers` layers of positions `0..tokens` are in the pool, in the blocks of `table`: they may leave before the others are computed. Like
    /// [`Sender::computed`] otherwise.
    pub fn computed_layers(&mut self, tokens: usize, layers: usize, table: &[BlockId]) {
        let layers = layers.min(self.claims.layout.layers);
        self.slots
            .computed_layers(tokens.min(self.prompt_tokens), layers, table);
    }

    /// The first token was drawn: the prompt is complete.
    pub fn first_token(&mut self, first: FirstToken) {
        self.first.get_or_insert(first);
    }

    /// What to send now, in order; `None` until something happens or [`Sender::wake_at`]. `room`: whether the driver can take a frame of KV now.
    /// Ends the push once its lease or deadline has passed.
    pub fn next(&mut self, now: Time, room: bool) -> Option<SenderAction> {
        if self.ended() {
            return None;
        }
        if now >= self.deadline {
            self.state = SenderState::Failed(PushFailure::Deadline);
            return None;
        }
        if self.lease.ended(now) {
            self.state = SenderState::Failed(PushFailure::LeaseEnded);
            return None;
        }
        if self.state == SenderState::Unmapped {
            return None;
        }
        if self.state == SenderState::Opening {
            if std::mem::replace(&mut self.open_sent, true) {
                return None;
            }
            return Some(SenderAction::Open(self.claims.clone()));
        }
        if now >= self.next_heartbeat {
            self.next_heartbeat = now.after_ms(self.heartbeat_ms);
            return Some(SenderAction::Heartbeat);
        }
        if self.state != SenderState::Sending {
            return None;
        }
        if self.slots.planned() {
            return self.finish();
        }
        let runs = if room { self.slots.plan() } else { Vec::new() };
        (!runs.is_empty()).then_some(SenderAction::Pieces(runs))
    }

    /// FINAL, once every slot is on its way and the first token is known.
    fn finish(&mut self) -> Option<SenderAction> {
        let first = self.first.clone()?;
        let entry = |(slot, (valid_tokens, checksum))| ManifestEntry {
            name: self.names.get(slot).copied(),
            valid_tokens,
            checksum,
        };
        let manifest = self.slots.sums()?.into_iter().enumerate().map(entry).collect();
        self.state = SenderState::Awaiting;
        Some(SenderAction::Final(FinalClaims { manifest, first }))
    }

    /// A run of [`SenderAction::Pieces`] is on its way, and this is the checksum of what was read. Runs come in the order in which they were given out.
    pub fn sent(&mut self, run: &RunToSend, checksum: Checksum) {
        self.slots.sent(run, checksum);
    }

    /// The next frame of the stream, OPEN being the first, was handed to the transport. Whatever answers it extends the lease from now on.
    pub fn handed_over(&mut self, now: Time) {
        self.frames += 1;
        let apart_ms = self.heartbeat_ms / MARKS_PER_HEARTBEAT;
        if self.marks.back().is_none_or(|(_, last)| now >= last.after_ms(apart_ms)) {
            self.marks.push_back((self.frames, now));
        }
    }

    /// ACCEPTED, which answers OPEN.
    pub fn accepted(&mut self, lease_ms: u64) {
        if self.state == SenderState::Opening && self.open_sent {
            self.state = SenderState::Sending;
            self.renewed(lease_ms, 1);
        }
    }

    /// RENEWED, when the first `frames` frames had arrived: the lease counts from when the last of them was handed over, so that it ends here no later
    /// than there.
    pub fn renewed(&mut self, lease_ms: u64, frames: u64) {
        let mut since = None;
        while let Some((_, at)) = self.marks.pop_front_if(|(frame, _)| *frame <= frames) {
            since = Some(at);
        }
        if let Some(since) = since {
            self.lease.renew(since, lease_ms);
            self.heartbeat_ms = heartbeat_ms(lease_ms);
            self.next_heartbeat = self.next_heartbeat.min(since.after_ms(self.heartbeat_ms));
        }
    }

    /// RESEND. The decode node asks at most once; a repetition changes nothing.
    pub fn resend(&mut self, slots: &[usize]) {
        if self.ended() || self.resent {
            return;
        }
        if self.state != SenderState::Awaiting || slots.is_empty() || slots.iter().any(|slot| *slot >= self.slots.len())
        {
            self.state = SenderState::Failed(PushFailure::Protocol);
            return;
        }
        self.resent = true;
        self.state = SenderState::Sending;
        for slot in slots {
            self.slots.again(*slot);
        }
    }

    /// VERIFIED, which answers FINAL.
    pub fn verified(&mut self) {
        if !self.ended() {
            self.state = match self.state {
                SenderState::Awaiting => SenderState::Verified,
                _ => SenderState::Failed(PushFailure::Protocol),
            };
        }
    }

    /// REJECTED.
    pub fn rejected(&mut self, reject: Reject) {
        if !self.ended() {
            self.state = match (self.state, reject) {
                (SenderState::Opening, Reject::PoolNotMapped) if !self.reopened => SenderState::Unmapped,
                _ => SenderState::Failed(PushFailure::Rejected(reject)),
            };
        }
    }

    /// Another stream takes the place of the one that was refused in [`SenderState::Unmapped`]: OPEN is to be sent anew, for this transport. What was computed
    /// meanwhile is kept, and the lease still counts from the ticket.
    pub fn reopen(&mut self, transport: Transport) {
        if self.state == SenderState::Unmapped {
            self.state = SenderState::Opening;
            self.claims.transport = transport;
            self.reopened = true;
            self.open_sent = false;
            self.frames = 0;
            self.marks.clear();
        }
    }

    /// When to call [`Sender::next`] again at the latest.
    pub fn wake_at(&self) -> Time {
        match self.state {
            SenderState::Sending | SenderState::Awaiting => self.lease.ends().min(self.next_heartbeat),
            _ => self.lease.ends(),
        }
    }

    /// Where the push is.
    pub fn state(&self) -> SenderState {
        self.state
    }

    /// Blocks that have to travel.
    pub fn blocks(&self) -> usize {
        self.slots.len()
    }

    /// Their payload.
    pub fn bytes(&self) -> u64 {
        self.slots.bytes()
    }

    /// Payload that was given out while other layers of its blocks were not computed yet.
    pub fn early_bytes(&self) -> u64 {
        self.slots.early_bytes()
    }

    /// The version that both ends speak.
    pub fn protocol(&self) -> u32 {
        self.claims.protocol
    }

    /// How the KV travels.
    pub fn transport(&self) -> Transport {
        self.claims.transport
    }

    fn ended(&self) -> bool {
        matches!(self.state, SenderState::Verified | SenderState::Failed(_))
    }
}

/// Between two heartbeats of a push whose lease is `lease_ms`.
pub(crate) fn heartbeat_ms(lease_ms: u64) -> u64 {
    (lease_ms / limits::HEARTBEATS_PER_LEASE).max(limits::HEARTBEAT_MS_MIN)
}
