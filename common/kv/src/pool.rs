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

use std::collections::HashMap;

use crate::{BlockId, BlockName, Generation, HandoffId, KvEvent, KvEventKind, TokenId};

mod check;
mod events;
mod free;
mod lru;
#[cfg(test)]
mod tests;

use events::EventQueue;
use free::FreeRuns;
use lru::Lru;

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

/// One block's row.
struct Row {
    owner: Owner,
    /// Of its latest grant; 0 before the first.
    generation: Generation,
    /// Set while it can be found; only for `Sequence` and `Cached`.
    named: Option<NamedBlock>,
}

/// The table. All methods are O(blocks touched) up to a logarithm, except [`Pool::snapshot`] and [`Pool::check`].
///
/// Methods panic when told of a block outside the pool, [`Pool::is_granted`] excepted: block ids from the wire go through that first.
pub struct Pool {
    block_tokens: usize,
    rows: Vec<Row>,
    /// `[block][token]`: the tokens of named blocks, for comparing on a hit.
    tokens: Vec<TokenId>,
    /// Exactly the `Free` blocks.
    free: FreeRuns,
    /// Exactly the `Cached` blocks.
    lru: Lru,
    /// Every named block.
    names: HashMap<BlockName, BlockId>,
    counts: PoolCounts,
    events: EventQueue,
}

impl Pool {
    /// `blocks` free blocks of `block_tokens` tokens. Keeps one event per block between calls of [`Pool::take_events`], within
    /// 1,024 and 65,536: beyond about one per block, a snapshot is the shorter message.
    pub fn new(blocks: usize, block_tokens: usize) -> Self {
        Self::with_event_capacity(blocks, block_tokens, blocks.clamp(1_024, 65_536))
    }

    /// As [`Pool::new`], keeping at most `events` events between calls of [`Pool::take_events`].
    pub fn with_event_capacity(blocks: usize, block_tokens: usize, events: usize) -> Self {
        assert!(block_tokens > 0, "a block holds at least one token");
        let count = u32::try_from(blocks).expect("block ids are 32 bits");
        let row = || Row {
            owner: Owner::Free,
            generation: Generation(0),
            named: None,
        };
        Self {
            block_tokens,
            rows: std::iter::repeat_with(row).take(blocks).collect(),
            tokens: vec![0; blocks * block_tokens],
            free: FreeRuns::new(count),
            lru: Lru::new(blocks),
            names: HashMap::new(),
            counts: PoolCounts {
                free: blocks,
                total: blocks,
                ..PoolCounts::default()
            },
            events: EventQueue::new(events),
        }
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// How many blocks are in each state.
    pub fn counts(&self) -> PoolCounts {
        self.counts
    }

    /// Who owns `block`.
    pub fn owner(&self, block: BlockId) -> Owner {
        self.row(block).owner
    }

    /// Finds the longest chain of full blocks of `tokens` from `root` that covers at most `max_tokens` tokens, comparing tokens as well as names,
    /// and holds each once more (cached ones become held).
    pub fn acquire_prefix(&mut self, root: BlockName, tokens: &[TokenId], max_tokens: usize) -> PrefixHit {
        let mut hit = PrefixHit::default();
        let covered = tokens.len().min(max_tokens);
        for chunk in tokens[..covered].chunks_exact(self.block_tokens) {
            let parent = hit.names.last().copied().unwrap_or(root);
            if !self.extend_hit(&mut hit, parent, parent.child(chunk), chunk) {
                break;
            }
        }
        hit
    }

    /// As [`Pool::acquire_prefix`], of the blocks whose names are known: `names` are those of the first full blocks of `tokens`, from `root` on.
    pub fn acquire_named(&mut self, root: BlockName, names: &[BlockName], tokens: &[TokenId]) -> PrefixHit {
        let mut hit = PrefixHit::default();
        for (&name, chunk) in names.iter().zip(tokens.chunks_exact(self.block_tokens)) {
            let parent = hit.names.last().copied().unwrap_or(root);
            if !self.extend_hit(&mut hit, parent, name, chunk) {
                break;
            }
        }
        hit
    }

    /// Adds the block called `name` to the hit; false when there is none of these tokens.
    fn extend_hit(&mut self, hit: &mut PrefixHit, parent: BlockName, name: BlockName, chunk: &[TokenId]) -> bool {
        let Some(&block) = self.names.get(&name) else {
            return false;
        };
        let same_parent = self.row(block).named.is_some_and(|named| named.parent == parent);
        if !same_parent || self.tokens_of(block) != chunk {
            return false;
        }
        self.hold(block);
        hit.blocks.push(block);
        hit.names.push(name);
        true
    }

    /// `count` blocks held once each, as contiguous as possible; evicts the least recently used cached blocks where needed. All or nothing.
    pub fn allocate(&mut self, count: usize) -> Result<Vec<BlockId>, OutOfBlocks> {
        let mut blocks = Vec::with_capacity(count);
        self.allocate_into(count, &mut blocks)?;
        Ok(blocks)
    }

    /// As [`Pool::allocate`], appending to `blocks`.
    pub fn allocate_into(&mut self, count: usize, blocks: &mut Vec<BlockId>) -> Result<(), OutOfBlocks> {
        let start = blocks.len();
        self.take_free(count, blocks)?;
        for &block in &blocks[start..] {
            self.set_owner(block, Owner::Sequence { refs: 1 });
        }
        Ok(())
    }

    /// Holds each block once more. Panics if one is not held.
    pub fn retain(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            let Owner::Sequence { .. } = self.owner(block) else {
                panic!("retain: {block:?} is not held but {:?}", self.owner(block));
            };
            self.hold(block);
        }
    }

