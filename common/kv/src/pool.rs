//! The pool's table: one row per block, with its owner.
//!
//! ```text
//! Free ──allocate──▶ Sequence(refs) ──last release──▶ Cached (if named) or Free
//!   │                    ▲    ▲                         │ reuse: acquire_prefix
//!   │                    │    └─────────────────────────┘ evict, least recently used: Free
//!   └──grant──▶ Granted(handoff) ──accept──┘
//!                  │ abort
//!                  ▼
//!              Quarantined(handoff) ──drained──▶ Free
//! ```

use crate::{BlockId, BlockName, Generation, HandoffId, KvEvent, TokenId};

/// Who owns a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// Nobody; its bytes mean nothing.
    Free,
    /// `refs` sequences (or pushes under way) read it; exactly one may append to it while it is unnamed.
    Sequence {
        /// How many; at least 1.
        refs: u32,
    },
    /// Nobody needs it now, but it can be found under its name until evicted.
    Cached,
    /// A remote writer may fill it.
    Granted(HandoffId),
    /// The handoff was aborted, and a write may still land.
    Quarantined(HandoffId),
}

/// How many blocks are in each state. `free + cached + held + granted + quarantined = total`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PoolCounts {
    /// Owned by nobody, nameless.
    pub free: usize,
    /// Findable, evictable.
    pub cached: usize,
    /// Held by sequences.
    pub held: usize,
    /// Granted to handoffs.
    pub granted: usize,
    /// Waiting for a transport to drain.
    pub quarantined: usize,
    /// All.
    pub total: usize,
}

/// The blocks asked for are not there, even after evicting every cached one. Nothing was changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{needed} KV blocks are needed and {available} are available")]
pub struct OutOfBlocks {
    /// Asked for.
    pub needed: usize,
    /// Free + cached.
    pub available: usize,
}

/// What a prefix search found: full blocks, in order, each now held once more.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PrefixHit {
    /// The blocks.
    pub blocks: Vec<BlockId>,
    /// Their names.
    pub names: Vec<BlockName>,
}

/// A block that a remote writer may fill.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GrantedSlot {
    /// Which block.
    pub block: BlockId,
    /// Which grant of it.
    pub generation: Generation,
}

/// A named block, as snapshots list it (parents before children).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NamedBlock {
    /// Its chained name.
    pub name: BlockName,
    /// The name before it.
    pub parent: BlockName,
}

/// The table. All methods are O(blocks touched), except [`Pool::snapshot`] and [`Pool::check`].
pub struct Pool {
    _private: (),
}

#[allow(unused_variables, clippy::todo)]
impl Pool {
    /// `blocks` free blocks of `block_tokens` tokens.
    pub fn new(blocks: usize, block_tokens: usize) -> Self {
        todo!()
    }

    /// How many blocks are in each state.
    pub fn counts(&self) -> PoolCounts {
        todo!()
    }

    /// Who owns `block`.
    pub fn owner(&self, block: BlockId) -> Owner {
        todo!()
    }

    /// Finds the longest chain of full blocks of `tokens` from `root` that covers at most `max_tokens` tokens, comparing tokens as well as names,
    /// and holds each once more (cached ones become held).
    pub fn acquire_prefix(&mut self, root: BlockName, tokens: &[TokenId], max_tokens: usize) -> PrefixHit {
        todo!()
    }

    /// `count` blocks held once each, as contiguous as possible; evicts the least recently used cached blocks where needed. All or nothing.
    pub fn allocate(&mut self, count: usize) -> Result<Vec<BlockId>, OutOfBlocks> {
        todo!()
    }

    /// Holds each block once more. Panics if one is not held.
    pub fn retain(&mut self, blocks: &[BlockId]) {
        todo!()
    }

    /// Gives up one hold on each. At the last: cached if named, free if not. Panics if one is not held.
    pub fn release(&mut self, blocks: &[BlockId]) {
        todo!()
    }

    /// Names a held, full block. If another block has the name already, this one stays nameless (and becomes free, not cached, at its last release).
    /// Returns the name either way.
    pub fn name(&mut self, block: BlockId, parent: BlockName, tokens: &[TokenId]) -> BlockName {
        todo!()
    }

    /// Grants `count` blocks to a handoff, each with a new generation. All or nothing.
    pub fn grant(&mut self, handoff: HandoffId, count: usize) -> Result<Vec<GrantedSlot>, OutOfBlocks> {
        todo!()
    }

    /// Whether `slot` is granted to `handoff` now, in this generation.
    pub fn is_granted(&self, handoff: HandoffId, slot: GrantedSlot) -> bool {
        todo!()
    }

    /// The verified blocks of a handoff become held once each, by a sequence. Panics if one is not granted to it.
    pub fn accept(&mut self, handoff: HandoffId, slots: &[GrantedSlot]) {
        todo!()
    }

    /// Aborted: the blocks granted to `handoff` are quarantined.
    pub fn quarantine(&mut self, handoff: HandoffId, slots: &[GrantedSlot]) {
        todo!()
    }

    /// No write can land any more: quarantined blocks of `handoff` become free.
    pub fn drained(&mut self, handoff: HandoffId, slots: &[GrantedSlot]) {
        todo!()
    }

    /// Moves the events since the last call to the end of `events`. At most `capacity` are kept between calls; after an overflow the
    /// sequence numbers show a gap, and the reader asks for a snapshot.
    pub fn take_events(&mut self, events: &mut Vec<KvEvent>) {
        todo!()
    }

    /// Every named block, parents first, and the sequence number of the last event it includes.
    pub fn snapshot(&self) -> (u64, Vec<NamedBlock>) {
        todo!()
    }

    /// Checks every invariant of the table; the error says which is broken. For tests and the idle check.
    pub fn check(&self) -> Result<(), String> {
        todo!()
    }
}
