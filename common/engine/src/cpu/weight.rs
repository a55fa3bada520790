//! Matrices in panels of 16 output rows, interleaved so that one vector lane is one output row.
//!
//! A panel of a quantised type holds, per group of 32 of k, scales of 16 rows and quants of 16 rows. Quants are unsigned, in groups of four of k: word
//! `[i][lane]` holds k = 4i..4i+4 of that row, one in each byte.
//! - Bytes (Q8_0, 128 added): words i = 0..8.
//! - Nibbles: word i < 4 holds words i (low nibbles) and i + 4 (high).
//! - Fifth bits (Q5) lie before the nibbles: one word per lane, in whose byte j bit i is that of k = 4i + j.
//! - Fifth and sixth bits (Q6_K), before the nibbles: word `[i / 4][lane]`, in whose byte j bits 2(i % 4).. are those of k = 4i + j.
//!
//! Scales are as exact as the file's: f16 `scale[16]`, then `min[16]` where the type has one. K types have super-blocks of eight groups, each headed by
//! f16 `scale[16]` and `min[16]` and then, per group, two bytes per row, `[2][16]`: the factors of scale and minimum (Q4_K, Q5_K), or of the scale in
//! either half of the group (Q6_K). Nothing is rounded.
//!
//! A panel of floats is `[k][16]` of f32; of bf16, `[k / 2][16]` of words, the even k in the low half, the odd one, or zero after the last, in the high,
//! without tiny numbers (why: `linear`).
#![allow(unsafe_code)]

use std::sync::Arc;

use baton_gguf::{Tensor, TensorType};
use half::f16;

use super::{
    activations::Form,
    alloc::Aligned,
    builder::LoadError,
    math::{LANES, from_bf16},
    rows::GROUP,
};

mod plan;
mod repack;

pub(crate) use plan::Loading;
pub(super) use plan::WeightPlan;

/// How a panel's numbers are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PanelKind {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
    Bf16,
    F32,
}

/// Where things lie in a panel, bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct PanelShape {
    /// From one group's scales to the next's, or one super-block's to the next's.
    pub(super) scale_stride: usize,
    /// First quants, of the panel or of a super-block.
    pub(super) quants: usize,
    /// From one group's quants to the next's.
    pub(super) quants_stride: usize,
    /// The whole panel.
    pub(super) bytes: usize,
}

/// f16 of every lane.
pub(super) const SCALE_BYTES: usize = LANES * 2;
/// Groups of a super-block.
pub(super) const SUPER_GROUPS: usize = 8;
/// Of a super-block: the first group's factors.
pub(super) const FACTORS: usize = 2 * SCALE_BYTES;
/// From one group's factors to the next's.
pub(super) const FACTORS_STRIDE: usize = 2 * LANES;
/// Of a super-block: the first group's quants. Five cache lines.
const SUPER_HEADER: usize = FACTORS + SUPER_GROUPS * FACTORS_STRIDE;
/// Fifth bits of a group's quants.
const FIFTH_BYTES: usize = LANES * 4;

impl PanelShape {
    /// Where group `g` has its scales (of a super-block: those of the block) and its quants.
    #[inline(always)]
    pub(super) fn group(&self, kind: PanelKind, g: usize) -> (usize, usize) {
        if kind.super_blocks() {
            let start = g / SUPER_GROUPS * self.scale_stride;
            (start, start + self.quants + g % SUPER_GROUPS * self.quants_stride)
        } else {
            (g * self.scale_stride, self.quants + g * self.quants_stride)
        }
    }
}

impl PanelKind {
    fn of(dtype: TensorType) -> Option<Self> {
        Some(match dtype {
            TensorType::Q4_0 => Self::Q4_0,
            TensorType::Q4_1 => Self::Q4_1,
            TensorType::Q5_0 => Self::Q5_0,
            TensorType::Q5_1 => Self::Q5_1,
            TensorType::Q8_0 => Self::Q8_0,
            TensorType::Q4K => Self::Q4K,
            TensorType::Q5K => Self::Q5K,
            TensorType::Q6K => Self::Q6K,
            TensorType::Bf16 => Self::Bf16,
            TensorType::F32 | TensorType::F16 => Self::F32,
            TensorType::Other(_) => return None,
        })
    }

    /// What it is multiplied with.
    #[inline(always)]
    pub(super) fn form(self) -> Form {
        match self {
            Self::Bf16 => Form::Bf16,
            Self::F32 => Form::Float,
            _ => Form::Quantised,
        }
    }

    /// Whether groups lie in super-blocks of eight.
    #[inline(always)]
    pub(super) const fn super_blocks(self) -> bool {
        matches!(self, Self::Q4K | Self::Q5K | Self::Q6K)
    }

