//! Tile steps with AVX-512.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{TILE, TileStep};
use crate::cpu::math::{self, EXP_HIGH, EXP_LOW, EXP_POLYNOMIAL, LANES, LN2_HIGH, LN2_LOW, LOG2_E, ROUND};

/// Query heads that share loads of values.
const BLOCK: usize = 4;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) unsafe fn step(step: &TileStep) {
    // SAFETY: the caller's promise (`StepFn`), passed on for up to four heads at a time.
    unsafe {
        let mut head = 0;
        while head < step.heads {
            let block = TileStep {
                queries: step.queries.add(head * step.head_dim),
                running: step.running.add(head),
                acc: step.acc.add(head * step.head_dim),
                ..*step
            };
            match (step.heads - head).min(BLOCK) {
                1 => heads::<1>(&block),
                2 => heads::<2>(&block),
                3 => heads::<3>(&block),
                _ => heads::<4>(&block),
            }
            head += BLOCK;
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn heads<const Q: usize>(step: &TileStep) {
    let d = step.head_dim;
    let mut p = [[0.0f32; TILE]; Q];
    let mut corrections = [0.0f32; Q];
    // SAFETY: as in `step`. Keys beyond `tokens` are read (the tile has 32) and their scores dropped.
    unsafe {
        for q in 0..Q {
            let query = step.queries.add(q * d);
            let low = scores(query, step.keys, d, step.scale, step.tokens.min(LANES));
            let high = if step.tokens > LANES {
                scores(query, step.keys.add(LANES * d), d, step.scale, step.tokens - LANES)
            } else {
                _mm512_set1_ps(f32::NEG_INFINITY)
            };
            let running = &mut *step.running.add(q);
            let top = _mm512_reduce_max_ps(_mm512_max_ps(low, high));
            let max = if top > running.max { top } else { running.max };
            corrections[q] = math::exp(running.max - max);
            let low = exp(_mm512_sub_ps(low, _mm512_set1_ps(max)));
            let high = exp(_mm512_sub_ps(high, _mm512_set1_ps(max)));
            running.max = max;
            running.sum = running.sum.mul_add(corrections[q], tree_sum(_mm512_add_ps(low, high)));
            _mm512_storeu_ps(p[q].as_mut_ptr(), low);
            _mm512_storeu_ps(p[q].as_mut_ptr().add(LANES), high);
        }
        let mut at = 0;
        while at + 4 * LANES <= d {
            weigh::<Q, 4>(step, at, &p, &corrections);
            at += 4 * LANES;
        }
        while at < d {
            weigh::<Q, 1>(step, at, &p, &corrections);
            at += LANES;
        }
    }
}

/// Scores of 16 keys, −∞ from the `valid`th on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn scores(query: *const f32, keys: *const f32, d: usize, scale: f32, valid: usize) -> __m512 {
    // SAFETY: the caller has 16 keys of `d`.
    unsafe {
        let mut lanes = [_mm512_setzero_ps(); LANES];
        for at in (0..d).step_by(LANES) {
            let query = _mm512_loadu_ps(query.add(at));
            for (token, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm512_fmadd_ps(query, _mm512_loadu_ps(keys.add(token * d + at)), *lanes);
            }
        }
        let scores = _mm512_mul_ps(tree_sums(lanes), _mm512_set1_ps(scale));
        _mm512_mask_mov_ps(
            _mm512_set1_ps(f32::NEG_INFINITY),
            ((1u32 << valid) - 1) as __mmask16,
            scores,
        )
    }
}

/// Tree sums of 16 vectors at once: lane t of the result is the sum of vector t. Each merge adds the halves that the tree adds, for two
/// vectors in one register.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn tree_sums(mut v: [__m512; LANES]) -> __m512 {
    // Lanes of `a` where the mask has 0 and of `b` where it has 1; `index` picks the lanes to be added (16 + lane means `b`).
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn merge(a: __m512, b: __m512, mask: __mmask16, index: __m512i) -> __m512 {
        _mm512_add_ps(_mm512_mask_blend_ps(mask, a, b), _mm512_permutex2var_ps(a, index, b))
    }
    let by_8 = _mm512_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
    let by_4 = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
    let by_2 = _mm512_setr_epi32(2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29);
    let by_1 = _mm512_setr_epi32(1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
    for i in 0..8 {
        v[i] = merge(v[i], v[i + 8], 0xff00, by_8);
    }
    for i in 0..4 {
        v[i] = merge(v[i], v[i + 4], 0xf0f0, by_4);
    }
    for i in 0..2 {
        v[i] = merge(v[i], v[i + 2], 0xcccc, by_2);
    }
    merge(v[0], v[1], 0xaaaa, by_1)
}

/// [`math::tree_sum`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn tree_sum(v: __m512) -> f32 {
    let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}

/// [`math::exp`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn exp(x: __m512) -> __m512 {
    let round = _mm512_set1_ps(ROUND);
    let shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(LOG2_E), round);
    let n = _mm512_sub_ps(shifted, round);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-LN2_HIGH), x);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-LN2_LOW), r);
    let mut p = _mm512_set1_ps(EXP_POLYNOMIAL[0]);
    for c in &EXP_POLYNOMIAL[1..] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
    }
    let y = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0));
    let bias = _mm512_set1_epi32(127i32.wrapping_sub(ROUND.to_bits() as i32));
    let power = _mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(shifted), bias), 23);
    let y = _mm512_mul_ps(y, _mm512_castsi512_ps(power));
    let low = _mm512_cmp_ps_mask(x, _mm512_set1_ps(EXP_LOW), _CMP_LT_OQ);
    let high = _mm512_cmp_ps_mask(x, _mm512_set1_ps(EXP_HIGH), _CMP_GT_OQ);
    _mm512_mask_mov_ps(
        _mm512_mask_mov_ps(y, low, _mm512_setzero_ps()),
        high,
        _mm512_set1_ps(f32::INFINITY),
    )
}

/// `acc = acc * correction + p · values` for `16 * N` dimensions from `at` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn weigh<const Q: usize, const N: usize>(
    step: &TileStep,
    at: usize,
    p: &[[f32; TILE]; Q],
    corrections: &[f32; Q],
) {
    let d = step.head_dim;
    // SAFETY: as in `heads`; at + 16 * N ≤ d.
    unsafe {
        let mut acc = [[_mm512_setzero_ps(); N]; Q];
        for q in 0..Q {
            let correction = _mm512_set1_ps(corrections[q]);
            for (n, acc) in acc[q].iter_mut().enumerate() {
                *acc = _mm512_mul_ps(_mm512_loadu_ps(step.acc.add(q * d + at + n * LANES)), correction);
            }
        }
        for token in 0..step.tokens {
            let values = step.values.add(token * d + at);
            let mut loaded = [_mm512_setzero_ps(); N];
            for (n, loaded) in loaded.iter_mut().enumerate() {
                *loaded = _mm512_loadu_ps(values.add(n * LANES));
            }
            for q in 0..Q {
                let p = _mm512_set1_ps(p[q][token]);
                for n in 0..N {
                    acc[q][n] = _mm512_fmadd_ps(p, loaded[n], acc[q][n]);
                }
            }
        }
        for (q, acc) in acc.into_iter().enumerate() {
            for (n, acc) in acc.into_iter().enumerate() {
                _mm512_storeu_ps(step.acc.add(q * d + at + n * LANES), acc);
            }
        }
    }
}
