//! The pool's bytes in main memory: one allocation `[layer][block][k|v][head][token][dim]` of bf16.
#![allow(unsafe_code)]

use baton_kv::{BlockId, KvLayout, KvMemory, KvMemoryError};

use super::alloc::{Aligned, OutOfMemory};

/// A pool in main memory. Pages are taken from the system when first written.
///
/// Readers and writers share it without locks: by [`KvMemory`]'s contract nobody writes a block's valid tokens while another reads them.
pub struct CpuKvMemory {
    layout: KvLayout,
    blocks: usize,
    elements: Aligned<u16>,
}

impl CpuKvMemory {
    /// A zeroed pool of `blocks` blocks.
    pub fn new(layout: KvLayout, blocks: usize) -> Result<Self, OutOfMemory> {
        let bytes = layout
            .block_bytes()
            .checked_mul(blocks)
            .ok_or(OutOfMemory { bytes: usize::MAX })?;
        Ok(Self {
            layout,
            blocks,
            elements: Aligned::zeroed(bytes / size_of::<u16>())?,
        })
    }

    /// Start of one layer of one block.
    ///
    /// # Panics
    /// When either is outside the pool.
    pub(super) fn block(&self, layer: usize, block: BlockId) -> *mut u16 {
        let block = block.0 as usize;
        assert!(
            layer < self.layout.layers && block < self.blocks,
            "block outside the pool"
        );
        let elements = self.layout.layer_block_bytes() / size_of::<u16>();
        // SAFETY: the allocation holds layers × blocks pieces of `elements`, and both indices were checked.
        unsafe { self.elements.as_ptr().add((layer * self.blocks + block) * elements) }
    }

    /// Start of a piece and bytes of one head's run within it; checks the arguments.
    fn piece(
        &self,
        layer: usize,
        block: BlockId,
        tokens: usize,
        got: usize,
    ) -> Result<(*mut u8, usize), KvMemoryError> {
        let layout = &self.layout;
        if layer >= layout.layers || block.0 as usize >= self.blocks || tokens > layout.block_tokens {
            return Err(KvMemoryError::OutOfRange);
        }
        let run = layout.head_bytes(tokens);
        let expected = 2 * layout.heads * run;
        if got != expected {
            return Err(KvMemoryError::Length { expected, got });
        }
        Ok((self.block(layer, block).cast(), run))
    }
}

impl KvMemory for CpuKvMemory {
    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn blocks(&self) -> usize {
        self.blocks
    }

    fn read(&self, layer: usize, block: BlockId, tokens: usize, out: &mut [u8]) -> Result<(), KvMemoryError> {
        let (base, run) = self.piece(layer, block, tokens, out.len())?;
        let stride = self.layout.head_bytes(self.layout.block_tokens);
        for (i, out) in out.chunks_exact_mut(run.max(1)).enumerate() {
            // SAFETY: `piece` checked the range: 2 × heads runs, `stride` apart, each within the block. Nobody writes these tokens
            // meanwhile (the trait's contract).
            unsafe { std::ptr::copy_nonoverlapping(base.add(i * stride), out.as_mut_ptr(), run) };
        }
        Ok(())
    }

    fn write(&self, layer: usize, block: BlockId, tokens: usize, bytes: &[u8]) -> Result<(), KvMemoryError> {
        let (base, run) = self.piece(layer, block, tokens, bytes.len())?;
        let stride = self.layout.head_bytes(self.layout.block_tokens);
        for (i, bytes) in bytes.chunks_exact(run.max(1)).enumerate() {
            // SAFETY: as in `read`; nobody else reads or writes these tokens meanwhile.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), base.add(i * stride), run) };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
