//! Where the bytes of a frame come from, on their way into the receiver's blocks.

use std::ops::Range;

use baton_kv::{KvMemory, KvMemoryError};

use crate::PieceWrite;

/// The frame itself, or (over shared memory) the sender's pool.
pub trait PieceSource {
    /// Copies the pieces of `write` to their place. Nobody else reads or writes it meanwhile.
    fn copy(&mut self, write: &PieceWrite, memory: &dyn KvMemory) -> Result<(), KvMemoryError>;
}

/// Bytes that came with the frame, the runs' one after the other.
pub struct FrameBytes<'a>(pub &'a [u8]);

impl PieceSource for FrameBytes<'_> {
    fn copy(&mut self, write: &PieceWrite, memory: &dyn KvMemory) -> Result<(), KvMemoryError> {
        let Range { start, end } = write.bytes();
        let expected = end - start;
        let bytes = self
            .0
            .get(start..end)
            .ok_or(KvMemoryError::Length { expected, got: 0 })?;
        let pieces = bytes.chunks_exact(bytes.len() / write.layers().len());
        write
            .layers()
            .zip(pieces)
            .try_for_each(|(layer, piece)| memory.write(layer, write.block(), write.valid_tokens(), piece))
    }
}
