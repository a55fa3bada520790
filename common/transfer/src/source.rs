//! Where the bytes of a frame come from, on their way into the receiver's blocks.

use baton_kv::{KvMemory, KvMemoryError};

use crate::PieceWrite;

/// The frame itself, or (over shared memory) the sender's pool.
pub trait PieceSource {
    /// Copies one of the layers of `write` to its place. Nobody else reads or writes it meanwhile.
    fn copy(&mut self, write: &PieceWrite, layer: usize, memory: &dyn KvMemory) -> Result<(), KvMemoryError>;
}

/// Bytes that came with the frame, the runs' one after the other.
pub struct FrameBytes<'a>(pub &'a [u8]);

impl PieceSource for FrameBytes<'_> {
    fn copy(&mut self, write: &PieceWrite, layer: usize, memory: &dyn KvMemory) -> Result<(), KvMemoryError> {
        let (bytes, layers) = (write.bytes(), write.layers());
        let expected = bytes.len() / layers.len();
        let start = bytes.start + (layer - layers.start) * expected;
        let piece = self
            .0
            .get(start..start + expected)
            .ok_or(KvMemoryError::Length { expected, got: 0 })?;
        memory.write(layer, write.block(), write.valid_tokens(), piece)
    }
}