    /// Bytes of a group's bits above its nibbles, which they precede.
    #[inline(always)]
    pub(super) const fn high_bytes(self) -> usize {
        match self {
            Self::Q5_0 | Self::Q5_1 | Self::Q5K => FIFTH_BYTES,
            Self::Q6K => 2 * FIFTH_BYTES,
            Self::Q4_0 | Self::Q4_1 | Self::Q8_0 | Self::Q4K | Self::Bf16 | Self::F32 => 0,
        }
    }

    /// Cache lines from one group to the next, not counting what scales lie elsewhere.
    #[cfg(any(test, target_arch = "x86_64"))]
    pub(super) const fn group_lines(self) -> usize {
        let quants = match self {
            Self::Q8_0 => 512,
            _ => 256 + self.high_bytes(),
        };
        let scales = match self {
            Self::Q4_1 | Self::Q5_1 => 64,
            _ => 0,
        };
        (quants + scales) / 64
    }

    /// Whether a minimum is added to a row's scaled quants (subtracted, in super-blocks).
    #[inline(always)]
    pub(super) const fn has_min(self) -> bool {
        matches!(self, Self::Q4_1 | Self::Q5_1 | Self::Q4K | Self::Q5K)
    }

    /// The panel of `k` columns. Every group of quants starts on a cache line.
    pub(super) fn shape(self, k: usize) -> PanelShape {
        let groups = k / GROUP;
        let apart = |quants_stride: usize| {
            let quants = (groups * SCALE_BYTES).next_multiple_of(64);
            PanelShape {
                scale_stride: SCALE_BYTES,
                quants,
                quants_stride,
                bytes: quants + groups * quants_stride,
            }
        };
        let together = |quants_stride: usize| PanelShape {
            scale_stride: 64 + quants_stride,
            quants: 64,
            quants_stride: 64 + quants_stride,
            bytes: groups * (64 + quants_stride),
        };
        let in_super_blocks = |quants_stride: usize| {
            let block = SUPER_HEADER + SUPER_GROUPS * quants_stride;
            PanelShape {
                scale_stride: block,
                quants: SUPER_HEADER,
                quants_stride,
                bytes: groups / SUPER_GROUPS * block,
            }
        };
        let floats = |words: usize| PanelShape {
            scale_stride: 0,
            quants: 0,
            quants_stride: 0,
            bytes: words * LANES * 4,
        };
        match self {
            Self::Q4_0 => apart(256),
            Self::Q5_0 => apart(FIFTH_BYTES + 256),
            Self::Q8_0 => apart(512),
            Self::Q4_1 => together(256),
            Self::Q5_1 => together(FIFTH_BYTES + 256),
            Self::Q4K => in_super_blocks(256),
            Self::Q5K => in_super_blocks(FIFTH_BYTES + 256),
            Self::Q6K => in_super_blocks(2 * FIFTH_BYTES + 256),
            Self::Bf16 => floats(k.div_ceil(2)),
            Self::F32 => floats(k),
        }
    }
}

/// Consecutive panels of one kind.
pub(super) struct Segment {
    pub(super) kind: PanelKind,
    pub(super) shape: PanelShape,
    /// Panels.
    pub(super) panels: usize,
    /// All weights; these panels from `start` on.
    memory: Arc<Aligned<u8>>,
    start: usize,
}

impl Segment {
    /// Start of a panel, on a cache line.
    pub(super) fn panel(&self, index: usize) -> *const u8 {
        assert!(index < self.panels, "panel outside its segment");
        // SAFETY: the allocation holds `panels` panels from `start` on.
        unsafe { self.memory.as_ptr().add(self.start + index * self.shape.bytes) }
    }

    /// Bytes of its panels.
    fn bytes(&self) -> &[u8] {
        &self.memory.as_slice()[self.start..][..self.panels * self.shape.bytes]
    }
}

/// A matrix `[n, k]`, perhaps stacked of several.
pub(super) struct Matrix {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) segments: Vec<Segment>,
}

fn shape_error(tensor: &Tensor<'_>, problem: impl Into<String>) -> LoadError {
    LoadError::Shape {
        name: tensor.name.into(),
        problem: problem.into(),
    }
}

