//! KV memory of plain byte boxes, one per block.

use std::sync::{Mutex, MutexGuard, PoisonError};

use baton_kv::{BlockId, KvLayout, KvMemory, KvMemoryError};

/// One mutex per block; a block is `[layer][k|v][head][token][dim]`.
pub struct BlockMemory {
    layout: KvLayout,
    blocks: Vec<Mutex<Box<[u8]>>>,
}

impl BlockMemory {
    /// `blocks` blocks of zeros.
    pub fn new(layout: KvLayout, blocks: usize) -> Self {
        let block = || Mutex::new(vec![0; layout.block_bytes()].into_boxed_slice());
        Self {
            layout,
            blocks: (0..blocks).map(|_| block()).collect(),
        }
    }

    fn lock(&self, block: BlockId) -> MutexGuard<'_, Box<[u8]>> {
        // Bytes are always valid, whatever a thread that panicked left in them.
        self.blocks[block.0 as usize]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The runs of `layer` in a block that hold its tokens `from..to`, one per k|v and head.
    fn runs(&self, layer: usize, from: usize, to: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
        let (run, start, len) = (
            self.layout.head_bytes(self.layout.block_tokens),
            self.layout.head_bytes(from),
            self.layout.head_bytes(to - from),
        );
        let first = layer * 2 * self.layout.heads;
        (first..first + 2 * self.layout.heads).map(move |index| index * run + start..index * run + start + len)
    }

    /// Fills token `slot` of a block, all layers, with words.
    pub(super) fn write_position(&self, block: BlockId, slot: usize, words: impl Iterator<Item = u64>) {
        let mut bytes = words.flat_map(u64::to_le_bytes);
        let mut block = self.lock(block);
        for layer in 0..self.layout.layers {
            for run in self.runs(layer, slot, slot + 1) {
                block[run]
                    .iter_mut()
                    .zip(&mut bytes)
                    .for_each(|(out, byte)| *out = byte);
            }
        }
    }

    /// Reads token `slot` of a block, all layers, into `out`.
    pub(super) fn read_position(&self, block: BlockId, slot: usize, out: &mut Vec<u8>) {
        let block = self.lock(block);
        out.clear();
        for layer in 0..self.layout.layers {
            for run in self.runs(layer, slot, slot + 1) {
                out.extend_from_slice(&block[run]);
            }
        }
    }

    fn check(&self, layer: usize, block: BlockId, tokens: usize, got: usize) -> Result<(), KvMemoryError> {
        let inside =
            layer < self.layout.layers && (block.0 as usize) < self.blocks.len() && tokens <= self.layout.block_tokens;
        if !inside {
            return Err(KvMemoryError::OutOfRange);
        }
        let expected = self.layout.valid_bytes(tokens) / self.layout.layers;
        if got == expected {
            Ok(())
        } else {
            Err(KvMemoryError::Length { expected, got })
        }
    }
}

impl KvMemory for BlockMemory {
    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn blocks(&self) -> usize {
        self.blocks.len()
    }

    fn read(&self, layer: usize, block: BlockId, tokens: usize, out: &mut [u8]) -> Result<(), KvMemoryError> {
        self.check(layer, block, tokens, out.len())?;
        let block = self.lock(block);
        let pieces = out.chunks_exact_mut(self.layout.head_bytes(tokens).max(1));
        for (piece, run) in pieces.zip(self.runs(layer, 0, tokens)) {
            piece.copy_from_slice(&block[run]);
        }
        Ok(())
    }

    fn write(&self, layer: usize, block: BlockId, tokens: usize, bytes: &[u8]) -> Result<(), KvMemoryError> {
        self.check(layer, block, tokens, bytes.len())?;
        let mut block = self.lock(block);
        let pieces = bytes.chunks_exact(self.layout.head_bytes(tokens).max(1));
        for (piece, run) in pieces.zip(self.runs(layer, 0, tokens)) {
            block[run].copy_from_slice(piece);
        }
        Ok(())
    }
}
