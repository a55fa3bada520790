//! `out[r] = weight · x[r]`: one tile is one panel (16 outputs) times up to 8 rows.
//!
//! Per output and group of 32, in ascending k: an exact integer dot product, then `acc = fma(w_scale * a_scale, dot, acc)` and, for types with a
//! minimum, `acc = fma(±w_min, a_scale * a_sum, acc)`. The K types' `w_scale` and `w_min` are the super-block's f16 times the group's factor, which f32
//! holds exactly. Q6_K's two factors are integers, and `dot = factor[0] * dot(first half) + factor[1] * dot(second half)` stays an integer, below 2^24.
//! Floats, bf16 widened: `acc = fma(w, x, acc)` in ascending k. The row count changes nothing of that.

use super::{
    isa::Isa,
    rows::Group,
    weight::{PanelKind, PanelShape},
};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

/// Most rows of a tile.
pub(super) const TILE_ROWS: usize = 8;

/// One panel times some rows. Row r of anything is `stride` elements after row r − 1.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) panel: *const u8,
    pub(super) shape: PanelShape,
    pub(super) k: usize,
    /// Quantised rows, for quantised panels.
    pub(super) bytes: *const i8,
    pub(super) bytes_stride: usize,
    pub(super) groups: *const Group,
    pub(super) groups_stride: usize,
    /// Rows as they are, for float panels.
    pub(super) x: *const f32,
    pub(super) x_stride: usize,
    /// 16 outputs per row.
    pub(super) out: *mut f32,
    pub(super) out_stride: usize,
}

/// Computes a tile of as many rows as it was asked for.
///
/// # Safety
/// The CPU has the instruction set; the tile's pointers are valid for the panel, for its rows of k elements (of the kind that the panel
/// needs), and for 16 outputs per row, which nobody else touches meanwhile.
pub(super) type TileFn = unsafe fn(&Tile);

/// The kernel for `rows` (1..=[`TILE_ROWS`]) rows.
pub(super) fn tile_fn(isa: Isa, kind: PanelKind, rows: usize) -> TileFn {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::tile_fn(kind, rows),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::tile_fn(kind, rows),
        _ => portable::tile_fn(kind, rows),
    }
}

/// `$tile::<KIND, R>` for a row count R known at run time.
macro_rules! by_rows {
    ($rows:expr, $tile:ident $(, $kind:ident)?) => {
        match $rows {
            1 => $tile::<$($kind,)? 1>,
            2 => $tile::<$($kind,)? 2>,
            3 => $tile::<$($kind,)? 3>,
            4 => $tile::<$($kind,)? 4>,
            5 => $tile::<$($kind,)? 5>,
            6 => $tile::<$($kind,)? 6>,
            7 => $tile::<$($kind,)? 7>,
            8 => $tile::<$($kind,)? 8>,
            other => unreachable!("a tile of {other} rows"),
        }
    };
}
use by_rows;

/// `tile_fn` of one instruction set, from its `quantised::<KIND, R>`, `bf16::<R>` and `float::<R>`.
macro_rules! by_kind {
    ($kind:expr, $rows:expr) => {
        match $kind {
            PanelKind::Q4_0 => by_rows!($rows, quantised, Q4_0),
            PanelKind::Q4_1 => by_rows!($rows, quantised, Q4_1),
            PanelKind::Q5_0 => by_rows!($rows, quantised, Q5_0),
            PanelKind::Q5_1 => by_rows!($rows, quantised, Q5_1),
            PanelKind::Q8_0 => by_rows!($rows, quantised, Q8_0),
            PanelKind::Q4K => by_rows!($rows, quantised, Q4K),
            PanelKind::Q5K => by_rows!($rows, quantised, Q5K),
            PanelKind::Q6K => by_rows!($rows, quantised, Q6K),
            PanelKind::Bf16 => by_rows!($rows, bf16),
            PanelKind::F32 => by_rows!($rows, float),
        }
    };
}
use by_kind;

/// Kinds as const generics.
const Q4_0: u8 = 0;
const Q4_1: u8 = 1;
const Q5_0: u8 = 2;
const Q5_1: u8 = 3;
const Q8_0: u8 = 4;
const Q4K: u8 = 5;
const Q5K: u8 = 6;
const Q6K: u8 = 7;

/// What [`Q4_0`] and its like stand for.
const fn kind(number: u8) -> PanelKind {
    match number {
        Q4_0 => PanelKind::Q4_0,
        Q4_1 => PanelKind::Q4_1,
        Q5_0 => PanelKind::Q5_0,
        Q5_1 => PanelKind::Q5_1,
        Q8_0 => PanelKind::Q8_0,
        Q4K => PanelKind::Q4K,
        Q5K => PanelKind::Q5K,
        Q6K => PanelKind::Q6K,
        _ => PanelKind::F32,
    }
}

/// What an unsigned dot product starts with to come out as the signed one. (Q6_K needs it per half, and has its own.)
#[inline(always)]
const fn offset(kind: PanelKind, group: &Group) -> i32 {
    match kind {
        PanelKind::Q4_0 => group.minus_8,
        PanelKind::Q5_0 => group.minus_8.wrapping_mul(2),
        PanelKind::Q8_0 => group.minus_128,
        _ => 0,
    }
}

/// −32 times the sums of the first and of the second 16 of 32 bytes: what makes unsigned Q6_K signed.
///
/// # Safety
/// `bytes` are 32.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[inline]
#[target_feature(enable = "sse2")]
unsafe fn half_offsets(bytes: *const i8) -> [i32; 2] {
    use std::arch::x86_64::*;
    [0, 16].map(|at| {
        // SAFETY: 16 of the 32 bytes.
        let bytes = unsafe { _mm_loadu_si128(bytes.add(at).cast()) };
        // Unsigned, that is 128 more each; two sums of eight.
        let sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(-128)), _mm_setzero_si128());
        let sum = _mm_cvtsi128_si32(_mm_add_epi64(sums, _mm_unpackhi_epi64(sums, sums)));
        -32 * (sum - 16 * 128)
    })
}

#[cfg(test)]
mod tests;
