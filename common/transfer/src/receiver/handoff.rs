//! One row of the receiver's table.

use baton_kv::{Attempt, BlockId, BlockName, GrantedSlot, KvLayout, Lease, RequestId, Time, TokenId, name_blocks};

use super::{
    StreamId,
    fill::{Begin, Fill},
    types::{HandoffState, PieceWrite, PiecesHeader},
};
use crate::{Capability, FinalClaims, Reject, Transport, limits};

pub(super) enum Phase {
    Reserved,
    /// In frames of this version and transport.
    Filling {
        protocol: u32,
        transport: Transport,
    },
    /// The whole prompt's blocks, held for the sequence to come.
    Verified {
        table: Vec<BlockId>,
    },
    Decoding,
    Aborting {
        drain_until: Time,
        /// What late frames are told.
        reject: Reject,
    },
}

pub(super) struct Handoff {
    pub(super) request: RequestId,
    pub(super) attempt: Attempt,
    pub(super) capability: Capability,
    /// Of the first slot's block.
    pub(super) parent: BlockName,
    /// The prompt from the first slot's first token on.
    pub(super) tokens: Vec<TokenId>,
    pub(super) deadline: Time,
    pub(super) lease: Lease,
    pub(super) phase: Phase,
    /// The prefix found here, held once until the phase says otherwise.
    pub(super) held: Vec<BlockId>,
    pub(super) slots: Vec<GrantedSlot>,
    pub(super) fill: Fill,
    /// The stream that may fill it; kept while aborting, until it is closed.
    pub(super) stream: Option<StreamId>,
    /// Permits that are out.
    pub(super) in_flight: usize,
    pub(super) claims: Option<FinalClaims>,
    /// When these claims came.
    pub(super) final_at: Time,
    /// Slots have been asked for again already.
    pub(super) resent: bool,
}

impl Handoff {
    pub(super) fn state(&self) -> HandoffState {
        match self.phase {
            Phase::Reserved => HandoffState::Reserved,
            Phase::Filling { .. } => HandoffState::Filling,
            Phase::Verified { .. } => HandoffState::Verified,
            Phase::Decoding => HandoffState::Decoding,
            Phase::Aborting { .. } => HandoffState::Aborting,
        }
    }

    /// When `tick` ends this state.
    pub(super) fn ends(&self) -> Time {
        match self.phase {
            Phase::Reserved | Phase::Filling { .. } => self.lease.ends(),
            Phase::Verified { .. } | Phase::Decoding => self.deadline,
            Phase::Aborting { drain_until, .. } => drain_until,
        }
    }

    /// Valid tokens of a slot.
    pub(super) fn valid_tokens(&self, slot: usize, layout: &KvLayout) -> usize {
        (self.tokens.len() - slot * layout.block_tokens).min(layout.block_tokens)
    }

    /// Ready for frames: being filled, and the lease lasts.
    pub(super) fn check_filling(&self, now: Time) -> Result<(u32, Transport), Reject> {
        match self.phase {
            Phase::Filling { .. } if self.lease.ended(now) => Err(Reject::LeaseEnded),
            Phase::Filling { protocol, transport } => Ok((protocol, transport)),
            Phase::Aborting { reject, .. } => Err(reject),
            Phase::Reserved | Phase::Verified { .. } | Phase::Decoding => Err(Reject::UnknownHandoff),
        }
    }

    /// Marks what a frame brings as being written; what is here already is left out. An error leaves nothing marked.
    pub(super) fn begin(
        &mut self,
        frame: &PiecesHeader,
        transport: Transport,
        layout: &KvLayout,
    ) -> Result<Vec<PieceWrite>, Reject> {
        let mut writes = Vec::with_capacity(frame.runs.len());
        let begun = self.begin_all(frame, transport, layout, &mut writes);
        if begun.is_err() {
            for write in &writes {
                self.fill.undo(write.slot, &write.layers);
            }
        }
        begun.map(|()| writes)
    }

    fn begin_all(
        &mut self,
        frame: &PiecesHeader,
        transport: Transport,
        layout: &KvLayout,
        writes: &mut Vec<PieceWrite>,
    ) -> Result<(), Reject> {
        if frame.runs.is_empty() || frame.runs.len() > limits::FRAME_RUNS {
            return Err(Reject::Malformed);
        }
        let mut offset = 0;
        for run in &frame.runs {
            let slot = *self.slots.get(run.slot).ok_or(Reject::Malformed)?;
            if run.generation != slot.generation {
                return Err(Reject::StaleGeneration);
            }
            let valid_tokens = self.valid_tokens(run.slot, layout);
            if run.layers.is_empty() || run.layers.end > layout.layers || run.valid_tokens != valid_tokens {
                return Err(Reject::Malformed);
            }
            let bytes = run.layers.len() * (layout.valid_bytes(valid_tokens) / layout.layers);
            match self.fill.begin(run.slot, &run.layers) {
                Begin::Overlap => return Err(Reject::Malformed),
                Begin::Duplicate => {}
                Begin::Write => writes.push(PieceWrite {
                    slot: run.slot,
                    block: slot.block,
                    layers: run.layers.clone(),
                    valid_tokens,
                    bytes: offset..offset + bytes,
                    source_block: run.source_block,
                }),
            }
            offset += bytes;
        }
        let carried = match transport {
            Transport::Grpc => offset,
            Transport::Shm => 0,
        };
        if frame.bytes == carried {
            Ok(())
        } else {
            Err(Reject::Malformed)
        }
    }

    /// Whether FINAL describes the reserved prompt: one entry per slot, names recomputed from its tokens, counts.
    pub(super) fn check_manifest(&self, claims: &FinalClaims, layout: &KvLayout) -> Result<(), Reject> {
        let names = name_blocks(self.parent, &self.tokens, layout.block_tokens);
        let fits = claims.manifest.len() == self.slots.len()
            && claims.manifest.iter().enumerate().all(|(slot, entry)| {
                entry.valid_tokens == self.valid_tokens(slot, layout) && entry.name == names.get(slot).copied()
            });
        if fits { Ok(()) } else { Err(Reject::ManifestMismatch) }
    }

    /// The slots whose bytes are not what FINAL says, once FINAL and every run are here.
    pub(super) fn wrong_slots(&self) -> Option<Vec<usize>> {
        let claims = self.claims.as_ref().filter(|_| self.fill.complete())?;
        debug_assert_eq!(self.in_flight, 0, "what has landed is not written again");
        let wrong = |slot: &usize| self.fill.sum(*slot) != Some(claims.manifest[*slot].checksum);
        Some((0..self.slots.len()).filter(wrong).collect())
    }
}
