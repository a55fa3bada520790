//! Matrices in panels of 16 output rows, interleaved so that one vector lane is one output row.
//!
//! A panel of a quantised type holds, per 32 of k: `scale[16]` and (Q4_1) `min[16]` as f16 bits, and 256 bytes of nibbles or 512 bytes.
//! Quants are groups of four of k: word `[g][lane]` holds k = 4g..4g+4 of that row, unsigned (Q8_0 + 128). A nibble word `[g][lane]`, g < 4, holds
//! groups g (low) and g + 4 (high). A panel of floats is `[k][16]` of f32.
#![allow(unsafe_code)]

use baton_gguf::{Tensor, TensorType};
use half::{bf16, f16};

use super::{
    alloc::{Aligned, OutOfMemory},
    builder::LoadError,
    math::LANES,
    rows::GROUP,
};

/// How a panel's numbers are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PanelKind {
    Q4_0,
    Q4_1,
    Q8_0,
    F32,
}

/// Where things lie in a panel, bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct PanelShape {
    /// From one group's scales to the next's; minimums follow their scales.
    pub(super) scale_stride: usize,
    /// First quants.
    pub(super) quants: usize,
    /// From one group's quants to the next's.
    pub(super) quants_stride: usize,
    /// The whole panel.
    pub(super) bytes: usize,
}

const SCALE_BYTES: usize = LANES * 2;

impl PanelKind {
    fn of(dtype: TensorType) -> Option<Self> {
        Some(match dtype {
            TensorType::Q4_0 => Self::Q4_0,
            TensorType::Q4_1 => Self::Q4_1,
            TensorType::Q8_0 => Self::Q8_0,
            TensorType::F32 | TensorType::F16 | TensorType::Bf16 => Self::F32,
            _ => return None,
        })
    }

    pub(super) fn quantised(self) -> bool {
        self != Self::F32
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
        match self {
            Self::Q4_0 => apart(256),
            Self::Q8_0 => apart(512),
            Self::Q4_1 => PanelShape {
                scale_stride: 320,
                quants: 64,
                quants_stride: 320,
                bytes: groups * 320,
            },
            Self::F32 => PanelShape {
                scale_stride: 0,
                quants: 0,
                quants_stride: 0,
                bytes: k * LANES * 4,
            },
        }
    }
}

/// Consecutive panels of one kind.
pub(super) struct Segment {
    pub(super) kind: PanelKind,
    pub(super) shape: PanelShape,
    /// Panels.
    pub(super) panels: usize,
    bytes: Aligned<u8>,
}

impl Segment {
    /// Start of a panel, on a cache line.
    pub(super) fn panel(&self, index: usize) -> *const u8 {
        assert!(index < self.panels, "panel outside its segment");
        // SAFETY: the allocation holds `panels` panels.
        unsafe { self.bytes.as_ptr().add(index * self.shape.bytes) }
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
    /// Repacks `parts`, stacked along n.
    pub(super) fn repack(parts: &[Tensor<'_>]) -> Result<Self, LoadError> {
        let Some((last, before)) = parts.split_last() else {
            return Err(LoadError::Config("a matrix needs at least one tensor".into()));
        };
        let k = last.columns;
        for part in before {
            if part.columns != k {
                return Err(shape_error(
                    part,
                    format!("has {} columns where '{}' has {k}", part.columns, last.name),
                ));
            }
            if !part.rows.is_multiple_of(LANES) {
                return Err(shape_error(
                    part,
                    format!("{} rows are not a multiple of {LANES}", part.rows),
                ));
            }
        }
        let segments = parts.iter().map(repack_segment).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            n: parts.iter().map(|part| part.rows).sum(),
            k,
            segments,
        })
    }

    pub(super) fn panels(&self) -> usize {
        self.segments.iter().map(|segment| segment.panels).sum()
    }

    pub(super) fn quantised(&self) -> bool {
        self.segments.iter().any(|segment| segment.kind.quantised())
    }

    pub(super) fn bytes(&self) -> usize {
        self.segments.iter().map(|segment| segment.bytes.len()).sum()
    }

    /// Row `row` as f32: what the stored type says, each operation rounded to f32.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n && out.len() == self.k, "row outside the matrix");
        let (mut panel, lane) = (row / LANES, row % LANES);
        for segment in &self.segments {
            if panel < segment.panels {
                return segment.row(panel, lane, out);
            }
            panel -= segment.panels;
        }
    }
}

