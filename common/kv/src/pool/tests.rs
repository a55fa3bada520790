use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::{KvIdentity, Salt, name_blocks};

const BLOCKS: usize = 8;
const BLOCK_TOKENS: usize = 2;

fn root() -> BlockName {
    BlockName::root(&KvIdentity([7; 32]), &Salt([9; 32]))
}

fn ids(blocks: &[BlockId]) -> Vec<u32> {
    blocks.iter().map(|block| block.0).collect()
}

/// Holds and names blocks for all of `tokens` (whole blocks), as a sequence that computes them would.
fn store(pool: &mut Pool, tokens: &[TokenId]) -> Vec<BlockId> {
    let mut hit = pool.acquire_prefix(root(), tokens, tokens.len());
    let mut parent = hit.names.last().copied().unwrap_or(root());
    let chunks = tokens.chunks_exact(pool.block_tokens());
    let missing: Vec<_> = chunks.skip(hit.blocks.len()).collect();
    let new = pool.allocate(missing.len()).unwrap();
    for (&block, chunk) in new.iter().zip(missing) {
        parent = pool.name(block, parent, chunk);
    }
    hit.blocks.extend(new);
    hit.blocks
}

#[test]
fn a_run_is_taken_from_the_shortest_that_holds_it() {
    fn check(freed: &[u32], count: usize, expected: &[u32]) {
        let mut pool = Pool::new(16, BLOCK_TOKENS);
        pool.allocate(16).unwrap();
        for &block in freed {
            pool.release(&[BlockId(block)]);
        }
        pool.check().unwrap();
        assert_eq!(ids(&pool.allocate(count).unwrap()), expected, "freed {freed:?}");
        pool.check().unwrap();
    }
    check(&[1, 4, 5, 6, 9, 10], 2, &[9, 10]);
    check(&[1, 4, 5, 6, 9, 10], 1, &[1]);
    check(&[5, 1, 4, 6], 3, &[4, 5, 6]);
    // No run is long enough: the longest first.
    check(&[1, 4, 5, 6, 9, 10], 5, &[4, 5, 6, 9, 10]);
    check(&[1, 4, 5, 6, 9, 10], 4, &[4, 5, 6, 1]);
}

#[test]
fn a_hit_ends_where_the_caller_or_the_tokens_say() {
    fn check(tokens: &[TokenId], max_tokens: usize, blocks: usize) {
        let mut pool = Pool::new(BLOCKS, BLOCK_TOKENS);
        let stored = store(&mut pool, &[1, 2, 3, 4, 5, 6]);
        let hit = pool.acquire_prefix(root(), tokens, max_tokens);
        assert_eq!(hit.blocks, stored[..blocks], "{tokens:?} up to {max_tokens}");
        let names = name_blocks(root(), tokens, BLOCK_TOKENS);
        assert_eq!(hit.names, names[..blocks]);
        // The same, when the names are known already.
        let whole = names.len().min(max_tokens / BLOCK_TOKENS);
        assert_eq!(pool.acquire_named(root(), &names[..whole], tokens), hit);
        pool.release(&hit.blocks);
        pool.release(&hit.blocks);
        pool.check().unwrap();
        // Names alone do not make a hit: the tokens are compared.
        let other: Vec<TokenId> = tokens.iter().map(|token| token + 1).collect();
        assert_eq!(pool.acquire_named(root(), &names[..whole], &other).blocks, []);
    }
    check(&[1, 2, 3, 4, 5, 6], 6, 3);
    check(&[1, 2, 3, 4, 5, 6], 5, 2);
    check(&[1, 2, 3, 4, 5, 6], 0, 0);
    check(&[1, 2, 3, 4, 5], 100, 2);
    check(&[1, 2, 9, 4, 5, 6], 6, 1);
    check(&[3, 4, 5, 6], 4, 0);
    check(&[], 0, 0);
}

