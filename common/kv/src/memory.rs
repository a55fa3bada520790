//! Reading and writing the bytes of blocks, whatever memory they lie in.

use std::os::fd::BorrowedFd;

use crate::{BlockId, KvLayout};

/// Why block bytes could not be read or written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum KvMemoryError {
    /// The block, layer, or token count lies outside the pool.
    #[error("KV range lies outside the pool")]
    OutOfRange,
    /// The buffer's length is not what the range holds.
    #[error("KV buffer holds {got} bytes where the range holds {expected}")]
    Length {
        /// Bytes of the range.
        expected: usize,
        /// Bytes of the caller's buffer.
        got: usize,
    },
}

/// Access to the bytes of blocks. Implementations: CPU memory, (later) CUDA memory, simulated.
///
/// A *piece* is one layer of one block, its first `tokens` tokens, `[k|v][head]`, without gaps for the tokens that are not valid. Within a head the order is the
/// implementation's (`[token][dim]`, or keys by dimension): memories of one identity agree on it, and nobody else looks into a piece.
/// It has `layout.valid_bytes(tokens) / layout.layers` bytes.
///
/// Calls take `&self` and may run while the engine computes: the pool's table guarantees that nobody else reads or writes
/// the same block meanwhile (a block that is being filled is granted to one handoff; one that is being read is held by a sequence and
/// its valid tokens no longer change, in the layers that are read).
pub trait KvMemory: Send + Sync {
    /// The pool's shape.
    fn layout(&self) -> &KvLayout;

    /// Number of blocks.
    fn blocks(&self) -> usize;

    /// Copies one piece into `out`, which must have exactly the piece's length.
    fn read(&self, layer: usize, block: BlockId, tokens: usize, out: &mut [u8]) -> Result<(), KvMemoryError>;

    /// Copies one piece from `bytes`, which must have exactly the piece's length.
    fn write(&self, layer: usize, block: BlockId, tokens: usize, bytes: &[u8]) -> Result<(), KvMemoryError>;

    /// Copies `bytes` to `offset..` of a whole block's piece (all its tokens). Whoever receives a piece in parts need not put it together first.
    fn write_part(&self, layer: usize, block: BlockId, offset: usize, bytes: &[u8]) -> Result<(), KvMemoryError> {
        let tokens = self.layout().block_tokens;
        let mut piece = vec![0; self.layout().layer_block_bytes()];
        let end = offset.checked_add(bytes.len()).ok_or(KvMemoryError::OutOfRange)?;
        let part = piece
            .get(offset..end)
            .map(<[u8]>::len)
            .ok_or(KvMemoryError::OutOfRange)?;
        self.read(layer, block, tokens, &mut piece)?;
        piece[offset..offset + part].copy_from_slice(bytes);
        self.write(layer, block, tokens, &piece)
    }

    /// Takes what these blocks need from the system now, so that whoever writes them first need not wait for it. Changes no byte; may take milliseconds
    /// per MiB, and may run while anybody reads or writes them. Blocks outside the pool are ignored.
    fn prepare(&self, _blocks: &[BlockId]) {}

    /// A whole block's piece (all its tokens) where it lies, for those who read without copying. `None` where it is not one run of bytes in main memory, or
    /// outside the pool.
    ///
    /// # Safety
    /// Nobody writes that layer of the block while the slice is in use: it is held by whoever reads it, as for [`KvMemory::read`].
    #[allow(unsafe_code)]
    unsafe fn whole(&self, _layer: usize, _block: BlockId) -> Option<&[u8]> {
        None
    }

    /// The pool as a file of memory that other processes of this host can map; `None` where it is none.
    fn shared(&self) -> Option<SharedPool<'_>> {
        None
    }
}

/// A pool in one file: the piece of (layer, block) is the `layout.layer_block_bytes()` bytes at `(layer * blocks + block)` times their number.
#[derive(Clone, Copy, Debug)]
pub struct SharedPool<'a> {
    /// The file; others get it opened for reading only.
    pub file: BorrowedFd<'a>,
    /// Blocks in it.
    pub blocks: usize,
}
