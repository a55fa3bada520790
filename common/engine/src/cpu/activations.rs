//! Rows of activations, packed into the tiles in which the kernels take them.
//!
//! A tile of R rows is one run of memory, so that a kernel walks it with a single pointer:
//! - for quantised matrices, per group of 32 of k, words of four bytes: `[8][R]` of four int8 each, then `[R]` of each of a group's numbers, in the order
//!   of [`Group`]'s fields;
//! - for matrices of floats: `[k][R]` of f32;
//! - for matrices of bf16, k rounded up to pairs, with a zero: `[k / 2][R]` words of two bf16, the even k in the low half, for `vdpbf16ps`; for other
//!   instructions the same numbers as `[k][R]` of f32.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    alloc::{Aligned, OutOfMemory},
    isa::Isa,
    rows::{GROUP, Group, interleave, interleave_bf16, interleave_groups, narrow_activations, quantise},
};

/// Most rows of a tile.
pub(super) const TILE_ROWS: usize = 12;
/// Most rows of a last tile: longer rests are two tiles.
const REST_ROWS: usize = 8;

/// Words of int8 in a group of one row.
pub(super) const GROUP_WORDS: usize = GROUP / 4;
/// Words of a group of one row, its numbers included.
pub(super) const PACKED_WORDS: usize = GROUP_WORDS + size_of::<Group>() / 4;

/// The tile of `row` where `rows` rows are multiplied: its first row, and how many it has. Full tiles come first.
pub(super) fn tile_of(row: usize, rows: usize) -> (usize, usize) {
    debug_assert!(row < rows);
    let full = rows / TILE_ROWS * TILE_ROWS;
    let rest = rows - full;
    if row < full {
        (row / TILE_ROWS * TILE_ROWS, TILE_ROWS)
    } else if row < full + REST_ROWS {
        (full, rest.min(REST_ROWS))
    } else {
        (full + REST_ROWS, rest - REST_ROWS)
    }
}

/// Tiles of `rows` rows.
pub(super) fn tiles(rows: usize) -> usize {
    rows.div_ceil(TILE_ROWS) + usize::from(rows % TILE_ROWS > REST_ROWS)
}

/// First row of the `tile`-th of them.
pub(super) fn tile_start(tile: usize, rows: usize) -> usize {
    let full = rows / TILE_ROWS;
    tile.min(full) * TILE_ROWS + tile.saturating_sub(full) * REST_ROWS
}

/// The forms of a row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Form {
    Quantised,
    Float,
    Bf16,
}

impl Form {
    pub(super) const ALL: [Self; 3] = [Self::Quantised, Self::Float, Self::Bf16];

    /// Room for one row of a matrix with `k` columns, words.
    pub(super) fn row_words(self, k: usize) -> usize {
        match self {
            Self::Quantised => k / GROUP * PACKED_WORDS,
            Self::Float => k,
            Self::Bf16 => k.next_multiple_of(2),
        }
    }
}

/// Memory for the activations of one matrix at a time, in any form.
pub(super) struct Activations {
    forms: [Aligned<u32>; 3],
}

/// Columns that are packed at once.
pub(super) const PACK_COLUMNS: usize = 192;

/// What [`Activations::pack`] works in.
pub(super) struct PackScratch {
    bytes: [[i8; PACK_COLUMNS]; TILE_ROWS],
    groups: [[Group; PACK_COLUMNS / GROUP]; TILE_ROWS],
    halves: [[u16; PACK_COLUMNS]; TILE_ROWS],
}

impl PackScratch {
    pub(super) fn new() -> Self {
        Self {
            bytes: [[0; PACK_COLUMNS]; TILE_ROWS],
            groups: [[Group::ZERO; PACK_COLUMNS / GROUP]; TILE_ROWS],
            halves: [[0; PACK_COLUMNS]; TILE_ROWS],
        }
    }
}

impl Activations {
    /// For `rows` rows of at most `max_k(form)` numbers.
    pub(super) fn new(rows: usize, max_k: impl Fn(Form) -> usize) -> Result<Self, OutOfMemory> {
        let [quantised, floats, bf16] =
            Form::ALL.map(|form| Aligned::zeroed(rows.saturating_mul(form.row_words(max_k(form)))));
        Ok(Self {
            forms: [quantised?, floats?, bf16?],
        })
    }

    /// Start of the tile of `tile_rows` rows of `k` numbers that begins at row `first`.
    pub(super) fn tile(&self, form: Form, first: usize, tile_rows: usize, k: usize) -> *mut u32 {
        let memory = &self.forms[form as usize];
        let words = form.row_words(k);
        assert!(
            (first + tile_rows) * words <= memory.len(),
            "activation tile outside its memory"
        );
        // SAFETY: checked above.
        unsafe { memory.as_ptr().add(first * words) }
    }

    /// Packs the part `columns` (at most [`PACK_COLUMNS`], in whole groups but for the row's end) of rows of `k` numbers: the tile `x` that begins at row `first`.
    ///
    /// # Safety
    /// Nobody else reads or writes that part meanwhile.
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn pack(
        &self,
        isa: Isa,
        form: Form,
        first: usize,
        k: usize,
        x: &[&[f32]],
        columns: Range<usize>,
        scratch: &mut PackScratch,
    ) {
        let tile_rows = x.len();
        let tile = self.tile(form, first, tile_rows, k);
        // Of bf16, unless two share a word.
        let apart = isa != Isa::Avx512Bf16;
        let (start, len) = match form {
            Form::Bf16 if apart => (columns.start, columns.len().next_multiple_of(2)),
            Form::Bf16 => (columns.start / 2, columns.len().div_ceil(2)),
            Form::Float => (columns.start, columns.len()),
            Form::Quantised => (
                columns.start / GROUP * PACKED_WORDS,
                columns.len() / GROUP * PACKED_WORDS,
            ),
        };
        assert!(
            columns.end <= k && x.iter().all(|x| x.len() == k),
            "rows of another width"
        );
        // SAFETY: within the tile, whose bounds `tile` checked; the caller excludes everyone else.
        let out = unsafe { std::slice::from_raw_parts_mut(tile.add(start * tile_rows), len * tile_rows) };
        match form {
            Form::Float => interleave(isa, x, columns, out),
            Form::Bf16 => {
                let halves = &mut scratch.halves[..tile_rows];
                for (x, halves) in x.iter().zip(&mut *halves) {
                    narrow_activations(isa, &x[columns.clone()], halves);
                    // The last of an odd number is paired with zero.
                    halves[columns.len()..].iter_mut().take(1).for_each(|half| *half = 0);
                }
                interleave_bf16(isa, halves, apart, out);
            }
            Form::Quantised => {
                let PackScratch { bytes, groups, .. } = scratch;
                let len = columns.len();
                for ((x, bytes), groups) in x.iter().zip(&mut *bytes).zip(&mut *groups) {
                    quantise(isa, &x[columns.clone()], &mut bytes[..len], &mut groups[..len / GROUP]);
                }
                interleave_groups(isa, &bytes[..tile_rows], &groups[..tile_rows], out);
            }
        }
    }
}
