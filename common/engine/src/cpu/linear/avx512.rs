//! Tiles with AVX-512 VNNI: a lane of a zmm register is an output row.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Tile, TileFn, by_kind, by_rows, half_offsets, kind, offset};
use crate::cpu::{
    math::LANES,
    rows::GROUP,
    weight::{FACTORS, FACTORS_STRIDE, PanelKind, SCALE_BYTES, SUPER_GROUPS},
};

pub(super) fn tile_fn(kind: PanelKind, rows: usize) -> TileFn {
    by_kind!(kind, rows)
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn quantised<const KIND: u8, const R: usize>(tile: &Tile) {
    let kind = const { kind(KIND) };
    // SAFETY: the caller's promise (`TileFn`) covers every address: panel, R rows of k bytes and k / 32 groups, 16 outputs per row.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); R];
        for g in 0..tile.k / GROUP {
            let (scales, quants) = tile.shape.group(kind, g);
            let (scales, quants) = (tile.panel.add(scales), tile.panel.add(quants));
            let weights = unpack::<KIND>(quants);
            let half = |at: usize| _mm512_cvtph_ps(_mm256_load_si256(scales.add(at).cast()));
            let factor = |i: usize| {
                let at = FACTORS + g % SUPER_GROUPS * FACTORS_STRIDE + i * LANES;
                _mm512_cvtepi8_epi32(_mm_load_si128(scales.add(at).cast()))
            };
            let mut scale = half(0);
            let mut min = if kind.has_min() {
                half(SCALE_BYTES)
            } else {
                _mm512_setzero_ps()
            };
            let mut factors = [_mm512_setzero_si512(); 2];
            if kind.super_blocks() {
                factors = [factor(0), factor(1)];
            }
            if matches!(kind, PanelKind::Q4K | PanelKind::Q5K) {
                scale = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(factors[0]));
                min = _mm512_mul_ps(min, _mm512_cvtepi32_ps(factors[1]));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let bytes = tile.bytes.add(r * tile.bytes_stride + g * GROUP);
                let word = |i: usize| _mm512_set1_epi32(bytes.cast::<i32>().add(i).read_unaligned());
                let group = &*tile.groups.add(r * tile.groups_stride + g);
                let dot = if kind == PanelKind::Q6K {
                    let mut dots = half_offsets(bytes).map(|offset| _mm512_set1_epi32(offset));
                    for (i, &weights) in weights.iter().enumerate() {
                        dots[i / 4] = _mm512_dpbusd_epi32(dots[i / 4], weights, word(i));
                    }
                    _mm512_add_epi32(
                        _mm512_mullo_epi32(dots[0], factors[0]),
                        _mm512_mullo_epi32(dots[1], factors[1]),
                    )
                } else {
                    let mut dot = _mm512_set1_epi32(offset(kind, group));
                    for (i, &weights) in weights.iter().enumerate() {
                        dot = _mm512_dpbusd_epi32(dot, weights, word(i));
                    }
                    dot
                };
                let both = _mm512_mul_ps(scale, _mm512_set1_ps(group.scale));
                *acc = _mm512_fmadd_ps(both, _mm512_cvtepi32_ps(dot), *acc);
                let scaled_sum = _mm512_set1_ps(group.scaled_sum);
                if kind.has_min() && kind.super_blocks() {
                    *acc = _mm512_fnmadd_ps(min, scaled_sum, *acc);
                } else if kind.has_min() {
                    *acc = _mm512_fmadd_ps(min, scaled_sum, *acc);
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            _mm512_storeu_ps(tile.out.add(r * tile.out_stride), acc);
        }
    }
}

/// A group's quants, four of k in each lane's word.
///
/// # Safety
/// The CPU has AVX-512; `quants` is the group's, on a cache line.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack<const KIND: u8>(quants: *const u8) -> [__m512i; 8] {
    let kind = const { kind(KIND) };
    let mut weights = [_mm512_setzero_si512(); 8];
    // SAFETY: the caller's promise.
    let load = |at: usize| unsafe { _mm512_load_si512(quants.add(at).cast()) };
    if kind == PanelKind::Q8_0 {
        for (i, weights) in weights.iter_mut().enumerate() {
            *weights = load(i * 64);
        }
        return weights;
    }
    let nibble = _mm512_set1_epi8(15);
    for i in 0..4 {
        let pairs = load(kind.high_bytes() + i * 64);
        weights[i] = _mm512_and_si512(pairs, nibble);
        weights[i + 4] = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble);
    }
    // Moves bit `from` of every byte, and what lies around it, to bit 4.
    let to_bit_4 = |bits: __m512i, from: i32| {
        if from <= 4 {
            _mm512_sllv_epi32(bits, _mm512_set1_epi32(4 - from))
        } else {
            _mm512_srlv_epi32(bits, _mm512_set1_epi32(from - 4))
        }
    };
    match kind {
        PanelKind::Q5_0 | PanelKind::Q5_1 | PanelKind::Q5K => {
            let bits = load(0);
            for (i, weights) in weights.iter_mut().enumerate() {
                let bit = _mm512_and_si512(to_bit_4(bits, i as i32), _mm512_set1_epi8(0x10));
                *weights = _mm512_or_si512(*weights, bit);
            }
        }
        PanelKind::Q6K => {
            let bits = [load(0), load(64)];
            for (i, weights) in weights.iter_mut().enumerate() {
                let two = _mm512_and_si512(to_bit_4(bits[i / 4], 2 * (i as i32 % 4)), _mm512_set1_epi8(0x30));
                *weights = _mm512_or_si512(*weights, two);
            }
        }
        _ => {}
    }
    weights
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

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn bf16<const R: usize>(tile: &Tile) {
    // SAFETY: as in `float`; the panel has ceil(k / 2) words per lane.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); R];
        let mut multiply = |weights: __m512i, k: usize| {
            let weights = _mm512_castsi512_ps(weights);
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = _mm512_fmadd_ps(weights, _mm512_set1_ps(*tile.x.add(r * tile.x_stride + k)), *acc);
            }
        };
        for k in (0..tile.k).step_by(2) {
            let words = _mm512_load_si512(tile.panel.add(k / 2 * LANES * 4).cast());
            multiply(_mm512_slli_epi32(words, 16), k);
            if k + 1 < tile.k {
                multiply(_mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000u32 as i32)), k + 1);
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            _mm512_storeu_ps(tile.out.add(r * tile.out_stride), acc);
        }
    }
}
