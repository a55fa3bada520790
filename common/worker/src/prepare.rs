//! Memory for blocks that a handoff is about to fill: taken from the system while their KV is computed elsewhere, rather than as it arrives.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use baton_kv::{BlockId, KvMemory};

/// Which blocks were prepared: each is once, and stays so.
pub(crate) struct Prepared(Box<[AtomicBool]>);

impl Prepared {
    /// None of `blocks` blocks yet.
    pub(crate) fn new(blocks: usize) -> Self {
        Self((0..blocks).map(|_| AtomicBool::new(false)).collect())
    }

    /// Prepares those of `blocks` that never were, on a thread for blocking work. Inside a tokio runtime.
    pub(crate) fn prepare(&self, memory: &Arc<dyn KvMemory>, blocks: impl Iterator<Item = BlockId>) {
        let new = |block: &BlockId| {
            self.0
                .get(block.0 as usize)
                .is_some_and(|known| !known.swap(true, Relaxed))
        };
        let blocks: Vec<BlockId> = blocks.filter(new).collect();
        if !blocks.is_empty() {
            let memory = memory.clone();
            // Nobody waits for it: what comes first to a block that is not prepared yet takes its memory itself.
            tokio::task::spawn_blocking(move || memory.prepare(&blocks));
        }
    }
}

#[cfg(test)]
mod tests;
