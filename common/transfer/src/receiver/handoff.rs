//! One row of the receiver's table.

use baton_kv::{
    Attempt, BlockId, BlockName, Checksum, GrantedSlot, HandoffId, KvLayout, Lease, RequestId, Time, TokenId,
    name_blocks,
};

use super::{StreamId, Verify, VerifySlot, fill::Fill, types::HandoffState};
use crate::{Capability, FinalClaims, Reject};

pub(super) enum Phase {
    Reserved,
    Filling,
    /// The whole prompt's blocks, held for the sequence to come.
    Verified {
        table: Vec<BlockId>,
    },
    Decoding,
    Aborting {
        drain_until: Time,
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
    /// Per slot: its checksum has matched.
    pub(super) matched: Vec<bool>,
    /// The stream that may fill it; kept while aborting, until it is closed.
    pub(super) stream: Option<StreamId>,
    /// Permits and sums that are out.
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
            Phase::Filling => HandoffState::Filling,
            Phase::Verified { .. } => HandoffState::Verified,
            Phase::Decoding => HandoffState::Decoding,
            Phase::Aborting { .. } => HandoffState::Aborting,
        }
    }

    /// When `tick` ends this state.
    pub(super) fn ends(&self) -> Time {
        match self.phase {
            Phase::Reserved | Phase::Filling => self.lease.ends(),
            Phase::Verified { .. } | Phase::Decoding => self.deadline,
            Phase::Aborting { drain_until } => drain_until,
        }
    }

    /// Valid tokens of a slot.
    pub(super) fn valid_tokens(&self, slot: usize, layout: &KvLayout) -> usize {
        (self.tokens.len() - slot * layout.block_tokens).min(layout.block_tokens)
    }

    /// Ready for frames: being filled, and the lease lasts.
    pub(super) fn check_filling(&self, now: Time) -> Result<(), Reject> {
        match self.phase {
            Phase::Filling if self.lease.ended(now) => Err(Reject::LeaseEnded),
            Phase::Filling => Ok(()),
            Phase::Aborting { .. } => Err(Reject::Aborted),
            Phase::Reserved | Phase::Verified { .. } | Phase::Decoding => Err(Reject::UnknownHandoff),
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

    /// The sums to take, once FINAL and every piece are here; counted as in flight.
    pub(super) fn verify_if_complete(&mut self, id: HandoffId, layout: &KvLayout) -> Option<Verify> {
        if self.claims.is_none() || !self.fill.complete() || self.in_flight > 0 {
            return None;
        }
        let slots = (0..self.slots.len())
            .filter(|slot| !self.matched[*slot])
            .map(|slot| VerifySlot {
                slot,
                block: self.slots[slot].block,
                valid_tokens: self.valid_tokens(slot, layout),
            })
            .collect();
        self.in_flight += 1;
        Some(Verify { handoff: id, slots })
    }

    /// Compares `sums` with the claims, marks the slots that match, and returns those that do not.
    pub(super) fn compare(&mut self, verify: &Verify, sums: &[Checksum]) -> Vec<usize> {
        let claims = self.claims.as_ref().expect("sums are taken after FINAL");
        let mut wrong = Vec::new();
        for (slot, sum) in verify.slots.iter().zip(sums) {
            if claims.manifest[slot.slot].checksum == *sum {
                self.matched[slot.slot] = true;
            } else {
                wrong.push(slot.slot);
            }
        }
        wrong
    }
}