impl Segment {
    fn row(&self, panel: usize, lane: usize, out: &mut [f32]) {
        let shape = self.shape;
        let bytes = &self.bytes.as_slice()[panel * shape.bytes..][..shape.bytes];
        if self.kind == PanelKind::F32 {
            for (out, k) in out.iter_mut().zip(bytes.chunks_exact(LANES * 4)) {
                *out = f32::from_le_bytes(k.as_chunks().0[lane]);
            }
            return;
        }
        for (group, out) in out.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let halves = bytes[group * shape.scale_stride..].as_chunks::<2>().0;
            let scale = f16::from_le_bytes(halves[lane]).to_f32();
            let words = bytes[shape.quants + group * shape.quants_stride..].as_chunks::<4>().0;
            for (k, out) in out.iter_mut().enumerate() {
                let nibble = || {
                    let byte = words[(k / 4 % 4) * LANES + lane][k % 4];
                    f32::from(if k < GROUP / 2 { byte & 15 } else { byte >> 4 })
                };
                *out = match self.kind {
                    PanelKind::Q4_0 => (nibble() - 8.0) * scale,
                    PanelKind::Q4_1 => nibble() * scale + f16::from_le_bytes(halves[LANES + lane]).to_f32(),
                    PanelKind::Q8_0 => (f32::from(words[(k / 4) * LANES + lane][k % 4]) - 128.0) * scale,
                    PanelKind::F32 => unreachable!("returned above"),
                };
            }
        }
    }
}

/// One tensor; missing rows of the last panel are zero.
fn repack_segment(tensor: &Tensor<'_>) -> Result<Segment, LoadError> {
    let unsupported = || LoadError::Type {
        name: tensor.name.into(),
        dtype: tensor.dtype,
    };
    let kind = PanelKind::of(tensor.dtype).ok_or_else(unsupported)?;
    let k = tensor.columns;
    if k == 0 || tensor.rows == 0 {
        return Err(shape_error(tensor, "is empty"));
    }
    let row_bytes = tensor
        .dtype
        .row_bytes(k)
        .ok_or_else(|| shape_error(tensor, format!("{k} columns are not whole groups of {GROUP}")))?;
    if row_bytes.checked_mul(tensor.rows) != Some(tensor.bytes.len()) {
        return Err(shape_error(
            tensor,
            format!("holds {} bytes, not what its shape says", tensor.bytes.len()),
        ));
    }
    let shape = kind.shape(k);
    let panels = tensor.rows.div_ceil(LANES);
    let total = panels
        .checked_mul(shape.bytes)
        .ok_or(OutOfMemory { bytes: usize::MAX })?;
    let mut bytes = Aligned::zeroed(total)?;
    for (panel, out) in bytes.as_mut_slice().chunks_exact_mut(shape.bytes).enumerate() {
        for lane in 0..LANES.min(tensor.rows - panel * LANES) {
            let row = &tensor.bytes[(panel * LANES + lane) * row_bytes..][..row_bytes];
            repack_row(tensor.dtype, shape, row, lane, out);
        }
    }
    Ok(Segment {
        kind,
        shape,
        panels,
        bytes,
    })
}

fn repack_row(dtype: TensorType, shape: PanelShape, row: &[u8], lane: usize, out: &mut [u8]) {
    match dtype {
        TensorType::F32 => floats(row, lane, out, f32::from_le_bytes),
        TensorType::F16 => floats(row, lane, out, |b| f16::from_le_bytes(b).to_f32()),
        TensorType::Bf16 => floats(row, lane, out, |b| bf16::from_le_bytes(b).to_f32()),
        TensorType::Q4_0 => blocks::<18>(shape, row, lane, out, 1, 0),
        TensorType::Q4_1 => blocks::<20>(shape, row, lane, out, 2, 0),
        TensorType::Q8_0 => blocks::<34>(shape, row, lane, out, 1, 0x80),
        _ => unreachable!("PanelKind::of refused it"),
    }
}

fn floats<const N: usize>(row: &[u8], lane: usize, out: &mut [u8], convert: impl Fn([u8; N]) -> f32) {
    for (&x, out) in row.as_chunks::<N>().0.iter().zip(out.chunks_exact_mut(LANES * 4)) {
        out[lane * 4..][..4].copy_from_slice(&convert(x).to_le_bytes());
    }
}

/// Blocks of `halves` f16 and then quants, four bytes of which make one word; `flip` makes signed bytes unsigned.
fn blocks<const N: usize>(shape: PanelShape, row: &[u8], lane: usize, out: &mut [u8], halves: usize, flip: u8) {
    for (group, block) in row.as_chunks::<N>().0.iter().enumerate() {
        let (scales, quants) = block.split_at(halves * 2);
        for (i, half) in scales.as_chunks::<2>().0.iter().enumerate() {
            out[group * shape.scale_stride + i * SCALE_BYTES + lane * 2..][..2].copy_from_slice(half);
        }
        for (word, quants) in quants.as_chunks::<4>().0.iter().enumerate() {
            let at = shape.quants + group * shape.quants_stride + (word * LANES + lane) * 4;
            out[at..][..4].copy_from_slice(&quants.map(|byte| byte ^ flip));
        }
    }
}

#[cfg(test)]
mod tests;
