//! Rows of int8 activations, with room for the widest quantised matrix.
#![allow(unsafe_code)]

use super::{
    alloc::{Aligned, OutOfMemory},
    isa::Isa,
    rows::{GROUP, Group, quantise},
};

/// `[rows, k]` bytes and `[rows, k / 32]` groups; k is the running matrix's.
pub(super) struct Activations {
    bytes: Aligned<i8>,
    groups: Aligned<Group>,
    rows: usize,
}

/// From one row's bytes to the next's: whole cache lines, and no multiple of 1 KiB.
pub(super) fn bytes_stride(k: usize) -> usize {
    let stride = k.next_multiple_of(64);
    if stride.is_multiple_of(1024) {
        stride + 64
    } else {
        stride
    }
}

/// From one row's groups to the next's.
pub(super) fn groups_stride(k: usize) -> usize {
    k / GROUP + 4 - k / GROUP % 4
}

impl Activations {
    /// For `rows` rows of at most `max_k`.
    pub(super) fn new(rows: usize, max_k: usize) -> Result<Self, OutOfMemory> {
        Ok(Self {
            bytes: Aligned::zeroed(rows.saturating_mul(bytes_stride(max_k) + 64))?,
            groups: Aligned::zeroed(rows.saturating_mul(groups_stride(max_k) + 4))?,
            rows,
        })
    }

    /// Row `row` of `k` numbers: where its bytes and its groups start.
    pub(super) fn row(&self, row: usize, k: usize) -> (*mut i8, *mut Group) {
        let (bytes, groups) = (row * bytes_stride(k), row * groups_stride(k));
        assert!(
            row < self.rows && bytes + k <= self.bytes.len() && groups + k / GROUP <= self.groups.len(),
            "activation row outside its memory"
        );
        // SAFETY: both offsets were checked.
        unsafe { (self.bytes.as_ptr().add(bytes), self.groups.as_ptr().add(groups)) }
    }

    /// Quantises `x` into row `row`.
    ///
    /// # Safety
    /// Nobody else reads or writes that row meanwhile.
    pub(super) unsafe fn quantise(&self, isa: Isa, row: usize, x: &[f32]) {
        let (bytes, groups) = self.row(row, x.len());
        // SAFETY: `row` checked the lengths; the caller excludes everyone else.
        let (bytes, groups) = unsafe {
            (
                std::slice::from_raw_parts_mut(bytes, x.len()),
                std::slice::from_raw_parts_mut(groups, x.len() / GROUP),
            )
        };
        quantise(isa, x, bytes, groups);
    }
}
