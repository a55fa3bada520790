//! A row of a tensor, as it lies in the file, into a lane of a panel.

use baton_gguf::{QuantGroup, TensorType, unpack};
use half::f16;

use super::{FACTORS, FACTORS_STRIDE, FIFTH_BYTES, PanelKind, PanelShape, SCALE_BYTES, SUPER_GROUPS};
use crate::cpu::{
    math::{LANES, bf16_weight},
    rows::GROUP,
};

/// Puts a row into lane `lane` of the panel `out`, where that lane is zero.
pub(super) fn row(dtype: TensorType, kind: PanelKind, shape: PanelShape, row: &[u8], lane: usize, out: &mut [u8]) {
    match dtype {
        TensorType::F32 => words::<4>(row, lane, out, |word| *word),
        TensorType::F16 => words::<2>(row, lane, out, |half| f16::from_le_bytes(*half).to_f32().to_le_bytes()),
        TensorType::Bf16 => {
            // The last of an odd number is alone, and the panel zero already.
            let (pairs, last) = row.as_chunks::<4>();
            let weight = |low: u8, high: u8| bf16_weight(u16::from_le_bytes([low, high])).to_le_bytes();
            words::<4>(pairs.as_flattened(), lane, out, |&[a, b, c, d]| {
                let ([a, b], [c, d]) = (weight(a, b), weight(c, d));
                [a, b, c, d]
            });
            if let &[low, high] = last {
                out[(pairs.len() * LANES + lane) * 4..][..2].copy_from_slice(&weight(low, high));
            }
        }
        TensorType::Q4_0 => blocks::<18>(shape, row, lane, out, 1, 0),
        TensorType::Q4_1 => blocks::<20>(shape, row, lane, out, 2, 0),
        TensorType::Q8_0 => blocks::<34>(shape, row, lane, out, 1, 0x80),
        dtype => {
            let known = unpack(dtype, row, |index, group| {
                put_group(kind, shape, index, group, lane, out)
            });
            debug_assert!(known, "PanelKind::of refused it");
        }
    }
}

/// A lane's 32 numbers of group `index`.
fn put_group(kind: PanelKind, shape: PanelShape, index: usize, group: &QuantGroup, lane: usize, out: &mut [u8]) {
    let (scales, quants) = shape.group(kind, index);
    out[scales + lane * 2..][..2].copy_from_slice(&group.scale.to_le_bytes());
    if kind.has_min() {
        out[scales + SCALE_BYTES + lane * 2..][..2].copy_from_slice(&group.min.to_le_bytes());
    }
    if kind.super_blocks() {
        for (i, factor) in group.factors.into_iter().enumerate() {
            out[scales + FACTORS + index % SUPER_GROUPS * FACTORS_STRIDE + i * LANES + lane] = factor as u8;
        }
    }
    let high_bytes = kind.high_bytes();
    for (k, &quant) in group.quants.iter().enumerate() {
        let (word, byte) = (k / 4, k % 4);
        let at = |word: usize| quants + (word * LANES + lane) * 4 + byte;
        out[high_bytes + at(word % 4)] |= (quant & 15) << if k < GROUP / 2 { 0 } else { 4 };
        match high_bytes {
            0 => {}
            FIFTH_BYTES => out[at(0)] |= (quant >> 4) << word,
            _ => out[at(word / 4)] |= (quant >> 4) << (2 * (word % 4)),
        }
    }
}

/// A word of the lane for every `N` bytes of the row.
fn words<const N: usize>(row: &[u8], lane: usize, out: &mut [u8], word: impl Fn(&[u8; N]) -> [u8; 4]) {
    for (x, out) in row.as_chunks::<N>().0.iter().zip(out.chunks_exact_mut(LANES * 4)) {
        out[lane * 4..][..4].copy_from_slice(&word(x));
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
