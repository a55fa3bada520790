//! The scalar definition of a tile.
#![allow(unsafe_code)]

use half::f16;

use super::{Q4_0, Q4_1, Q8_0, Tile, TileFn, by_rows};
use crate::cpu::{math::LANES, rows::GROUP, weight::PanelKind};

pub(super) fn tile_fn(kind: PanelKind, rows: usize) -> TileFn {
    match kind {
        PanelKind::Q4_0 => by_rows!(rows, quantised, Q4_0),
        PanelKind::Q4_1 => by_rows!(rows, quantised, Q4_1),
        PanelKind::Q8_0 => by_rows!(rows, quantised, Q8_0),
        PanelKind::F32 => by_rows!(rows, float),
    }
}

unsafe fn quantised<const KIND: u8, const R: usize>(tile: &Tile) {
    let groups = tile.k / GROUP;
    // SAFETY: the caller's promise (`TileFn`): a panel of `shape.bytes`, R rows of k bytes and their groups, 16 outputs per row.
    unsafe {
        let panel = std::slice::from_raw_parts(tile.panel, tile.shape.bytes);
        for r in 0..R {
            let bytes = std::slice::from_raw_parts(tile.bytes.add(r * tile.bytes_stride), tile.k);
            let activations = std::slice::from_raw_parts(tile.groups.add(r * tile.groups_stride), groups);
            let mut acc = [0.0f32; LANES];
            for (g, (bytes, activation)) in bytes.as_chunks::<GROUP>().0.iter().zip(activations).enumerate() {
                let halves = panel[g * tile.shape.scale_stride..].as_chunks::<2>().0;
                let words = panel[tile.shape.quants + g * tile.shape.quants_stride..]
                    .as_chunks::<4>()
                    .0;
                for (lane, acc) in acc.iter_mut().enumerate() {
                    let mut dot = match KIND {
                        Q4_0 => activation.minus_8,
                        Q4_1 => 0,
                        _ => activation.minus_128,
                    };
                    for (k, &byte) in bytes.iter().enumerate() {
                        let weight = if KIND == Q8_0 {
                            words[k / 4 * LANES + lane][k % 4]
                        } else {
                            let pair = words[k / 4 % 4 * LANES + lane][k % 4];
                            if k < GROUP / 2 { pair & 15 } else { pair >> 4 }
                        };
                        dot = dot.wrapping_add(i32::from(weight) * i32::from(byte));
                    }
                    let scale = f16::from_le_bytes(halves[lane]).to_f32() * activation.scale;
                    *acc = scale.mul_add(dot as f32, *acc);
                    if KIND == Q4_1 {
                        let min = f16::from_le_bytes(halves[LANES + lane]).to_f32();
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
