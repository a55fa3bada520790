//! Tiles with AVX-512 VNNI: a lane of a zmm register is an output row.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

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

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn quantised<const KIND: u8, const R: usize>(tile: &Tile) {
    // SAFETY: the caller's promise (`TileFn`) covers every address: panel, R rows of k bytes and k / 32 groups, 16 outputs per row.
    unsafe {
        let nibble = _mm512_set1_epi8(15);
        let mut acc = [_mm512_setzero_ps(); R];
        for g in 0..tile.k / GROUP {
            let scales = tile.panel.add(g * tile.shape.scale_stride);
            let quants = tile
                .panel
                .add(tile.shape.quants + g * tile.shape.quants_stride)
                .cast::<__m512i>();
            let mut weights = [_mm512_setzero_si512(); 8];
            if KIND == Q8_0 {
                for (i, weights) in weights.iter_mut().enumerate() {
                    *weights = _mm512_load_si512(quants.add(i));
                }
            } else {
                for i in 0..4 {
                    let pairs = _mm512_load_si512(quants.add(i));
                    weights[i] = _mm512_and_si512(pairs, nibble);
                    weights[i + 4] = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble);
                }
            }
            let scale = _mm512_cvtph_ps(_mm256_load_si256(scales.cast()));
            let min = if KIND == Q4_1 {
                _mm512_cvtph_ps(_mm256_load_si256(scales.add(2 * LANES).cast()))
            } else {
                _mm512_setzero_ps()
            };
            for (r, acc) in acc.iter_mut().enumerate() {
                let words = tile.bytes.add(r * tile.bytes_stride + g * GROUP).cast::<i32>();
                let group = &*tile.groups.add(r * tile.groups_stride + g);
                let mut dot = match KIND {
                    Q4_0 => _mm512_set1_epi32(group.minus_8),
                    Q4_1 => _mm512_setzero_si512(),
                    _ => _mm512_set1_epi32(group.minus_128),
                };
                for (i, &weights) in weights.iter().enumerate() {
                    dot = _mm512_dpbusd_epi32(dot, weights, _mm512_set1_epi32(words.add(i).read_unaligned()));
                }
                let both = _mm512_mul_ps(scale, _mm512_set1_ps(group.scale));
                *acc = _mm512_fmadd_ps(both, _mm512_cvtepi32_ps(dot), *acc);
                if KIND == Q4_1 {
                    *acc = _mm512_fmadd_ps(min, _mm512_set1_ps(group.scaled_sum), *acc);
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            _mm512_storeu_ps(tile.out.add(r * tile.out_stride), acc);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn float<const R: usize>(tile: &Tile) {
    // SAFETY: as in `quantised`, with rows of k floats.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); R];
        for k in 0..tile.k {
            let weights = _mm512_load_ps(tile.panel.cast::<f32>().add(k * LANES));
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = _mm512_fmadd_ps(weights, _mm512_set1_ps(*tile.x.add(r * tile.x_stride + k)), *acc);
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            _mm512_storeu_ps(tile.out.add(r * tile.out_stride), acc);
        }
    }
}
