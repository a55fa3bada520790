//! The scalar definition of a tile.
#![allow(unsafe_code)]

use half::f16;

use super::{Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Tile, TileFn, by_kind, by_rows, kind, offset};
use crate::cpu::{
    math::{LANES, from_bf16},
    rows::GROUP,
    weight::{FACTORS, FACTORS_STRIDE, PanelKind, SCALE_BYTES, SUPER_GROUPS, quant},
};

pub(super) fn tile_fn(kind: PanelKind, rows: usize) -> TileFn {
    by_kind!(kind, rows)
}

unsafe fn quantised<const KIND: u8, const R: usize>(tile: &Tile) {
    let kind = const { kind(KIND) };
    let groups = tile.k / GROUP;
    // SAFETY: the caller's promise (`TileFn`): a panel of `shape.bytes`, R rows of k bytes and their groups, 16 outputs per row.
    unsafe {
        let panel = std::slice::from_raw_parts(tile.panel, tile.shape.bytes);
        for r in 0..R {
            let bytes = std::slice::from_raw_parts(tile.bytes.add(r * tile.bytes_stride), tile.k);
            let activations = std::slice::from_raw_parts(tile.groups.add(r * tile.groups_stride), groups);
            let mut acc = [0.0f32; LANES];
            for (g, (bytes, activation)) in bytes.as_chunks::<GROUP>().0.iter().zip(activations).enumerate() {
                let (scales, quants) = tile.shape.group(kind, g);
                let (scales, quants) = (&panel[scales..], &panel[quants..]);
                let half = |at: usize| f16::from_le_bytes([scales[at], scales[at + 1]]).to_f32();
                for (lane, acc) in acc.iter_mut().enumerate() {
                    let factor =
                        |i: usize| scales[FACTORS + g % SUPER_GROUPS * FACTORS_STRIDE + i * LANES + lane] as i8;
                    let dot = |range: std::ops::Range<usize>, start: i32| {
                        range.fold(start, |dot, k| {
                            dot.wrapping_add(i32::from(quant(kind, quants, lane, k)) * i32::from(bytes[k]))
                        })
                    };
                    let mut scale = half(lane * 2);
                    let mut min = if kind.has_min() {
                        half(SCALE_BYTES + lane * 2)
                    } else {
                        0.0
                    };
                    if matches!(kind, PanelKind::Q4K | PanelKind::Q5K) {
                        scale *= f32::from(factor(0));
                        min *= -f32::from(factor(1));
                    }
                    let dot = if kind == PanelKind::Q6K {
                        let part = |i: usize| {
                            let range = i * GROUP / 2..(i + 1) * GROUP / 2;
                            let sum: i32 = bytes[range.clone()].iter().map(|&byte| i32::from(byte)).sum();
                            i32::from(factor(i)) * dot(range, -32 * sum)
                        };
                        part(0) + part(1)
                    } else {
                        dot(0..GROUP, offset(kind, activation))
                    };
                    *acc = (scale * activation.scale).mul_add(dot as f32, *acc);
                    if kind.has_min() {
                        *acc = min.mul_add(activation.scaled_sum, *acc);
                    }
                }
            }
            tile.out.add(r * tile.out_stride).cast::<[f32; LANES]>().write(acc);
        }
    }
}

unsafe fn float<const R: usize>(tile: &Tile) {
    // SAFETY: as in `quantised`, with rows of k floats.
    unsafe {
        let panel = std::slice::from_raw_parts(tile.panel.cast::<[f32; LANES]>(), tile.k);
        for r in 0..R {
            let x = std::slice::from_raw_parts(tile.x.add(r * tile.x_stride), tile.k);
            let mut acc = [0.0f32; LANES];
            for (weights, &x) in panel.iter().zip(x) {
                for (acc, &weight) in acc.iter_mut().zip(weights) {
                    *acc = weight.mul_add(x, *acc);
                }
            }
            tile.out.add(r * tile.out_stride).cast::<[f32; LANES]>().write(acc);
        }
    }
}

unsafe fn bf16<const R: usize>(tile: &Tile) {
    // SAFETY: as in `float`; the panel has ceil(k / 2) words per lane.
    unsafe {
        let panel = std::slice::from_raw_parts(tile.panel.cast::<[[u16; 2]; LANES]>(), tile.k.div_ceil(2));
        for r in 0..R {
            let x = std::slice::from_raw_parts(tile.x.add(r * tile.x_stride), tile.k);
            let mut acc = [0.0f32; LANES];
            for (words, x) in panel.iter().zip(x.chunks(2)) {
                for (half, &x) in x.iter().enumerate() {
                    for (acc, word) in acc.iter_mut().zip(words) {
                        *acc = from_bf16(u16::from_le(word[half])).mul_add(x, *acc);
                    }
                }
            }
            tile.out.add(r * tile.out_stride).cast::<[f32; LANES]>().write(acc);
        }
    }
}
