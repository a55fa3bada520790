//! Attention of one row's query heads that share a KV head, one KV tile of 32 tokens at a time.
//!
//! Per query head and tile, over the tile's first `tokens` keys:
//! - `score = q · k * scale`: fma on 16 lanes in ascending dimension, then the tree sum;
//! - online softmax: `m' = max(m, scores)`, `correction = exp(m - m')`, `p = exp(score - m')`, `sum = fma(sum, correction, tree(p[l] + p[l + 16]))`;
//! - per dimension: `acc *= correction`, then `acc = fma(p, v, acc)` in ascending token.
//!
//! At the end `out = acc * (1 / sum)`. A decode row and the same row of a prefill go through the same tiles, hence are bit-equal.
#![allow(unsafe_code)]

use super::isa::Isa;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

/// Tokens of a KV tile.
pub(super) const TILE: usize = 32;

/// Softmax so far, of one query head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Running {
    pub(super) max: f32,
    pub(super) sum: f32,
}

impl Running {
    pub(super) const START: Self = Self {
        max: f32::NEG_INFINITY,
        sum: 0.0,
    };
}

/// One row's query heads against one tile.
#[derive(Clone, Copy)]
pub(super) struct TileStep {
    /// `[heads, head_dim]`.
    pub(super) queries: *const f32,
    pub(super) heads: usize,
    /// Multiple of 16.
    pub(super) head_dim: usize,
    /// `1 / sqrt(head_dim)`.
    pub(super) scale: f32,
    /// `[TILE, head_dim]`, of which the first `tokens` count; the rest is any numbers.
    pub(super) keys: *const f32,
    /// As `keys`.
    pub(super) values: *const f32,
    /// 1..=[`TILE`].
    pub(super) tokens: usize,
    /// `[heads]`.
    pub(super) running: *mut Running,
    /// `[heads, head_dim]`.
    pub(super) acc: *mut f32,
}

/// Takes one tile into `running` and `acc`.
///
/// # Safety
/// The CPU has the instruction set, and the step's pointers are valid for the shapes named in [`TileStep`].
pub(super) type StepFn = unsafe fn(&TileStep);

pub(super) fn step_fn(isa: Isa) -> StepFn {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::step,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::step,
        _ => portable::step,
    }
}

#[cfg(test)]
mod tests;
