//! Zeroed memory on a page's boundary, shared between threads through raw pointers.
#![allow(unsafe_code)]

use std::{io, marker::PhantomData, os::fd::BorrowedFd};

use baton_kv::MemoryFile;
use memmap2::{Advice, MmapMut};

/// The system refused the memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("cannot allocate {bytes} bytes of memory")]
pub struct OutOfMemory {
    /// What was asked for.
    pub bytes: usize,
}

/// From this size on memory is asked for in huge pages: a step reads all weights, and would miss the TLB at every small page.
const HUGE: usize = 2 << 20;

/// `len` numbers of a plain type (any bit pattern is valid, zero included), aligned to a page, zeroed, freed on drop. Pages are taken from
/// the system when first touched.
pub(super) struct Aligned<T: Copy> {
    region: Region,
    len: usize,
    marker: PhantomData<T>,
}

enum Region {
    Empty,
    Private(MmapMut),
    Shared(MemoryFile),
}

impl<T: Copy> Aligned<T> {
    pub(super) fn zeroed(len: usize) -> Result<Self, OutOfMemory> {
        if len == 0 {
            return Ok(Self::empty());
        }
        let bytes = len.saturating_mul(size_of::<T>());
        // A slice may not be longer than isize::MAX.
        if isize::try_from(bytes).is_err() {
            return Err(OutOfMemory { bytes });
        }
        let map = MmapMut::map_anon(bytes).map_err(|_| OutOfMemory { bytes })?;
        if bytes >= HUGE {
            // Advice only: small pages do as well, more slowly.
            let _ = map.advise(Advice::HugePage);
        }
        Ok(Self {
            region: Region::Private(map),
            len,
            marker: PhantomData,
        })
    }

    /// Takes the pages of `bytes` bytes from `offset` on from the system now, whoever uses them meanwhile; their content stays. A system that cannot
    /// gives them later, when they are touched.
    pub(super) fn populate(&self, offset: usize, bytes: usize) {
        match &self.region {
            Region::Private(map) => {
                let _ = map.advise_range(Advice::PopulateWrite, offset, bytes);
            }
            Region::Shared(file) => file.populate(offset, bytes),
            Region::Empty => {}
        }
    }

    /// In a file that other processes can map for reading. `len` is not 0.
    pub(super) fn shared(len: usize) -> io::Result<Self> {
        let file = MemoryFile::create(len.saturating_mul(size_of::<T>()))?;
        Ok(Self {
            region: Region::Shared(file),
            len,
            marker: PhantomData,
        })
    }

    /// The file of [`Aligned::shared`].
    pub(super) fn file(&self) -> Option<BorrowedFd<'_>> {
        match &self.region {
            Region::Shared(file) => Some(file.file()),
            Region::Empty | Region::Private(_) => None,
        }
    }

    pub(super) fn empty() -> Self {
        Self {
            region: Region::Empty,
            len: 0,
            marker: PhantomData,
        }
    }

    pub(super) fn as_ptr(&self) -> *mut T {
        // Nobody else can write the pages, so that writing through the pointer is this value's holders' affair.
        match &self.region {
            Region::Empty => std::ptr::NonNull::dangling().as_ptr(),
            Region::Private(map) => map.as_ptr().cast_mut().cast(),
            Region::Shared(file) => file.as_ptr().cast(),
        }
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

#[cfg(test)]
mod tests;
