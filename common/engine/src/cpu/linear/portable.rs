//! The scalar definition of a tile.
#![allow(unsafe_code)]

use half::f16;

use super::{Packed, Tile, TileFn};
use crate::cpu::{
    math::{LANES, from_bf16},
    rows::GROUP,
    weight::{FACTORS, FACTORS_STRIDE, PanelKind, SCALE_BYTES, SUPER_GROUPS, quant},
};

pub(super) fn tile_fn(kind: PanelKind) -> TileFn {
    match kind {
        PanelKind::Q4_0 => |tile| quantised(PanelKind::Q4_0, tile),
        PanelKind::Q4_1 => |tile| quantised(PanelKind::Q4_1, tile),
        PanelKind::Q5_0 => |tile| quantised(PanelKind::Q5_0, tile),
        PanelKind::Q5_1 => |tile| quantised(PanelKind::Q5_1, tile),
        PanelKind::Q8_0 => |tile| quantised(PanelKind::Q8_0, tile),
        PanelKind::Q4K => |tile| quantised(PanelKind::Q4K, tile),
        PanelKind::Q5K => |tile| quantised(PanelKind::Q5K, tile),
        PanelKind::Q6K => |tile| quantised(PanelKind::Q6K, tile),
        PanelKind::Bf16 => bf16,
        PanelKind::F32 => float,
    }
}

#[inline(always)]
fn quantised(kind: PanelKind, tile: &Tile) {
    // SAFETY: the caller's promise (`TileFn`): a panel of `shape.bytes`, packed rows of k numbers, 16 outputs per row.
    unsafe {
        let panel = std::slice::from_raw_parts(tile.panel, tile.shape.bytes);
        for r in 0..tile.rows {
            let mut acc = [0.0f32; LANES];
            for g in 0..tile.k / GROUP {
                let packed = Packed::group(tile, g, tile.rows);
                let mut bytes = [0i8; GROUP];
                for (i, bytes) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    *bytes = packed.word(i, r).to_le_bytes().map(|byte| byte as i8);
                }
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
                            i32::from(factor(i)).wrapping_mul(dot(range, packed.half_offset(i, r)))
                        };
                        part(0).wrapping_add(part(1))
                    } else {
                        dot(0..GROUP, packed.offset(kind, r))
                    };
                    *acc = (scale * packed.scale(r)).mul_add(dot as f32, *acc);
                    if kind.has_min() {
                        *acc = min.mul_add(packed.scaled_sum(r), *acc);
                    }
                }
            }
            tile.out.add(r * tile.out_stride).cast::<[f32; LANES]>().write(acc);
        }
    }
}

unsafe fn float(tile: &Tile) {
    // SAFETY: as in `quantised`, with packed rows of k floats.
    unsafe {
        let panel = std::slice::from_raw_parts(tile.panel.cast::<[f32; LANES]>(), tile.k);
        let packed = std::slice::from_raw_parts(tile.packed.cast::<f32>(), tile.k * tile.rows);
        for r in 0..tile.rows {
            let mut acc = [0.0f32; LANES];
            for (weights, rows) in panel.iter().zip(packed.chunks_exact(tile.rows)) {
                for (acc, &weight) in acc.iter_mut().zip(weights) {
                    *acc = weight.mul_add(rows[r], *acc);
                }
            }
            tile.out.add(r * tile.out_stride).cast::<[f32; LANES]>().write(acc);
        }
    }
}

unsafe fn bf16(tile: &Tile) {
    // SAFETY: as in `float`; panel and rows have ceil(k / 2) pairs.
    unsafe {
        let pairs = tile.k.div_ceil(2);
        let panel = std::slice::from_raw_parts(tile.panel.cast::<[[u16; 2]; LANES]>(), pairs);
        let packed = std::slice::from_raw_parts(tile.packed.cast::<f32>(), 2 * pairs * tile.rows);
        for r in 0..tile.rows {
            let mut acc = [0.0f32; LANES];
            for (words, rows) in panel.iter().zip(packed.chunks_exact(2 * tile.rows)) {
                for (acc, &[even, odd]) in acc.iter_mut().zip(words) {
                    *acc = from_bf16(u16::from_le(odd)).mul_add(rows[tile.rows + r], *acc);
                    *acc = from_bf16(u16::from_le(even)).mul_add(rows[r], *acc);
                }
            }
            tile.out.add(r * tile.out_stride).cast::<[f32; LANES]>().write(acc);
        }
    }
}
