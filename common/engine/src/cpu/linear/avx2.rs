//! Tiles with AVX2: 16 lanes as two halves of 8.
//!
//! `vpmaddubsw` adds two products in 16 bits and saturates. Nibbles cannot: eight sums of 2 × 15 × 127 stay below 2^15, so a whole group is added in 16
//! bits; of five bits half a group, four sums of 2 × 31 × 127; of six bits two sums of 2 × 63 × 127. Bytes are made signed again and their sign moved to
//! the activation: 2 × 128 × 127 stays below 2^15.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{
    Packed, Tile, TileFn,
    kinds::{Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, by_kind, by_rows, kind},
};
use crate::cpu::{
    math::LANES,
    rows::GROUP,
    weight::{FACTORS, FACTORS_STRIDE, PanelKind, SCALE_BYTES, SUPER_GROUPS},
};

/// Lanes of a ymm register.
const HALF: usize = 8;

pub(super) fn tile_fn(kind: PanelKind, rows: usize) -> TileFn {
    by_kind!(kind, rows)
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantised<const KIND: u8, const R: usize>(tile: &Tile) {
    let kind = const { kind(KIND) };
    // SAFETY: the caller's promise (`TileFn`) covers every address: panel, R packed rows of k numbers, 16 outputs per row.
    unsafe {
        for half in 0..2 {
            let mut acc = [_mm256_setzero_ps(); R];
            for g in 0..tile.k / GROUP {
                let (scales, quants) = tile.shape.group(kind, g);
                let scales = tile.panel.add(scales);
                let quants = tile.panel.add(quants + half * HALF * 4);
                let halves = |at: usize| _mm256_cvtph_ps(_mm_load_si128(scales.add(at + half * HALF * 2).cast()));
                let factor = |i: usize| {
                    let at = FACTORS + g % SUPER_GROUPS * FACTORS_STRIDE + i * LANES + half * HALF;
                    _mm256_cvtepi8_epi32(_mm_loadl_epi64(scales.add(at).cast()))
                };
                let mut scale = halves(0);
                let mut min = if kind.has_min() {
                    halves(SCALE_BYTES)
                } else {
                    _mm256_setzero_ps()
                };
                let mut factors = [_mm256_setzero_si256(); 2];
                if kind.super_blocks() {
                    factors = [factor(0), factor(1)];
                }
                if matches!(kind, PanelKind::Q4K | PanelKind::Q5K) {
                    scale = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(factors[0]));
                    min = _mm256_mul_ps(min, _mm256_cvtepi32_ps(factors[1]));
                }
                let packed = Packed::group(tile, g, R);
                for (r, acc) in acc.iter_mut().enumerate() {
                    let [first, second] = dots::<KIND>(quants, packed, r);
                    let dot = if kind == PanelKind::Q6K {
                        let offsets = [0, 1].map(|half| _mm256_set1_epi32(packed.half_offset(half, r)));
                        _mm256_add_epi32(
                            _mm256_mullo_epi32(_mm256_add_epi32(first, offsets[0]), factors[0]),
                            _mm256_mullo_epi32(_mm256_add_epi32(second, offsets[1]), factors[1]),
                        )
                    } else {
                        // Bytes are signed already.
                        let offset = if kind == PanelKind::Q8_0 {
                            0
                        } else {
                            packed.offset(kind, r)
                        };
                        _mm256_add_epi32(_mm256_add_epi32(first, second), _mm256_set1_epi32(offset))
                    };
                    let both = _mm256_mul_ps(scale, _mm256_set1_ps(packed.scale(r)));
                    *acc = _mm256_fmadd_ps(both, _mm256_cvtepi32_ps(dot), *acc);
                    let scaled_sum = _mm256_set1_ps(packed.scaled_sum(r));
                    if kind.has_min() && kind.super_blocks() {
                        *acc = _mm256_fnmadd_ps(min, scaled_sum, *acc);
                    } else if kind.has_min() {
                        *acc = _mm256_fmadd_ps(min, scaled_sum, *acc);
                    }
                }
            }
            for (r, acc) in acc.into_iter().enumerate() {
                _mm256_storeu_ps(tile.out.add(r * tile.out_stride + half * HALF), acc);
            }
        }
    }
}

