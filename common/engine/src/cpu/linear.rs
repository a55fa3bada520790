//! `out[r] = weight · x[r]`: one tile is one panel (16 outputs) times up to 12 rows.
//!
//! Per output and group of 32, in ascending k: an exact integer dot product, then `acc = fma(w_scale * a_scale, dot, acc)` and, for types with a
//! minimum, `acc = fma(±w_min, a_scale * a_sum, acc)`. The K types' `w_scale` and `w_min` are the super-block's f16 times the group's factor, which f32
//! holds exactly. Q6_K's two factors are integers, and `dot = factor[0] * dot(first half) + factor[1] * dot(second half)` stays an integer, below 2^24.
//! Floats: `acc = fma(w, x, acc)` in ascending k. The row count changes nothing of that.
//!
//! bf16 is a class of its own, that of `vdpbf16ps`. Activations are rounded to bf16, nearest even; then those below 2^-60 are taken as 0, and weights below
//! 2^-40, too. For each pair of k, ascending, `acc = fma(w_odd, x_odd, acc)`, and then the same of the even one; an odd k has zero for a partner. That is
//! what the instruction does, but that it takes subnormal numbers as 0, and gives 0 for them: here there are none. bf16 has eight digits, so a weight is a
//! multiple of 2^-47, an activation of 2^-67, and a product, which f32 holds exactly, of 2^-114. A sum of such multiples is one, rounded or not: it is 0, or
//! at least 2^-114, where f32's normal numbers begin at 2^-126. Thus whether there is a CPU with that instruction makes no difference to any bit, nor, below
//! f32's largest number, whether multiplication and addition are one operation or two.

use super::{
    activations::{GROUP_WORDS, PACKED_WORDS},
    isa::Isa,
    weight::{PanelKind, PanelShape},
};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod kinds;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(super) use avx512::bf16_dots_hold;

/// One panel times some rows.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) panel: *const u8,
    pub(super) shape: PanelShape,
    pub(super) k: usize,
    /// The rows, packed for the panel's kind (see `activations`).
    pub(super) packed: *const u32,
    /// Rows: 1 to 8, or 12, as [`tile_of`](super::activations::tile_of) has them.
    pub(super) rows: usize,
    /// 16 outputs per row.
    pub(super) out: *mut f32,
    /// From one row's outputs to the next's.
    pub(super) out_stride: usize,
}

/// One group of packed rows.
#[derive(Clone, Copy)]
struct Packed {
    words: *const u32,
    rows: usize,
}

/// Every method's safety: the tile's rows are valid (`TileFn`), `i` < 8 and `r` < rows.
#[allow(unsafe_code)]
impl Packed {
    /// Group `g` of a tile of `rows` rows.
    #[inline(always)]
    unsafe fn group(tile: &Tile, g: usize, rows: usize) -> Self {
        // SAFETY: the caller's promise.
        let words = unsafe { tile.packed.add(g * PACKED_WORDS * rows) };
        Self { words, rows }
    }

    /// Four int8.
    #[inline(always)]
    unsafe fn word(self, i: usize, r: usize) -> i32 {
        // SAFETY: the caller's promise.
        unsafe { self.words.add(i * self.rows + r).read() as i32 }
    }

    /// [`Group::scale`](super::rows::Group::scale).
    #[inline(always)]
    unsafe fn scale(self, r: usize) -> f32 {
        // SAFETY: the caller's promise.
        f32::from_bits(unsafe { self.word(GROUP_WORDS, r) } as u32)
    }

    /// [`Group::scaled_sum`](super::rows::Group::scaled_sum).
    #[inline(always)]
    unsafe fn scaled_sum(self, r: usize) -> f32 {
        // SAFETY: the caller's promise.
        f32::from_bits(unsafe { self.word(GROUP_WORDS + 1, r) } as u32)
    }

    /// What an unsigned dot product starts with to come out as the signed one. (Q6_K needs it per half.)
    #[inline(always)]
    unsafe fn offset(self, kind: PanelKind, r: usize) -> i32 {
        // SAFETY: the caller's promise.
        unsafe {
            match kind {
                PanelKind::Q4_0 => self.word(GROUP_WORDS + 2, r),
                PanelKind::Q5_0 => self.word(GROUP_WORDS + 2, r).wrapping_mul(2),
                PanelKind::Q8_0 => self.word(GROUP_WORDS + 3, r),
                _ => 0,
            }
        }
    }

    /// As `offset`, of either half of a group of Q6_K.
    #[inline(always)]
    unsafe fn half_offset(self, half: usize, r: usize) -> i32 {
        // SAFETY: the caller's promise.
        unsafe { self.word(GROUP_WORDS + 4 + half, r) }
    }
}

/// Computes a tile of as many rows as it was asked for.
///
/// # Safety
/// The CPU has the instruction set; the tile's pointers are valid for the panel, for its rows of k elements (packed as the panel's kind needs
/// them), and for 16 outputs per row, which nobody else touches meanwhile.
pub(super) type TileFn = unsafe fn(&Tile);

/// The kernel for tiles of `rows` rows.
pub(super) fn tile_fn(isa: Isa, kind: PanelKind, rows: usize) -> TileFn {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Bf16 if kind == PanelKind::Bf16 => avx512::bf16_dot_fn(rows),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => avx512::tile_fn(kind, rows),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::tile_fn(kind, rows),
        _ => {
            let _ = rows;
            portable::tile_fn(kind)
        }
    }
}

#[cfg(test)]
mod tests;