impl Matrix {
    /// Repacks `parts` alone, stacked along n.
    #[cfg(test)]
    pub(super) fn repack(parts: &[Tensor<'_>]) -> Result<Self, LoadError> {
        let mut plan = WeightPlan::default();
        plan.add(parts)?;
        let loading = Loading {
            cache: None,
            threads: 2,
            report: &|_| {},
        };
        Ok(plan.load(loading)?.remove(0))
    }

    pub(super) fn panels(&self) -> usize {
        self.segments.iter().map(|segment| segment.panels).sum()
    }

    /// A panel: its segment, and its number there.
    #[inline(always)]
    pub(super) fn panel(&self, mut panel: usize) -> (&Segment, usize) {
        for segment in &self.segments {
            if panel < segment.panels {
                return (segment, panel);
            }
            panel -= segment.panels;
        }
        panic!("panel outside the matrix");
    }

    /// Bytes of the widest panel; at least 1.
    pub(super) fn widest_panel(&self) -> usize {
        self.segments
            .iter()
            .map(|segment| segment.shape.bytes)
            .max()
            .unwrap_or(1)
    }

    /// Whether any of it takes activations in this form.
    pub(super) fn takes(&self, form: Form) -> bool {
        self.segments.iter().any(|segment| segment.kind.form() == form)
    }

    /// Row `row` as f32: what the stored type says (of bf16 without tiny numbers), each operation rounded to f32.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n && out.len() == self.k, "row outside the matrix");
        let (segment, panel) = self.panel(row / LANES);
        segment.row(panel, row % LANES, out);
    }
}

impl Segment {
    fn row(&self, panel: usize, lane: usize, out: &mut [f32]) {
        let shape = self.shape;
        let bytes = &self.bytes()[panel * shape.bytes..][..shape.bytes];
        let words = bytes.chunks_exact(LANES * 4);
        match self.kind {
            PanelKind::F32 => {
                for (out, word) in out.iter_mut().zip(words) {
                    *out = f32::from_le_bytes(word.as_chunks().0[lane]);
                }
            }
            PanelKind::Bf16 => {
                for (out, word) in out.chunks_mut(2).zip(words) {
                    let (pair, _) = word[lane * 4..][..4].as_chunks();
                    for (out, &half) in out.iter_mut().zip(pair) {
                        *out = from_bf16(u16::from_le_bytes(half));
                    }
                }
            }
            _ => self.quantised_row(bytes, lane, out),
        }
    }

    fn quantised_row(&self, bytes: &[u8], lane: usize, out: &mut [f32]) {
        let shape = self.shape;
        for (group, out) in out.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let (scales, quants) = shape.group(self.kind, group);
            let half =
                |at: usize| f16::from_le_bytes([bytes[scales + at + lane * 2], bytes[scales + at + lane * 2 + 1]]);
            let (scale, min) = (
                half(0).to_f32(),
                if self.kind.has_min() {
                    half(SCALE_BYTES).to_f32()
                } else {
                    0.0
                },
            );
            let factor = |i: usize| {
                f32::from(bytes[scales + FACTORS + group % SUPER_GROUPS * FACTORS_STRIDE + i * LANES + lane] as i8)
            };
            for (k, out) in out.iter_mut().enumerate() {
                let quant = f32::from(quant(self.kind, &bytes[quants..], lane, k));
                *out = match self.kind {
                    PanelKind::Q4_0 => (quant - 8.0) * scale,
                    PanelKind::Q5_0 => (quant - 16.0) * scale,
                    PanelKind::Q8_0 => (quant - 128.0) * scale,
                    PanelKind::Q4_1 | PanelKind::Q5_1 => quant * scale + min,
                    PanelKind::Q4K | PanelKind::Q5K => quant * (scale * factor(0)) - min * factor(1),
                    PanelKind::Q6K => (quant - 32.0) * (scale * factor(k / (GROUP / 2))),
                    PanelKind::Bf16 | PanelKind::F32 => unreachable!("not quantised"),
                };
            }
        }
    }
}

/// Quant `k` (of 32) of a lane, unsigned, from a group's quants.
#[inline(always)]
pub(super) fn quant(kind: PanelKind, quants: &[u8], lane: usize, k: usize) -> u8 {
    let (word, byte) = (k / 4, k % 4);
    let at = |word: usize| (word * LANES + lane) * 4 + byte;
    if kind == PanelKind::Q8_0 {
        return quants[at(word)];
    }
    let pair = quants[kind.high_bytes() + at(word % 4)];
    let nibble = if k < GROUP / 2 { pair & 15 } else { pair >> 4 };
    match kind {
        PanelKind::Q5_0 | PanelKind::Q5_1 | PanelKind::Q5K => nibble | (quants[at(0)] >> word & 1) << 4,
        PanelKind::Q6K => nibble | (quants[at(word / 4)] >> (2 * (word % 4)) & 3) << 4,
        _ => nibble,
    }
}

#[cfg(test)]
mod tests;
