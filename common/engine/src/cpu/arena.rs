//! The step's buffers: planned once, allocated once, addressed by row from every thread.
#![allow(unsafe_code)]

use super::alloc::{Aligned, OutOfMemory};
use crate::ops::Buffer;

/// One buffer, `[rows, width]`, row r at `start + r * stride` floats of the arena. After the rows that all threads share come some of each thread's own.
#[derive(Clone, Copy, Debug)]
struct Place {
    start: usize,
    width: usize,
    /// Shared ones.
    shared: usize,
    /// All.
    rows: usize,
    stride: usize,
}

/// A set of buffers.
#[derive(Clone, Copy, Default)]
pub(super) struct Buffers(u64);

impl Buffers {
    /// Buffers that an arena may have.
    const MAX: usize = u64::BITS as usize;

    pub(super) fn contains(self, buffer: Buffer) -> bool {
        self.0 & (1 << buffer.0) != 0
    }

    pub(super) fn insert(&mut self, buffer: Buffer) {
        self.0 |= 1 << buffer.0;
    }

    pub(super) fn remove(&mut self, buffer: Buffer) {
        self.0 &= !(1 << buffer.0);
    }

    pub(super) fn bits(self) -> u64 {
        self.0
    }

    pub(super) fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// All buffers in one allocation.
pub(super) struct Arena {
    places: Vec<Place>,
    len: usize,
    memory: Aligned<f32>,
}

impl Default for Arena {
    fn default() -> Self {
        Self {
            places: Vec::new(),
            len: 0,
            memory: Aligned::empty(),
        }
    }
}

impl Arena {
    /// Plans a buffer of `rows` rows, and `own` for each of `threads` threads. Rows start on cache lines, have room for whole panels of 16 outputs, and do not lie a multiple of 4 KiB
    /// apart (they would compete for the same cache sets).
    ///
    /// # Panics
    /// Beyond [`Buffers::MAX`] buffers.
    pub(super) fn plan(&mut self, width: usize, shared: usize, own: usize, threads: usize) -> Buffer {
        assert!(self.places.len() < Buffers::MAX, "too many buffers");
        let rows = shared.saturating_add(own.saturating_mul(threads));
        let mut stride = width.next_multiple_of(16);
        if stride.is_multiple_of(1024) {
            stride += 16;
        }
        self.places.push(Place {
            start: self.len,
            width,
            shared,
            rows,
            stride,
        });
        self.len = self.len.saturating_add(stride.saturating_mul(rows));
        Buffer(self.places.len() - 1)
    }

    /// Allocates what was planned.
    pub(super) fn allocate(&mut self) -> Result<(), OutOfMemory> {
        self.memory = Aligned::zeroed(self.len)?;
        Ok(())
    }

    /// Width of the widest buffer.
    pub(super) fn widest(&self) -> usize {
        self.places.iter().map(|place| place.width).max().unwrap_or(0)
    }

    pub(super) fn width(&self, buffer: Buffer) -> usize {
        self.places[buffer.0].width
    }

    pub(super) fn stride(&self, buffer: Buffer) -> usize {
        self.places[buffer.0].stride
    }

    /// A thread's own row of a buffer that has `own` for each.
    pub(super) fn own_row(&self, buffer: Buffer, thread: usize, own: usize, row: usize) -> usize {
        assert!(row < own, "row outside a thread's own");
        self.places[buffer.0].shared + thread * own + row
    }

    /// Start of a row, of which `stride` floats may be touched.
    ///
    /// # Panics
    /// When there is no such row, or nothing is allocated yet.
    pub(super) fn row_ptr(&self, buffer: Buffer, row: usize) -> *mut f32 {
        let place = &self.places[buffer.0];
        assert!(
            row < place.rows && self.memory.len() == self.len,
            "row outside its buffer"
        );
        // SAFETY: `allocate` made room for every planned row.
        unsafe { self.memory.as_ptr().add(place.start + row * place.stride) }
    }

    /// # Safety
    /// Nobody writes the row while the slice lives.
    pub(super) unsafe fn row(&self, buffer: Buffer, row: usize) -> &[f32] {
        // SAFETY: `width` ≤ `stride` floats from the row's start; the caller excludes writers.
        unsafe { std::slice::from_raw_parts(self.row_ptr(buffer, row), self.width(buffer)) }
    }

    /// # Safety
    /// Nobody else reads or writes the row while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn row_mut(&self, buffer: Buffer, row: usize) -> &mut [f32] {
        // SAFETY: as in `row`; the caller excludes everyone else.
        unsafe { std::slice::from_raw_parts_mut(self.row_ptr(buffer, row), self.width(buffer)) }
    }
}