#[test]
fn a_hit_compares_tokens_and_parent_too() {
    let mut pool = Pool::new(BLOCKS, BLOCK_TOKENS);
    let table = store(&mut pool, &[1, 2, 3, 4]);
    // As if two runs of tokens had one digest.
    pool.tokens[table[1].0 as usize * BLOCK_TOKENS] = 8;
    assert_eq!(pool.acquire_prefix(root(), &[1, 2, 3, 4], 4).blocks, table[..1]);
    assert!(pool.check().is_err());
    pool.rows[table[0].0 as usize].named.as_mut().unwrap().parent = BlockName([0; 32]);
    assert_eq!(pool.acquire_prefix(root(), &[1, 2, 3, 4], 4).blocks, []);
}

#[test]
fn children_are_evicted_before_their_parents() {
    let mut pool = Pool::new(4, BLOCK_TOKENS);
    let table = store(&mut pool, &[1, 2, 3, 4, 5, 6]);
    pool.release(&table);
    assert!(pool.is_idle());
    for left in [2, 1, 0] {
        let taken = pool.allocate(pool.counts().free + 1).unwrap();
        pool.check().unwrap();
        let hit = pool.acquire_prefix(root(), &[1, 2, 3, 4, 5, 6], 6);
        assert_eq!(hit.blocks, table[..left]);
        pool.release(&hit.blocks);
        pool.release(&taken);
    }
}

#[test]
fn the_second_block_of_a_name_stays_nameless() {
    let mut pool = Pool::new(BLOCKS, BLOCK_TOKENS);
    let first = store(&mut pool, &[1, 2]);
    let second = pool.allocate(1).unwrap();
    let name = pool.name(second[0], root(), &[1, 2]);
    assert_eq!(name, root().child(&[1, 2]));
    pool.release(&second);
    assert_eq!(pool.owner(second[0]), Owner::Free);
    assert_eq!(pool.acquire_prefix(root(), &[1, 2], 2).blocks, first);
}

#[test]
fn too_large_a_request_changes_nothing() {
    let mut pool = Pool::new(4, BLOCK_TOKENS);
    let table = store(&mut pool, &[1, 2, 3, 4]);
    pool.release(&table[1..]);
    let before = pool.snapshot();
    let error = OutOfBlocks {
        needed: 4,
        available: 3,
    };
    assert_eq!(pool.allocate(4), Err(error));
    assert_eq!(pool.grant(HandoffId(1), 4), Err(error));
    assert_eq!(pool.snapshot(), before);
    pool.check().unwrap();
}

#[test]
fn an_aborted_grant_is_free_only_once_drained() {
    let mut pool = Pool::new(2, BLOCK_TOKENS);
    let (old, new) = (HandoffId(1), HandoffId(2));
    let slots = pool.grant(old, 2).unwrap();
    pool.quarantine(old, &slots);
    assert!(!pool.is_granted(old, slots[0]));
    assert!(pool.grant(new, 1).is_err());
    pool.drained(old, &slots);
    assert!(pool.is_idle());
    let again = pool.grant(new, 2).unwrap();
    for (old_slot, new_slot) in slots.iter().zip(&again) {
        assert_eq!(old_slot.block, new_slot.block);
        assert!(new_slot.generation > old_slot.generation);
        assert!(!pool.is_granted(new, *old_slot));
    }
    let outside = GrantedSlot {
        block: BlockId(99),
        generation: Generation(1),
    };
    assert!(!pool.is_granted(new, outside));
}

#[test]
fn misuse_panics() {
    fn check(misuse: impl FnOnce(&mut Pool) + std::panic::UnwindSafe) {
        let outcome = std::panic::catch_unwind(|| {
            let mut pool = Pool::new(BLOCKS, BLOCK_TOKENS);
            misuse(&mut pool);
        });
        assert!(outcome.is_err());
    }
    check(|pool| pool.release(&[BlockId(0)]));
    check(|pool| pool.retain(&[BlockId(0)]));
    check(|pool| pool.release(&[BlockId(99)]));
    check(|pool| {
        pool.name(BlockId(0), root(), &[1, 2]);
    });
    check(|pool| {
        let blocks = pool.allocate(1).unwrap();
        pool.name(blocks[0], root(), &[1]);
    });
    check(|pool| {
        let slots = pool.grant(HandoffId(1), 1).unwrap();
        pool.accept(HandoffId(2), &slots);
    });
    check(|pool| {
        let slots = pool.grant(HandoffId(1), 1).unwrap();
        pool.drained(HandoffId(1), &slots);
    });
}

