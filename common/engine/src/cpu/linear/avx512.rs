//! Tiles with AVX-512 VNNI: a lane of a zmm register is an output row.
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

pub(super) fn tile_fn(kind: PanelKind, rows: usize) -> TileFn {
    by_kind!(kind, rows)
}

/// The kernel for bf16, by `vdpbf16ps`.
pub(super) fn bf16_dot_fn(rows: usize) -> TileFn {
    by_rows!(rows, bf16_dot)
}

/// Bytes ahead of the one in use that few rows, which wait for memory, ask for: into the second-level cache, and then into the first. Measured to
/// read main memory at 96 % of what a mere sum does; the hardware's own prefetching reaches 66 %.
const AHEAD: [usize; 2] = [6 << 10, 2 << 10];
/// Rows up to which a tile prefetches, and has two chains of dot products per row.
const FEW: usize = 8;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn quantised<const KIND: u8, const R: usize>(tile: &Tile) {
    let kind = const { kind(KIND) };
    // SAFETY: the caller's promise (`TileFn`) covers every address: panel, R packed rows of k numbers, 16 outputs per row.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); R];
        for g in 0..tile.k / GROUP {
            let (scales, quants) = tile.shape.group(kind, g);
            let (scales, quants) = (tile.panel.add(scales), tile.panel.add(quants));
            for line in 0..const { self::kind(KIND).group_lines() } {
                ahead::<R>(quants.add(line * 64));
            }
            let packed = Packed::group(tile, g, R);
            let word = |i: usize, r: usize| _mm512_set1_epi32(packed.word(i, r));
            // Words 0..4 and 4..8: two chains per row, or one, so that enough of them are under way and the registers hold them all.
            let two = R <= FEW || kind == PanelKind::Q6K;
            let mut dots = [[_mm512_setzero_si512(); R]; 2];
            for (half, dots) in dots.iter_mut().enumerate() {
                for (r, dot) in dots.iter_mut().enumerate() {
                    if kind == PanelKind::Q6K {
                        *dot = _mm512_set1_epi32(packed.half_offset(half, r));
                    } else if half == 0 && matches!(kind, PanelKind::Q4_0 | PanelKind::Q5_0 | PanelKind::Q8_0) {
                        *dot = _mm512_set1_epi32(packed.offset(kind, r));
                    }
                }
            }
            let high = high_bits::<KIND>(quants);
            for i in 0..4 {
                let unpacked = unpack::<KIND>(quants, &high, i);
                for (half, weights) in unpacked.into_iter().enumerate() {
                    let chain = if two { half } else { 0 };
                    for (r, dot) in dots[chain].iter_mut().enumerate() {
                        *dot = _mm512_dpbusd_epi32(*dot, weights, word(i + 4 * half, r));
                    }
                }
            }

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
                let dot = if kind == PanelKind::Q6K {
                    _mm512_add_epi32(
                        _mm512_mullo_epi32(dots[0][r], factors[0]),
                        _mm512_mullo_epi32(dots[1][r], factors[1]),
                    )
                } else if two {
                    _mm512_add_epi32(dots[0][r], dots[1][r])
                } else {
                    dots[0][r]
                };
                let both = _mm512_mul_ps(scale, _mm512_set1_ps(packed.scale(r)));
                *acc = _mm512_fmadd_ps(both, _mm512_cvtepi32_ps(dot), *acc);
                let scaled_sum = || _mm512_set1_ps(packed.scaled_sum(r));
                if kind.has_min() && kind.super_blocks() {
                    *acc = _mm512_fnmadd_ps(min, scaled_sum(), *acc);
                } else if kind.has_min() {
                    *acc = _mm512_fmadd_ps(min, scaled_sum(), *acc);
                }
            }
        }
        store(tile, acc);
    }
}

/// The bits above a group's nibbles, as stored.
///
/// # Safety
/// The CPU has AVX-512; `quants` is the group's, on a cache line.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn high_bits<const KIND: u8>(quants: *const u8) -> [__m512i; 2] {
    let kind = const { kind(KIND) };
    // SAFETY: the caller's promise.
    let load = |at: usize| unsafe { _mm512_load_si512(quants.add(at).cast()) };
    let zero = _mm512_setzero_si512();
    match kind {
        PanelKind::Q5_0 | PanelKind::Q5_1 | PanelKind::Q5K => [load(0), zero],
        PanelKind::Q6K => [load(0), load(64)],
        _ => [zero; 2],
    }
}

