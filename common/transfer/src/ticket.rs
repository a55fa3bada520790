//! The ticket: the right to fill slots on a decode node, and to have what they hold decoded.

use baton_kv::{Attempt, BlockId, Epoch, Generation, GrantedSlot, HandoffId, KvIdentity, KvLayout, NodeId, RequestId};
use baton_proto::node::v1 as pb;

use crate::{
    Capability,
    wire::{WireError, layout_from_proto, layout_to_proto},
};

/// A grant of blocks, as it travels from decode node to router to prefill node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ticket {
    /// Whose prompt.
    pub request: RequestId,
    /// Which dispatch of it.
    pub attempt: Attempt,
    /// Who granted.
    pub decode_node: NodeId,
    /// host:port of its Handoff service.
    pub address: String,
    /// Its life.
    pub epoch: Epoch,
    /// The reservation.
    pub handoff: HandoffId,
    /// Blocks of the prompt that the decode node holds already, from the first: not to be sent.
    pub held_blocks: usize,
    /// One per block to be sent, from `held_blocks` on; the last may be the incomplete tail. Never empty.
    pub slots: Vec<GrantedSlot>,
    /// Remaining time when it was written.
    pub lease_ms: u64,
    /// What the bytes mean.
    pub identity: KvIdentity,
    /// Their shape.
    pub layout: KvLayout,
    /// Whoever shows it may push.
    pub capability: Capability,
    /// Newest version of the handoff that the decode node speaks.
    pub protocol: u32,
}

impl Ticket {
    /// Valid tokens of slot `index` of a prompt of `prompt_tokens`.
    pub fn valid_tokens(&self, index: usize, prompt_tokens: usize) -> usize {
        let start = (self.held_blocks + index) * self.layout.block_tokens;
        prompt_tokens.saturating_sub(start).min(self.layout.block_tokens)
    }

    /// For the wire.
    pub fn to_proto(&self) -> pb::Ticket {
        pb::Ticket {
            request_id: self.request.to_bytes().to_vec(),
            attempt: self.attempt.0,
            decode_node: self.decode_node.0.clone(),
            address: self.address.clone(),
            epoch: self.epoch.to_bytes().to_vec(),
            handoff_id: self.handoff.0,
            held_blocks: self.held_blocks as u32,
            slots: self
                .slots
                .iter()
                .map(|slot| pb::Slot {
                    block: slot.block.0,
                    generation: slot.generation.0,
                })
                .collect(),
            lease_ms: self.lease_ms,
            kv_identity: self.identity.0.to_vec(),
            layout: Some(layout_to_proto(&self.layout)),
            capability: self.capability.as_bytes().to_vec(),
            protocol: self.protocol,
        }
    }

    /// From the wire.
    pub fn from_proto(message: &pb::Ticket) -> Result<Self, WireError> {
        let layout = message.layout.as_ref().ok_or(WireError("ticket.layout"))?;
        if message.slots.is_empty() {
            return Err(WireError("ticket.slots"));
        }
        Ok(Self {
            request: RequestId::from_slice(&message.request_id).ok_or(WireError("ticket.request_id"))?,
            attempt: Attempt(message.attempt),
            decode_node: NodeId(message.decode_node.clone()),
            address: message.address.clone(),
            epoch: Epoch::from_slice(&message.epoch).ok_or(WireError("ticket.epoch"))?,
            handoff: HandoffId(message.handoff_id),
            held_blocks: message.held_blocks as usize,
            slots: message
                .slots
                .iter()
                .map(|slot| GrantedSlot {
                    block: BlockId(slot.block),
                    generation: Generation(slot.generation),
                })
                .collect(),
            lease_ms: message.lease_ms,
            identity: KvIdentity::from_slice(&message.kv_identity).ok_or(WireError("ticket.kv_identity"))?,
            layout: layout_from_proto(layout)?,
            capability: Capability::from_slice(&message.capability).ok_or(WireError("ticket.capability"))?,
            protocol: message.protocol,
        })
    }
}

/// What the first frame of a push claims; nothing of it is trusted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claims {
    /// Version that the sender speaks.
    pub protocol: u32,
    /// The sender's life, for logs.
    pub sender_epoch: Epoch,
    /// The sender's name, for logs.
    pub sender_node: NodeId,
    /// From the ticket.
    pub request: RequestId,
    /// From the ticket.
    pub attempt: Attempt,
    /// The decode node's, from the ticket.
    pub epoch: Epoch,
    /// From the ticket.
    pub handoff: HandoffId,
    /// From the ticket.
    pub capability: Capability,
    /// The sender's own.
    pub identity: KvIdentity,
    /// The sender's own.
    pub layout: KvLayout,
    /// How the KV travels.
    pub transport: Transport,
}

/// How KV travels from pool to pool. Frames travel over gRPC in any case.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Transport {
    /// In the frames.
    Grpc,
    /// The receiver copies it from the sender's pool. From version 2.
    Shm,
}

impl Transport {
    /// As it is called on the wire, in metrics and in flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Shm => "shm",
        }
    }
}

impl Claims {
    /// For the wire.
    pub fn to_proto(&self) -> pb::PushOpen {
        pb::PushOpen {
            protocol: self.protocol,
            sender_epoch: self.sender_epoch.to_bytes().to_vec(),
            request_id: self.request.to_bytes().to_vec(),
            attempt: self.attempt.0,
            epoch: self.epoch.to_bytes().to_vec(),
            handoff_id: self.handoff.0,
            capability: self.capability.as_bytes().to_vec(),
            kv_identity: self.identity.0.to_vec(),
            layout: Some(layout_to_proto(&self.layout)),
            sender_node: self.sender_node.0.clone(),
            transport: self.transport.name().to_owned(),
        }
    }

    /// From the wire.
    pub fn from_proto(message: &pb::PushOpen) -> Result<Self, WireError> {
        let layout = message.layout.as_ref().ok_or(WireError("open.layout"))?;
        Ok(Self {
            protocol: message.protocol,
            sender_epoch: Epoch::from_slice(&message.sender_epoch).ok_or(WireError("open.sender_epoch"))?,
            sender_node: NodeId(message.sender_node.clone()),
            request: RequestId::from_slice(&message.request_id).ok_or(WireError("open.request_id"))?,
            attempt: Attempt(message.attempt),
            epoch: Epoch::from_slice(&message.epoch).ok_or(WireError("open.epoch"))?,
            handoff: HandoffId(message.handoff_id),
            capability: Capability::from_slice(&message.capability).ok_or(WireError("open.capability"))?,
            identity: KvIdentity::from_slice(&message.kv_identity).ok_or(WireError("open.kv_identity"))?,
            layout: layout_from_proto(layout)?,
            transport: match message.transport.as_str() {
                "" | "grpc" => Transport::Grpc,
                "shm" => Transport::Shm,
                _ => return Err(WireError("open.transport")),
            },
        })
    }
}
