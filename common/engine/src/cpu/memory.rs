//! The pool's bytes in main memory: one allocation `[layer][block][k|v][head]` of bf16; keys then lie `[tile of 32 tokens][dim][token]`, so that sixteen
//! tokens' scores are sixteen lanes, and values `[token][dim]`. A piece has the same order, without what is not valid.
#![allow(unsafe_code)]

use baton_kv::{BlockId, KvLayout, KvMemory, KvMemoryError, SHMEM_ENABLED, SharedPool, shared_huge_pages};

use super::{
    alloc::{Aligned, OutOfMemory},
    attention::TILE,
};

/// A pool in main memory. Pages are taken from the system when they are prepared or first written.
///
/// Readers and writers share it without locks: by [`KvMemory`]'s contract nobody writes a block's valid tokens while another reads them.
pub struct CpuKvMemory {
    layout: KvLayout,
    blocks: usize,
    elements: Aligned<u16>,
}

impl CpuKvMemory {
    /// A zeroed pool of `blocks` blocks; where it is to be `shared` and the system can, in a file that other processes of this host may map
    /// ([`KvMemory::shared`]).
    ///
    /// # Panics
    /// When blocks are not whole tiles.
    pub fn new(layout: KvLayout, blocks: usize, shared: bool) -> Result<Self, OutOfMemory> {
        assert!(layout.block_tokens.is_multiple_of(TILE), "blocks are not whole tiles");
        let bytes = layout
            .block_bytes()
            .checked_mul(blocks)
            .ok_or(OutOfMemory { bytes: usize::MAX })?;
        let len = bytes / size_of::<u16>();
        let elements = if shared && len > 0 {
            if !shared_huge_pages() {
                tracing::info!(
                    "the KV pool that others can map gets small pages: {SHMEM_ENABLED} is neither advise nor always"
                );
            }
            Aligned::shared(len).or_else(|error| {
                tracing::warn!(%error, bytes, "the KV pool cannot be shared with other processes");
                Aligned::zeroed(len)
            })?
        } else {
            Aligned::zeroed(len)?
        };
        Ok(Self {
            layout,
            blocks,
            elements,
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

    /// Calls `copy` with each contiguous run of a piece: where it lies, and its bytes. Checks the arguments.
    fn runs(
        &self,
        layer: usize,
        block: BlockId,
        tokens: usize,
        got: usize,
        mut copy: impl FnMut(*mut u8, usize),
    ) -> Result<(), KvMemoryError> {
        let layout = &self.layout;
        if layer >= layout.layers || block.0 as usize >= self.blocks || tokens > layout.block_tokens {
            return Err(KvMemoryError::OutOfRange);
        }
        let expected = 2 * layout.heads * layout.head_bytes(tokens);
        if got != expected {
            return Err(KvMemoryError::Length { expected, got });
        }
        let (d, head_elements) = (layout.head_dim, layout.block_tokens * layout.head_dim);
        let base = self.block(layer, block);
        // SAFETY: 2 × heads runs of `head_elements` make up the block's layer, and tokens are at most its tokens.
        let at = |slot: usize, element: usize| unsafe { base.add(slot * head_elements + element) };
        let mut copy = |from: *mut u16, elements: usize| copy(from.cast(), elements * size_of::<u16>());
        for slot in 0..layout.heads {
            let whole = tokens / TILE * TILE;
            copy(at(slot, 0), whole * d);
            if whole < tokens {
                (0..d).for_each(|i| copy(at(slot, whole * d + i * TILE), tokens - whole));
            }
        }
        (layout.heads..2 * layout.heads).for_each(|slot| copy(at(slot, 0), tokens * d));
        Ok(())
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
        let len = out.len();
        let mut rest = out;
        self.runs(layer, block, tokens, len, |from, bytes| {
            let (run, after) = std::mem::take(&mut rest).split_at_mut(bytes);
            // SAFETY: the run lies within the block, and nobody writes these tokens meanwhile (the trait's contract).
            unsafe { std::ptr::copy_nonoverlapping(from, run.as_mut_ptr(), bytes) };
            rest = after;
        })
    }

    fn write(&self, layer: usize, block: BlockId, tokens: usize, bytes: &[u8]) -> Result<(), KvMemoryError> {
        let mut rest = bytes;
        self.runs(layer, block, tokens, bytes.len(), |to, bytes| {
            let (run, after) = rest.split_at(bytes);
            // SAFETY: as in `read`; nobody else reads or writes these tokens meanwhile.
            unsafe { std::ptr::copy_nonoverlapping(run.as_ptr(), to, bytes) };
            rest = after;
        })
    }

    fn write_part(&self, layer: usize, block: BlockId, offset: usize, bytes: &[u8]) -> Result<(), KvMemoryError> {
        let inside = offset
            .checked_add(bytes.len())
            .is_some_and(|end| end <= self.layout.layer_block_bytes());
        if layer >= self.layout.layers || block.0 as usize >= self.blocks || !inside {
            return Err(KvMemoryError::OutOfRange);
        }
        // SAFETY: the part lies within the block's layer, and nobody else reads or writes it meanwhile (the trait's contract).
        unsafe {
            let to = self.block(layer, block).cast::<u8>().add(offset);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        Ok(())
    }

    fn prepare(&self, blocks: &[BlockId]) {
        let piece = self.layout.layer_block_bytes();
        let inside = |block: &BlockId| (block.0 as usize) < self.blocks;
        // What lies together is asked for together.
        for run in blocks.chunk_by(|a, b| a.0.checked_add(1) == Some(b.0)) {
            let run = &run[..run.iter().position(|block| !inside(block)).unwrap_or(run.len())];
            let Some(first) = run.first() else { continue };
            for layer in 0..self.layout.layers {
                let offset = (layer * self.blocks + first.0 as usize) * piece;
                self.elements.populate(offset, run.len() * piece);
            }
        }
    }

    fn shared(&self) -> Option<SharedPool<'_>> {
        self.elements.file().map(|file| SharedPool {
            file,
            blocks: self.blocks,
        })
    }

    unsafe fn whole(&self, layer: usize, block: BlockId) -> Option<&[u8]> {
        if layer >= self.layout.layers || block.0 as usize >= self.blocks {
            return None;
        }
        // SAFETY: within the allocation; the caller sees to it that nobody writes the block.
        Some(unsafe { std::slice::from_raw_parts(self.block(layer, block).cast(), self.layout.layer_block_bytes()) })
    }
}

#[cfg(test)]
mod tests;