#[test]
fn an_overflow_of_events_shows_as_a_gap() {
    let mut pool = Pool::with_event_capacity(BLOCKS, BLOCK_TOKENS, 2);
    store(&mut pool, &[1, 2]);
    let mut events = Vec::new();
    pool.take_events(&mut events);
    store(&mut pool, &[1, 2, 3, 4, 5, 6, 7, 8]);
    pool.check().unwrap();
    pool.take_events(&mut events);
    let sequences: Vec<_> = events.iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, [1, 3, 4]);
    assert_eq!(pool.snapshot().0, 4);
}

/// What a naive pool would say: names are whole prefixes, the LRU is a list.
#[derive(Default)]
struct Model {
    /// Blocks in use by sequences, with their references.
    held: BTreeMap<BlockId, u32>,
    /// Oldest first.
    cached: Vec<BlockId>,
    granted: BTreeSet<BlockId>,
    quarantined: BTreeSet<BlockId>,
    names: BTreeMap<Vec<TokenId>, BlockId>,
    generations: BTreeMap<BlockId, Generation>,
}

impl Model {
    fn used(&self) -> usize {
        self.held.len() + self.granted.len() + self.quarantined.len()
    }

    fn free(&self) -> usize {
        BLOCKS - self.used() - self.cached.len()
    }

    /// Evicts what `count` blocks need; `None` if they are not there.
    fn make_room(&mut self, count: usize) -> Option<()> {
        if count > BLOCKS - self.used() {
            return None;
        }
        for _ in self.free()..count {
            let evicted = self.cached.remove(0);
            self.names.retain(|_, block| *block != evicted);
        }
        Some(())
    }

    /// Checks that the pool chose blocks that nobody has.
    fn assert_free(&self, blocks: &[BlockId]) {
        for (at, block) in blocks.iter().enumerate() {
            assert!((block.0 as usize) < BLOCKS && !blocks[..at].contains(block));
            let owned = self.held.contains_key(block) || self.cached.contains(block);
            let remote = self.granted.contains(block) || self.quarantined.contains(block);
            assert!(!owned && !remote, "{block:?} was given away twice");
        }
    }

    fn hold(&mut self, block: BlockId) {
        self.cached.retain(|cached| *cached != block);
        *self.held.entry(block).or_default() += 1;
    }

    fn release(&mut self, blocks: &[BlockId]) {
        for block in blocks.iter().rev() {
            let refs = self.held.get_mut(block).unwrap();
            *refs -= 1;
            if *refs == 0 {
                self.held.remove(block);
                if self.names.values().any(|named| named == block) {
                    self.cached.push(*block);
                }
            }
        }
    }

    fn prefix(&self, tokens: &[TokenId], max_tokens: usize) -> Vec<BlockId> {
        let covered = tokens.len().min(max_tokens) / BLOCK_TOKENS;
        let names = (1..=covered).map(|blocks| self.names.get(&tokens[..blocks * BLOCK_TOKENS]));
        names.map_while(|block| block.copied()).collect()
    }

