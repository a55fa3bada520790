//! Reading and writing the bytes of blocks, whatever memory they lie in.

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
/// its valid tokens no longer change).
pub trait KvMemory: Send + Sync {
    /// The pool's shape.
    fn layout(&self) -> &KvLayout;

    /// Number of blocks.
    fn blocks(&self) -> usize;

    /// Copies one piece into `out`, which must have exactly the piece's length.
    fn read(&self, layer: usize, block: BlockId, tokens: usize, out: &mut [u8]) -> Result<(), KvMemoryError>;

    /// Copies one piece from `bytes`, which must have exactly the piece's length.
    fn write(&self, layer: usize, block: BlockId, tokens: usize, bytes: &[u8]) -> Result<(), KvMemoryError>;
}
