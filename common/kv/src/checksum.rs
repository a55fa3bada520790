//! crc64-nvme over a block's valid bytes: `[layer][k|v][head][token < valid][dim]`. Catches accidents, not attackers.

use crate::{BlockId, KvMemory, KvMemoryError};

/// The checksum of one block's valid bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Checksum(pub u64);

/// A checksum under way.
pub struct ChecksumState {
    digest: crc_fast::Digest,
}

impl Default for ChecksumState {
    fn default() -> Self {
        Self {
            digest: crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme),
        }
    }
}

impl ChecksumState {
    /// Adds bytes, in order.
    pub fn update(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
    }

    /// The checksum so far.
    pub fn finish(self) -> Checksum {
        Checksum(self.digest.finalize())
    }
}

impl Checksum {
    /// Reads the block back from where it lies and sums its first `tokens` tokens, all layers in order.
    /// `scratch` is resized to one piece and can be reused.
    pub fn of_block(
        memory: &dyn KvMemory,
        block: BlockId,
        tokens: usize,
        scratch: &mut Vec<u8>,
    ) -> Result<Self, KvMemoryError> {
        let layout = memory.layout();
        scratch.resize(layout.valid_bytes(tokens) / layout.layers, 0);
        let mut state = ChecksumState::default();
        for layer in 0..layout.layers {
            memory.read(layer, block, tokens, scratch)?;
            state.update(scratch);
        }
        Ok(state.finish())
    }
}