/// Words i and i + 4 of a group: its quants, four of k in each lane's word.
///
/// # Safety
/// As in `high_bits`, which has given `high`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack<const KIND: u8>(quants: *const u8, high: &[__m512i; 2], i: usize) -> [__m512i; 2] {
    let kind = const { kind(KIND) };
    // SAFETY: the caller's promise.
    let load = |at: usize| unsafe { _mm512_load_si512(quants.add(at).cast()) };
    if kind == PanelKind::Q8_0 {
        return [load(i * 64), load((i + 4) * 64)];
    }
    let nibble = _mm512_set1_epi8(15);
    let pairs = load(kind.high_bytes() + i * 64);
    let nibbles = [
        _mm512_and_si512(pairs, nibble),
        _mm512_and_si512(_mm512_srli_epi16(pairs, 4), nibble),
    ];
    // Moves bit `from` of every byte, and what lies around it, to bit 4.
    let to_bit_4 = |bits: __m512i, from: i32| {
        if from <= 4 {
            _mm512_sllv_epi32(bits, _mm512_set1_epi32(4 - from))
        } else {
            _mm512_srlv_epi32(bits, _mm512_set1_epi32(from - 4))
        }
    };
    let i = i as i32;
    match kind {
        PanelKind::Q5_0 | PanelKind::Q5_1 | PanelKind::Q5K => {
            let bit = |word: i32| _mm512_and_si512(to_bit_4(high[0], word), _mm512_set1_epi8(0x10));
            [
                _mm512_or_si512(nibbles[0], bit(i)),
                _mm512_or_si512(nibbles[1], bit(i + 4)),
            ]
        }
        PanelKind::Q6K => {
            let two = |bits: __m512i| _mm512_and_si512(to_bit_4(bits, 2 * i), _mm512_set1_epi8(0x30));
            [
                _mm512_or_si512(nibbles[0], two(high[0])),
                _mm512_or_si512(nibbles[1], two(high[1])),
            ]
        }
        _ => nibbles,
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn float<const R: usize>(tile: &Tile) {
    // SAFETY: as in `quantised`, with packed rows of k floats.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); R];
        for k in 0..tile.k {
            let weights = tile.panel.cast::<f32>().add(k * LANES);
            ahead::<R>(weights.cast());
            multiply(&mut acc, _mm512_load_ps(weights), tile.packed.cast::<f32>().add(k * R));
        }
        store(tile, acc);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn bf16<const R: usize>(tile: &Tile) {
    // SAFETY: as in `float`; panel and rows have ceil(k / 2) pairs.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); R];
        for pair in 0..tile.k.div_ceil(2) {
            let words = tile.panel.add(pair * LANES * 4);
            ahead::<R>(words);
            let words = _mm512_load_si512(words.cast());
            let rows = tile.packed.cast::<f32>().add(2 * pair * R);
            let odd = _mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000u32 as i32));
            multiply(&mut acc, _mm512_castsi512_ps(odd), rows.add(R));
            multiply(&mut acc, _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), rows);
        }
        store(tile, acc);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
unsafe fn bf16_dot<const R: usize>(tile: &Tile) {
    // SAFETY: as in `bf16`, with rows of ceil(k / 2) words.
    unsafe {
        let mut acc = [_mm512_setzero_ps(); R];
        for pair in 0..tile.k.div_ceil(2) {
            let words = tile.panel.add(pair * LANES * 4);
            ahead::<R>(words);
            let weights = as_pairs(_mm512_load_si512(words.cast()));
            let rows = tile.packed.add(pair * R);
            for (r, acc) in acc.iter_mut().enumerate() {
                let row = as_pairs(_mm512_set1_epi32(rows.add(r).read() as i32));
                *acc = _mm512_dpbf16_ps(*acc, weights, row);
            }
        }
        store(tile, acc);
    }
}

/// Words of two bf16, as the instruction takes them.
#[inline(always)]
fn as_pairs(words: __m512i) -> __m512bh {
    // SAFETY: both are the 512 bits of a register.
    unsafe { std::mem::transmute(words) }
}

/// Whether this CPU's `vdpbf16ps` is two fma, the odd one first. Makers say so in words; what hands its KV on must know.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(in crate::cpu) fn bf16_dots_hold() -> bool {
    let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
    let mut random = _mm512_setr_epi32(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
    // Any digits and sign, magnitudes from 2^-15 to 2.
    let mut pairs = || {
        for (left, by) in [(true, 13), (false, 17), (true, 5)] {
            let by = _mm512_set1_epi32(by);
            let moved = if left {
                _mm512_sllv_epi32(random, by)
            } else {
                _mm512_srlv_epi32(random, by)
            };
            random = _mm512_xor_si512(random, moved);
        }
        let digits = _mm512_and_si512(random, _mm512_set1_epi32(0x87ff_87ffu32 as i32));
        _mm512_or_si512(digits, _mm512_set1_epi32(0x3800_3800))
    };
    let (mut dots, mut sums) = (_mm512_setzero_ps(), _mm512_setzero_ps());
    let mut equal = true;
    for _ in 0..1000 {
        let (a, b) = (pairs(), pairs());
        let [odd, even] = [
            [_mm512_and_si512(a, high), _mm512_and_si512(b, high)],
            [_mm512_slli_epi32(a, 16), _mm512_slli_epi32(b, 16)],
        ]
        .map(|both| both.map(|numbers| _mm512_castsi512_ps(numbers)));
        sums = _mm512_fmadd_ps(even[0], even[1], _mm512_fmadd_ps(odd[0], odd[1], sums));
        dots = _mm512_dpbf16_ps(dots, as_pairs(a), as_pairs(b));
        equal &= _mm512_cmpeq_epi32_mask(_mm512_castps_si512(dots), _mm512_castps_si512(sums)) == u16::MAX;
    }
    equal
}

/// Sixteen rows of weights times one number of each of R packed rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn multiply<const R: usize>(acc: &mut [__m512; R], weights: __m512, rows: *const f32) {
    for (r, acc) in acc.iter_mut().enumerate() {
        // SAFETY: the caller has R numbers.
        *acc = _mm512_fmadd_ps(weights, _mm512_set1_ps(unsafe { rows.add(r).read() }), *acc);
    }
}

/// Asks for the cache line that few rows will need soon.
#[inline]
#[target_feature(enable = "avx512f")]
fn ahead<const R: usize>(line: *const u8) {
    if R <= FEW {
        _mm_prefetch::<_MM_HINT_T1>(line.wrapping_add(AHEAD[0]).cast());
        _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(AHEAD[1]).cast());
    }
}

/// Writes a tile's outputs.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const R: usize>(tile: &Tile, acc: [__m512; R]) {
    for (r, acc) in acc.into_iter().enumerate() {
        // SAFETY: the caller's promise (`TileFn`): 16 outputs per row.
        unsafe { _mm512_storeu_ps(tile.out.add(r * tile.out_stride), acc) };
    }
}
