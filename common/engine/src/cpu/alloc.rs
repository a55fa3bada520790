//! Zeroed memory on a cache line's boundary, shared between threads through raw pointers.
#![allow(unsafe_code)]

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    marker::PhantomData,
    ptr::NonNull,
};

/// The system refused the memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("cannot allocate {bytes} bytes of memory")]
pub struct OutOfMemory {
    /// What was asked for.
    pub bytes: usize,
}

/// Cache line, and width of the widest vector, bytes.
const LINE: usize = 64;

/// `len` numbers of a plain type (any bit pattern is valid, zero included), aligned to 64 bytes, zeroed, freed on drop.
///
/// Large allocations come as untouched zero pages: asking the allocator for alignment instead would make it write them all.
pub(super) struct Aligned<T: Copy> {
    start: NonNull<u8>,
    layout: Layout,
    data: NonNull<T>,
    len: usize,
    marker: PhantomData<T>,
}

// SAFETY: it owns plain numbers and hands out raw pointers only; whoever dereferences them says why that is not a race.
unsafe impl<T: Copy + Send> Send for Aligned<T> {}
// SAFETY: as above.
unsafe impl<T: Copy + Sync> Sync for Aligned<T> {}

impl<T: Copy> Aligned<T> {
    pub(super) fn zeroed(len: usize) -> Result<Self, OutOfMemory> {
        let refused = OutOfMemory {
            bytes: len.saturating_mul(size_of::<T>()),
        };
        let bytes = len
            .checked_mul(size_of::<T>())
            .and_then(|bytes| bytes.checked_add(2 * LINE))
            .ok_or(refused)?;
        let layout = Layout::from_size_align(bytes, 16).map_err(|_| refused)?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(refused)?;
        // SAFETY: at most LINE - 1 further, and the allocation is 2 × LINE longer than `len` numbers.
        let data = unsafe { start.add(start.align_offset(LINE)).cast() };
        Ok(Self {
            start,
            layout,
            data,
            len,
            marker: PhantomData,
        })
    }

    pub(super) fn empty() -> Self {
        Self::zeroed(0).unwrap_or_else(|_| std::alloc::handle_alloc_error(Layout::new::<[u8; 2 * LINE]>()))
    }

    pub(super) fn as_ptr(&self) -> *mut T {
        self.data.as_ptr()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: `len` numbers, all initialised (zeroed), and `&mut self` excludes every other safe access.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), self.len) }
    }

    pub(super) fn as_slice(&self) -> &[T] {
        // SAFETY: `len` initialised numbers. Used where nobody writes: read-only weights, and results after a step.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }
}

impl<T: Copy> Drop for Aligned<T> {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}
