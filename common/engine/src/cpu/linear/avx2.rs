//! Tiles with AVX2: 16 lanes as two halves of 8.
//!
//! `vpmaddubsw` adds two products in 16 bits and saturates. Nibbles cannot: eight sums of 2 × 15 × 127 stay below 2^15, so a whole group is added in 16
//! bits. Bytes are made signed again and their sign moved to the activation: 2 × 128 × 127 stays below 2^15.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{Q4_0, Q4_1, Q8_0, Tile, TileFn, by_rows};
use crate::cpu::{math::LANES, rows::GROUP, weight::PanelKind};

/// Lanes of a ymm register.
const HALF: usize = 8;

pub(super) fn tile_fn(kind: PanelKind, rows: usize) -> TileFn {
    match kind {
        PanelKind::Q4_0 => by_rows!(rows, quantised, Q4_0),
        PanelKind::Q4_1 => by_rows!(rows, quantised, Q4_1),
        PanelKind::Q8_0 => by_rows!(rows, quantised, Q8_0),
        PanelKind::F32 => by_rows!(rows, float),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantised<const KIND: u8, const R: usize>(tile: &Tile) {
    // SAFETY: the caller's promise (`TileFn`) covers every address: panel, R rows of k bytes and k / 32 groups, 16 outputs per row.
    unsafe {
        let nibble = _mm256_set1_epi8(15);
        let ones = _mm256_set1_epi16(1);
        for half in 0..2 {
            let mut acc = [_mm256_setzero_ps(); R];
            for g in 0..tile.k / GROUP {
                let scales = tile.panel.add(g * tile.shape.scale_stride + half * HALF * 2);
                let quants = tile
                    .panel
                    .add(tile.shape.quants + g * tile.shape.quants_stride + half * HALF * 4);
                let word = |i: usize| _mm256_load_si256(quants.add(i * LANES * 4).cast());
                let scale = _mm256_cvtph_ps(_mm_load_si128(scales.cast()));
                let min = if KIND == Q4_1 {
                    _mm256_cvtph_ps(_mm_load_si128(scales.add(2 * LANES).cast()))
                } else {
                    _mm256_setzero_ps()
                };
                for (r, acc) in acc.iter_mut().enumerate() {
                    let words = tile.bytes.add(r * tile.bytes_stride + g * GROUP).cast::<i32>();
                    let activation = |i: usize| _mm256_set1_epi32(words.add(i).read_unaligned());
                    let group = &*tile.groups.add(r * tile.groups_stride + g);
                    let dot = if KIND == Q8_0 {
                        let mut dot = _mm256_setzero_si256();
                        for i in 0..8 {
                            let weights = _mm256_xor_si256(word(i), _mm256_set1_epi8(-128));
                            let activation = _mm256_sign_epi8(activation(i), weights);
                            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), activation);
                            dot = _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, ones));
                        }
                        dot
                    } else {
                        let mut pairs = _mm256_setzero_si256();
                        for i in 0..4 {
                            let weights = word(i);
                            let low = _mm256_and_si256(weights, nibble);
                            let high = _mm256_and_si256(_mm256_srli_epi16(weights, 4), nibble);
                            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(low, activation(i)));
                            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(high, activation(i + 4)));
                        }
                        let dot = _mm256_madd_epi16(pairs, ones);
                        if KIND == Q4_0 {
                            _mm256_add_epi32(dot, _mm256_set1_epi32(group.minus_8))
                        } else {
                            dot
                        }
                    };
                    let both = _mm256_mul_ps(scale, _mm256_set1_ps(group.scale));
                    *acc = _mm256_fmadd_ps(both, _mm256_cvtepi32_ps(dot), *acc);
                    if KIND == Q4_1 {
                        *acc = _mm256_fmadd_ps(min, _mm256_set1_ps(group.scaled_sum), *acc);
                    }
                }
            }
            for (r, acc) in acc.into_iter().enumerate() {
                _mm256_storeu_ps(tile.out.add(r * tile.out_stride + half * HALF), acc);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn float<const R: usize>(tile: &Tile) {
    // SAFETY: as in `quantised`, with rows of k floats.
    unsafe {
        for half in 0..2 {
            let mut acc = [_mm256_setzero_ps(); R];
            for k in 0..tile.k {
                let weights = _mm256_load_ps(tile.panel.cast::<f32>().add(k * LANES + half * HALF));
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm256_fmadd_ps(weights, _mm256_set1_ps(*tile.x.add(r * tile.x_stride + k)), *acc);
                }
            }
            for (r, acc) in acc.into_iter().enumerate() {
                _mm256_storeu_ps(tile.out.add(r * tile.out_stride + half * HALF), acc);
            }
        }
    }
}