    fn counts(&self) -> PoolCounts {
        PoolCounts {
            free: self.free(),
            cached: self.cached.len(),
            held: self.held.len(),
            granted: self.granted.len(),
            quarantined: self.quarantined.len(),
            total: BLOCKS,
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// A sequence starts, takes its prefix hit, computes and names the rest.
    Run {
        tokens: Vec<TokenId>,
        spare: usize,
    },
    Retain(usize),
    Release(usize),
    Grant(usize),
    Accept(usize),
    Abort(usize),
    Drained(usize),
    ReadEvents,
}

fn op() -> impl Strategy<Value = Op> {
    let tokens = prop::collection::vec(0..2u32, 0..10);
    prop_oneof![
        6 => (tokens, 0..2usize).prop_map(|(tokens, spare)| Op::Run { tokens, spare }),
        1 => any::<usize>().prop_map(Op::Retain),
        5 => any::<usize>().prop_map(Op::Release),
        2 => (0..4usize).prop_map(Op::Grant),
        1 => any::<usize>().prop_map(Op::Accept),
        1 => any::<usize>().prop_map(Op::Abort),
        1 => any::<usize>().prop_map(Op::Drained),
        1 => Just(Op::ReadEvents),
    ]
}

/// The pool, its model, and who uses it.
struct Run {
    pool: Pool,
    model: Model,
    tables: Vec<Vec<BlockId>>,
    grants: Vec<(HandoffId, Vec<GrantedSlot>)>,
    aborted: Vec<(HandoffId, Vec<GrantedSlot>)>,
    stale: Vec<(HandoffId, GrantedSlot)>,
    next_handoff: u64,
    /// A router's view, kept by events.
    mirror: BTreeSet<BlockName>,
    mirrored: u64,
}

fn pick<T>(from: &mut Vec<T>, index: usize) -> Option<T> {
    (!from.is_empty()).then(|| from.remove(index % from.len()))
}

impl Run {
    fn new() -> Self {
        Self {
            pool: Pool::with_event_capacity(BLOCKS, BLOCK_TOKENS, 12),
            model: Model::default(),
            tables: Vec::new(),
            grants: Vec::new(),
            aborted: Vec::new(),
            stale: Vec::new(),
            next_handoff: 0,
            mirror: BTreeSet::new(),
            mirrored: 0,
        }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Run { tokens, spare } => self.run(&tokens, spare),
            Op::Retain(index) if !self.tables.is_empty() => {
                let table = self.tables[index % self.tables.len()].clone();
                self.pool.retain(&table);
                table.iter().for_each(|&block| self.model.hold(block));
                self.tables.push(table);
            }
            Op::Retain(_) => {}
            Op::Release(index) => {
                if let Some(table) = pick(&mut self.tables, index) {
                    self.pool.release(&table);
                    self.model.release(&table);
                }
            }
            Op::Grant(count) => self.grant(count),
            Op::Accept(index) => {
                if let Some((handoff, slots)) = pick(&mut self.grants, index) {
                    self.pool.accept(handoff, &slots);
                    let table: Vec<_> = slots.iter().map(|slot| slot.block).collect();
                    table.iter().for_each(|block| assert!(self.model.granted.remove(block)));
                    table.iter().for_each(|&block| self.model.hold(block));
                    self.tables.push(table);
                    self.stale.extend(slots.into_iter().map(|slot| (handoff, slot)));
                }
            }
            Op::Abort(index) => {
                if let Some((handoff, slots)) = pick(&mut self.grants, index) {
                    self.pool.quarantine(handoff, &slots);
                    for slot in &slots {
                        assert!(self.model.granted.remove(&slot.block));
                        self.model.quarantined.insert(slot.block);
                        self.stale.push((handoff, *slot));
                    }
                    self.aborted.push((handoff, slots));
                }
            }
            Op::Drained(index) => {
                if let Some((handoff, slots)) = pick(&mut self.aborted, index) {
                    self.pool.drained(handoff, &slots);
                    slots
                        .iter()
                        .for_each(|slot| assert!(self.model.quarantined.remove(&slot.block)));
                }
            }
            Op::ReadEvents => self.read_events(),
        }
    }

    fn run(&mut self, tokens: &[TokenId], spare: usize) {
        let max_tokens = tokens.len().saturating_sub(1);
        let hit = self.pool.acquire_prefix(root(), tokens, max_tokens);
        assert_eq!(hit.blocks, self.model.prefix(tokens, max_tokens));
        hit.blocks.iter().for_each(|&block| self.model.hold(block));

        let full = tokens.len() / BLOCK_TOKENS;
        let missing = full - hit.blocks.len() + spare;
        let available = BLOCKS - self.model.used();
        let room = self.model.make_room(missing);
        let new = match self.pool.allocate(missing) {
            Ok(new) => new,
            Err(error) => {
                assert_eq!(room, None);
                assert_eq!((error.needed, error.available), (missing, available));
                self.pool.release(&hit.blocks);
                self.model.release(&hit.blocks);
                return;
            }
        };
        assert_eq!((room, new.len()), (Some(()), missing));
        self.model.assert_free(&new);
        new.iter().for_each(|&block| self.model.hold(block));

        let mut parent = hit.names.last().copied().unwrap_or(root());
        let mut table = hit.blocks;
        for &block in &new[..new.len() - spare] {
            let at = table.len() * BLOCK_TOKENS;
            let end = at + BLOCK_TOKENS;
            parent = self.pool.name(block, parent, &tokens[at..end]);
            self.model.names.entry(tokens[..end].to_vec()).or_insert(block);
            table.push(block);
        }
        table.extend(&new[new.len() - spare..]);
        self.tables.push(table);
    }

    fn grant(&mut self, count: usize) {
        self.next_handoff += 1;
        let handoff = HandoffId(self.next_handoff);
        let room = self.model.make_room(count);
        let Ok(slots) = self.pool.grant(handoff, count) else {
            assert_eq!(room, None);
            return;
        };
        assert_eq!((room, slots.len()), (Some(()), count));
        self.model
            .assert_free(&slots.iter().map(|slot| slot.block).collect::<Vec<_>>());
        for slot in &slots {
            self.model.granted.insert(slot.block);
            let before = self.model.generations.insert(slot.block, slot.generation);
            assert!(before < Some(slot.generation), "generations grow");
        }
        self.grants.push((handoff, slots));
    }

    fn read_events(&mut self) {
        let mut events = Vec::new();
        self.pool.take_events(&mut events);
        if events.first().is_some_and(|event| event.sequence != self.mirrored + 1) {
            let (sequence, list) = self.pool.snapshot();
            self.mirrored = sequence;
            self.mirror = list.iter().map(|named| named.name).collect();
            return;
        }
        for event in events {
            self.mirrored += 1;
            assert_eq!(event.sequence, self.mirrored);
            match event.kind {
                KvEventKind::Stored { name, .. } => assert!(self.mirror.insert(name)),
                KvEventKind::Removed { name } => assert!(self.mirror.remove(&name)),
                KvEventKind::Cleared => self.mirror.clear(),
            }
        }
        assert_eq!(self.pool.snapshot().0, self.mirrored);
    }

    fn check(&self) {
        self.pool.check().unwrap();
        assert_eq!(self.pool.counts(), self.model.counts());
        for (handoff, slots) in &self.grants {
            assert!(slots.iter().all(|slot| self.pool.is_granted(*handoff, *slot)));
        }
        for (handoff, slot) in &self.stale {
            assert!(!self.pool.is_granted(*handoff, *slot));
        }
        let (_, list) = self.pool.snapshot();
        let expected: BTreeSet<_> = self.model.names.keys().map(|prefix| last_name(prefix)).collect();
        assert_eq!(list.iter().map(|named| named.name).collect::<BTreeSet<_>>(), expected);
        for (at, named) in list.iter().enumerate() {
            assert!(
                list[at..].iter().all(|later| later.name != named.parent),
                "parents first"
            );
        }
    }
}

fn last_name(prefix: &[TokenId]) -> BlockName {
    *name_blocks(root(), prefix, BLOCK_TOKENS).last().unwrap()
}

proptest! {
    #[test]
    fn the_pool_does_what_a_naive_one_does(ops in prop::collection::vec(op(), 1..60)) {
        let mut run = Run::new();
        for op in ops {
            run.apply(op);
            run.check();
        }
        run.read_events();
        let named: BTreeSet<_> = run.pool.snapshot().1.iter().map(|named| named.name).collect();
        prop_assert_eq!(&run.mirror, &named);
        while !run.pool.is_idle() {
            for op in [Op::Release(0), Op::Abort(0), Op::Drained(0)] {
                run.apply(op);
                run.check();
            }
        }
        prop_assert_eq!(run.pool.counts().free + run.pool.counts().cached, BLOCKS);
    }
}
