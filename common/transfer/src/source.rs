//! Where the bytes of a frame come from, on their way into the receiver's blocks.

use baton_kv::{KvMemory, KvMemoryError};
use bytes::Buf;

use crate::{Chain, PieceWrite};

/// The frame itself, or (over shared memory) the sender's pool.
pub trait PieceSource {
    /// Copies one of the layers of `write` to its place. Nobody else reads or writes it meanwhile. A frame's writes come in their order, and the layers of each.
    fn copy(&mut self, write: &PieceWrite, layer: usize, memory: &dyn KvMemory) -> Result<(), KvMemoryError>;
}

/// Bytes that came with the frame, the runs' one after the other. What was copied is given up on the way.
pub struct FrameBytes {
    rest: Chain,
    /// Of the frame's bytes, where `rest` begins.
    at: usize,
    scratch: Vec<u8>,
}

impl FrameBytes {
    /// All of a frame's.
    pub fn new(bytes: Chain) -> Self {
        Self {
            rest: bytes,
            at: 0,
            scratch: Vec::new(),
        }
    }
}

impl PieceSource for FrameBytes {
    fn copy(&mut self, write: &PieceWrite, layer: usize, memory: &dyn KvMemory) -> Result<(), KvMemoryError> {
        let (bytes, layers) = (write.bytes(), write.layers());
        let piece_bytes = bytes.len() / layers.len();
        let start = bytes.start + (layer - layers.start) * piece_bytes;
        // Runs that are here already were left out.
        let skip = start.checked_sub(self.at).ok_or(KvMemoryError::OutOfRange)?;
        let (expected, got) = (skip + piece_bytes, self.rest.len());
        if expected > got {
            return Err(KvMemoryError::Length { expected, got });
        }
        self.rest.advance(skip);
        self.at = start + piece_bytes;
        if write.valid_tokens() < memory.layout().block_tokens {
            self.scratch.resize(piece_bytes, 0);
            self.rest.copy_to_slice(&mut self.scratch);
            return memory.write(layer, write.block(), write.valid_tokens(), &self.scratch);
        }
        let mut offset = 0;
        while offset < piece_bytes {
            let part = self.rest.next(piece_bytes - offset);
            memory.write_part(layer, write.block(), offset, &part)?;
            offset += part.len();
        }
        Ok(())
    }
}
