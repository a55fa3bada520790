//! Copying a peer's pieces into blocks.
#![allow(unsafe_code)]

use baton_kv::{KvMemory, KvMemoryError};

use super::Mapping;
use crate::{PieceSource, PieceWrite};

/// A mapped pool, as the source of frames that name its blocks.
pub(crate) struct MappedPool<'a>(pub(crate) &'a Mapping);

impl PieceSource for MappedPool<'_> {
    /// A whole piece, whatever of it is valid: within its pool it is one run of bytes, and sums cover only what is valid.
    fn copy(&mut self, write: &PieceWrite, layer: usize, memory: &dyn KvMemory) -> Result<(), KvMemoryError> {
        // SAFETY: copied; the copy's checksum decides.
        let piece = unsafe { self.0.piece(layer, write.source_block()) }.ok_or(KvMemoryError::OutOfRange)?;
        memory.write_part(layer, write.block(), 0, piece)
    }
}
