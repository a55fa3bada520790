//! Free blocks as runs of consecutive ids, so that what is taken together lies together.

use std::collections::{BTreeMap, BTreeSet};

use crate::BlockId;

/// Maximal runs of free blocks: no two touch.
pub(super) struct FreeRuns {
    /// First id -> length.
    by_start: BTreeMap<u32, u32>,
    /// (Length, first id), for the best fit.
    by_length: BTreeSet<(u32, u32)>,
}

impl FreeRuns {
    /// All of `0..count`.
    pub(super) fn new(count: u32) -> Self {
        let mut runs = Self {
            by_start: BTreeMap::new(),
            by_length: BTreeSet::new(),
        };
        if count > 0 {
            runs.insert(0, count);
        }
        runs
    }

    /// Appends `count` blocks: from the shortest run that holds them all, or else from the longest runs, so in the fewest pieces.
    /// The caller knows that so many are free.
    pub(super) fn take(&mut self, count: usize, blocks: &mut Vec<BlockId>) {
        let mut missing = u32::try_from(count).expect("at most all blocks");
        while missing > 0 {
            let fit = self.by_length.range((missing, 0)..).next();
            let &(length, start) = fit.or(self.by_length.last()).expect("counted as free");
            let taken = missing.min(length);
            self.remove(start, length);
            if taken < length {
                self.insert(start + taken, length - taken);
            }
            blocks.extend((start..start + taken).map(BlockId));
            missing -= taken;
        }
    }

    /// Gives one block back, joining it with its neighbours.
    pub(super) fn put(&mut self, block: BlockId) {
        let (mut start, mut length) = (block.0, 1);
        if let Some((&before, &len)) = self.by_start.range(..start).next_back()
            && before + len == start
        {
            self.remove(before, len);
            (start, length) = (before, len + 1);
        }
        if let Some(&len) = self.by_start.get(&(block.0 + 1)) {
            self.remove(block.0 + 1, len);
            length += len;
        }
        self.insert(start, length);
    }

    /// The runs as (first id, length), ascending.
    pub(super) fn runs(&self) -> impl Iterator<Item = (u32, u32)> {
        self.by_start.iter().map(|(&start, &length)| (start, length))
    }

    /// Whether both indexes hold the same, maximal runs.
    pub(super) fn is_consistent(&self) -> bool {
        let mut end = None;
        self.by_length.len() == self.by_start.len()
            && self.runs().all(|(start, length)| {
                let apart = end.is_none_or(|end| end < start);
                end = Some(start + length);
                apart && length > 0 && self.by_length.contains(&(length, start))
            })
    }

    fn insert(&mut self, start: u32, length: u32) {
        self.by_start.insert(start, length);
        self.by_length.insert((length, start));
    }

    fn remove(&mut self, start: u32, length: u32) {
        self.by_start.remove(&start);
        self.by_length.remove(&(length, start));
    }
}
