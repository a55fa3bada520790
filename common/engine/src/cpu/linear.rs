//! `out[r] = weight · x[r]`: one tile is one panel (16 outputs) times up to 8 rows.
//!
//! Per output and group of 32, in ascending k: an exact integer dot product, then `acc = fma(w_scale * a_scale, dot, acc)` and, for Q4_1,
//! `acc = fma(w_min, a_scale * a_sum, acc)`. Floats: `acc = fma(w, x, acc)` in ascending k. The row count changes nothing of that.

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

/// Kinds as const generics.
const Q4_0: u8 = 0;
const Q4_1: u8 = 1;
const Q8_0: u8 = 2;

#[cfg(test)]
mod tests;
