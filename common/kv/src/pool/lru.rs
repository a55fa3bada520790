//! Cached blocks in order of use: a doubly linked list threaded through one array, O(1) for each operation.

use crate::BlockId;

/// No block.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Link {
    older: u32,
    newer: u32,
}

/// The list. Callers see to it that a block is in it at most once.
pub(super) struct Lru {
    links: Vec<Link>,
    oldest: u32,
    newest: u32,
}

impl Lru {
    /// Empty, for block ids below `blocks`.
    pub(super) fn new(blocks: usize) -> Self {
        let unlinked = Link {
            older: NONE,
            newer: NONE,
        };
        Self {
            links: vec![unlinked; blocks],
            oldest: NONE,
            newest: NONE,
        }
    }

    /// Adds a block that is not in the list.
    pub(super) fn push_newest(&mut self, block: BlockId) {
        self.links[block.0 as usize] = Link {
            older: self.newest,
            newer: NONE,
        };
        match self.newest {
            NONE => self.oldest = block.0,
            newest => self.links[newest as usize].newer = block.0,
        }
        self.newest = block.0;
    }

    /// Takes out a block that is in the list.
    pub(super) fn remove(&mut self, block: BlockId) {
        let Link { older, newer } = self.links[block.0 as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.links[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.links[newer as usize].older = older,
        }
    }

    /// Takes out the least recently used block.
    pub(super) fn pop_oldest(&mut self) -> Option<BlockId> {
        let block = (self.oldest != NONE).then_some(BlockId(self.oldest))?;
        self.remove(block);
        Some(block)
    }

    /// Oldest first. Ends after as many steps as there are blocks, even if the links are broken.
    pub(super) fn iter(&self) -> impl Iterator<Item = BlockId> {
        let mut at = self.oldest;
        std::iter::from_fn(move || {
            let block = (at != NONE).then_some(BlockId(at))?;
            at = self.links[at as usize].newer;
            Some(block)
        })
        .take(self.links.len())
    }
}