    /// Gives up one hold on each. At the last: cached if named, free if not. Panics if one is not held.
    /// `blocks` are in table order, so that of a chain the deepest becomes the least recently used and is evicted first.
    pub fn release(&mut self, blocks: &[BlockId]) {
        for &block in blocks.iter().rev() {
            match self.owner(block) {
                Owner::Sequence { refs: 1 } if self.row(block).named.is_some() => {
                    self.set_owner(block, Owner::Cached);
                    self.lru.push_newest(block);
                }
                Owner::Sequence { refs: 1 } => self.set_free(block),
                Owner::Sequence { refs } => self.set_owner(block, Owner::Sequence { refs: refs - 1 }),
                owner => panic!("release: {block:?} is not held but {owner:?}"),
            }
        }
    }

    /// Names a held, full block. If another block has the name already, this one stays nameless (and becomes free, not cached, at its last release).
    /// Returns the name either way. Naming a block again as it is called already changes nothing; panics if it is called otherwise, is not
    /// held, or `tokens` is not a whole block.
    pub fn name(&mut self, block: BlockId, parent: BlockName, tokens: &[TokenId]) -> BlockName {
        assert_eq!(tokens.len(), self.block_tokens, "only full blocks have names");
        let owner = self.owner(block);
        assert!(
            matches!(owner, Owner::Sequence { .. }),
            "name: {block:?} is not held but {owner:?}"
        );
        let name = parent.child(tokens);
        if let Some(named) = self.row(block).named {
            assert_eq!(named.name, name, "{block:?} has another name already");
            return name;
        }
        if self.names.contains_key(&name) {
            return name;
        }
        self.names.insert(name, block);
        self.row_mut(block).named = Some(NamedBlock { name, parent });
        let at = block.0 as usize * self.block_tokens;
        self.tokens[at..at + self.block_tokens].copy_from_slice(tokens);
        self.events.push(KvEventKind::Stored { name, parent });
        name
    }

    /// Grants `count` blocks to a handoff, each with a new generation. All or nothing.
    pub fn grant(&mut self, handoff: HandoffId, count: usize) -> Result<Vec<GrantedSlot>, OutOfBlocks> {
        let mut blocks = Vec::with_capacity(count);
        self.take_free(count, &mut blocks)?;
        let slots = blocks.into_iter().map(|block| {
            self.set_owner(block, Owner::Granted(handoff));
            let row = self.row_mut(block);
            row.generation.0 += 1;
            GrantedSlot {
                block,
                generation: row.generation,
            }
        });
        Ok(slots.collect())
    }

    /// Whether `slot` is granted to `handoff` now, in this generation. False for a block outside the pool.
    pub fn is_granted(&self, handoff: HandoffId, slot: GrantedSlot) -> bool {
        self.is_owned(Owner::Granted(handoff), slot)
    }

    /// The verified blocks of a handoff become held once each, by a sequence. Panics if one is not granted to it.
    pub fn accept(&mut self, handoff: HandoffId, slots: &[GrantedSlot]) {
        for &slot in slots {
            assert!(
                self.is_granted(handoff, slot),
                "accept: {slot:?} is not granted to {handoff:?}"
            );
            self.set_owner(slot.block, Owner::Sequence { refs: 1 });
        }
    }