/// Dot products of eight lanes' quants, unsigned (bytes: signed), with 32 activations; their two addends are those of either half of the group, or
/// all and nothing where no caller needs the halves.
///
/// # Safety
/// The CPU has AVX2; `quants` are the group's, from the first of the eight lanes on; `packed` is a tile's group, `r` a row of it.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dots<const KIND: u8>(quants: *const u8, packed: Packed, r: usize) -> [__m256i; 2] {
    let kind = const { kind(KIND) };
    // SAFETY: the caller's promise.
    let load = |at: usize| unsafe { _mm256_load_si256(quants.add(at).cast()) };
    // SAFETY: the caller's promise.
    let activation = |i: usize| unsafe { _mm256_set1_epi32(packed.word(i, r)) };
    let nibble = _mm256_set1_epi8(15);
    let ones = _mm256_set1_epi16(1);
    let zero = _mm256_setzero_si256();
    // Words i and i + 4.
    let pair = |i: usize| {
        let pairs = load(kind.high_bytes() + i * LANES * 4);
        [
            _mm256_and_si256(pairs, nibble),
            _mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble),
        ]
    };
    // Moves bit `from` of every byte, and what lies around it, to bit 4, and keeps what the mask does.
    let to_bit_4 = |bits: __m256i, from: i32, mask: i8| {
        let moved = if from <= 4 {
            _mm256_sllv_epi32(bits, _mm256_set1_epi32(4 - from))
        } else {
            _mm256_srlv_epi32(bits, _mm256_set1_epi32(from - 4))
        };
        _mm256_and_si256(moved, _mm256_set1_epi8(mask))
    };
    match kind {
        PanelKind::Q8_0 => {
            let mut dot = zero;
            for i in 0..8 {
                let weights = _mm256_xor_si256(load(i * LANES * 4), _mm256_set1_epi8(-128));
                let activation = _mm256_sign_epi8(activation(i), weights);
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), activation);
                dot = _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, ones));
            }
            [dot, zero]
        }
        PanelKind::Q5_0 | PanelKind::Q5_1 | PanelKind::Q5K => {
            let bits = load(0);
            let mut sums = [zero; 2];
            for i in 0..4 {
                for (half, quants) in pair(i).into_iter().enumerate() {
                    let word = i + 4 * half;
                    let weights = _mm256_or_si256(quants, to_bit_4(bits, word as i32, 0x10));
                    sums[half] = _mm256_add_epi16(sums[half], _mm256_maddubs_epi16(weights, activation(word)));
                }
            }
            sums.map(|sums| _mm256_madd_epi16(sums, ones))
        }
        PanelKind::Q6K => {
            let bits = [load(0), load(LANES * 4)];
            let mut sums = [[zero; 2]; 2];
            for i in 0..4 {
                for (half, quants) in pair(i).into_iter().enumerate() {
                    let weights = _mm256_or_si256(quants, to_bit_4(bits[half], 2 * i as i32, 0x30));
                    let products = _mm256_maddubs_epi16(weights, activation(i + 4 * half));
                    sums[half][i / 2] = _mm256_add_epi16(sums[half][i / 2], products);
                }
            }
            sums.map(|[a, b]| _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones)))
        }
        _ => {
            let mut sums = zero;
            for i in 0..4 {
                let [low, high] = pair(i);
                sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(low, activation(i)));
                sums = _mm256_add_epi16(sums, _mm256_maddubs_epi16(high, activation(i + 4)));
            }
            [_mm256_madd_epi16(sums, ones), zero]
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn float<const R: usize>(tile: &Tile) {
    // SAFETY: as in `quantised`, with packed rows of k floats.
    unsafe {
        let rows = tile.packed.cast::<f32>();
        for half in 0..2 {
            let mut acc = [_mm256_setzero_ps(); R];
            for k in 0..tile.k {
                let weights = _mm256_load_ps(tile.panel.cast::<f32>().add(k * LANES + half * HALF));
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm256_fmadd_ps(weights, _mm256_set1_ps(rows.add(k * R + r).read()), *acc);
                }
            }
            for (r, acc) in acc.into_iter().enumerate() {
                _mm256_storeu_ps(tile.out.add(r * tile.out_stride + half * HALF), acc);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn bf16<const R: usize>(tile: &Tile) {
    // SAFETY: as in `float`; panel and rows have ceil(k / 2) pairs.
    unsafe {
        for half in 0..2 {
            let mut acc = [_mm256_setzero_ps(); R];
            let mut multiply = |weights: __m256i, k: usize| {
                let weights = _mm256_castsi256_ps(weights);
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm256_fmadd_ps(
                        weights,
                        _mm256_set1_ps(tile.packed.cast::<f32>().add(k * R + r).read()),
                        *acc,
                    );
                }
            };
            for k in (0..tile.k).step_by(2) {
                let words = _mm256_load_si256(tile.panel.add(k / 2 * LANES * 4 + half * HALF * 4).cast());
                multiply(_mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000u32 as i32)), k + 1);
                multiply(_mm256_slli_epi32(words, 16), k);
            }
            for (r, acc) in acc.into_iter().enumerate() {
                _mm256_storeu_ps(tile.out.add(r * tile.out_stride + half * HALF), acc);
            }
        }
    }
}
