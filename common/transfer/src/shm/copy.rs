//! Copying a peer's pieces into blocks, and summing them there.

use baton_kv::{Checksum, ChecksumState};

use crate::limits::SHM_PART_BYTES;

/// Copies `from` to `to` (of the same length) part by part, and sums each part where it was written, while it is in the cache.
pub(super) fn copy_and_sum(from: &[u8], to: &mut [u8]) -> Checksum {
    let mut sum = ChecksumState::default();
    for (from, to) in from.chunks(SHM_PART_BYTES).zip(to.chunks_mut(SHM_PART_BYTES)) {
        to.copy_from_slice(from);
        sum.update(to);
    }
    sum.finish()
}