    /// Aborted: the blocks granted to `handoff` are quarantined. Panics if one is not granted to it.
    pub fn quarantine(&mut self, handoff: HandoffId, slots: &[GrantedSlot]) {
        for &slot in slots {
            assert!(
                self.is_granted(handoff, slot),
                "quarantine: {slot:?} is not granted to {handoff:?}"
            );
            self.set_owner(slot.block, Owner::Quarantined(handoff));
        }
    }

    /// No write can land any more: quarantined blocks of `handoff` become free. Panics if one is not quarantined for it.
    pub fn drained(&mut self, handoff: HandoffId, slots: &[GrantedSlot]) {
        for &slot in slots {
            assert!(
                self.is_owned(Owner::Quarantined(handoff), slot),
                "drained: {slot:?} is not quarantined for {handoff:?}"
            );
            self.set_free(slot.block);
        }
    }

    /// Moves the events since the last call to the end of `events`. A bounded number is kept between calls ([`Pool::new`]); after an overflow the
    /// oldest are missing, the sequence numbers show a gap, and the reader asks for a snapshot.
    pub fn take_events(&mut self, events: &mut Vec<KvEvent>) {
        self.events.take(events);
    }

    /// Every named block, parents first, and the sequence number of the last event it includes.
    /// A block whose parent was evicted is listed too: it can be found again once the parent is.
    pub fn snapshot(&self) -> (u64, Vec<NamedBlock>) {
        let named = || self.rows.iter().filter_map(|row| row.named);
        let mut children: HashMap<BlockName, Vec<NamedBlock>> = HashMap::new();
        let mut list = Vec::with_capacity(self.names.len());
        for block in named() {
            if self.names.contains_key(&block.parent) {
                children.entry(block.parent).or_default().push(block);
            } else {
                list.push(block);
            }
        }
        let mut next = 0;
        while let Some(&NamedBlock { name, .. }) = list.get(next) {
            list.extend(children.remove(&name).into_iter().flatten());
            next += 1;
        }
        (self.events.sequence(), list)
    }

    fn row(&self, block: BlockId) -> &Row {
        &self.rows[block.0 as usize]
    }

    fn row_mut(&mut self, block: BlockId) -> &mut Row {
        &mut self.rows[block.0 as usize]
    }

    fn tokens_of(&self, block: BlockId) -> &[TokenId] {
        let at = block.0 as usize * self.block_tokens;
        &self.tokens[at..at + self.block_tokens]
    }

    fn is_owned(&self, owner: Owner, slot: GrantedSlot) -> bool {
        self.rows
            .get(slot.block.0 as usize)
            .is_some_and(|row| row.owner == owner && row.generation == slot.generation)
    }

    /// One more hold on a held or cached block.
    fn hold(&mut self, block: BlockId) {
        let refs = match self.owner(block) {
            Owner::Sequence { refs } => refs + 1,
            Owner::Cached => {
                self.lru.remove(block);
                1
            }
            owner => panic!("hold: {block:?} is {owner:?}"),
        };
        self.set_owner(block, Owner::Sequence { refs });
    }

    /// Takes `count` blocks off the free list, evicting cached ones for what is missing. Their rows still say `Free`.
    fn take_free(&mut self, count: usize, blocks: &mut Vec<BlockId>) -> Result<(), OutOfBlocks> {
        let available = self.counts.free + self.counts.cached;
        if count > available {
            return Err(OutOfBlocks {
                needed: count,
                available,
            });
        }
        for _ in self.counts.free..count {
            self.evict_oldest();
        }
        self.free.take(count, blocks);
        Ok(())
    }

    fn evict_oldest(&mut self) {
        let block = self.lru.pop_oldest().expect("counted as cached");
        let named = self.row_mut(block).named.take().expect("cached blocks are named");
        self.names.remove(&named.name);
        self.events.push(KvEventKind::Removed { name: named.name });
        self.set_free(block);
    }

    fn set_free(&mut self, block: BlockId) {
        self.set_owner(block, Owner::Free);
        self.free.put(block);
    }

    fn set_owner(&mut self, block: BlockId, owner: Owner) {
        let before = std::mem::replace(&mut self.row_mut(block).owner, owner);
        *self.counts.of(before) -= 1;
        *self.counts.of(owner) += 1;
    }
}

impl PoolCounts {
    /// The count to which a block with this owner belongs.
    fn of(&mut self, owner: Owner) -> &mut usize {
        match owner {
            Owner::Free => &mut self.free,
            Owner::Sequence { .. } => &mut self.held,
            Owner::Cached => &mut self.cached,
            Owner::Granted(_) => &mut self.granted,
            Owner::Quarantined(_) => &mut self.quarantined,
        }
    }
}
