//! Tile steps with AVX2: 16 lanes as two halves of 8.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{TILE, TileStep};
use crate::cpu::math::{self, EXP_HIGH, EXP_LOW, EXP_POLYNOMIAL, LANES, LN2_HIGH, LN2_LOW, LOG2_E, ROUND};

/// Lanes of a ymm register.
const HALF: usize = 8;

#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn step(step: &TileStep) {
    let d = step.head_dim;
    for head in 0..step.heads {
        // SAFETY: the caller's promise (`StepFn`): `head` is below `heads`, tokens below 32, and d is a multiple of 16.
        unsafe {
            let query = step.queries.add(head * d);
            let acc = step.acc.add(head * d);
            let running = &mut *step.running.add(head);
            let mut p = [f32::NEG_INFINITY; TILE];
            let mut max = running.max;
            for (token, score) in p.iter_mut().enumerate().take(step.tokens) {
                *score = dot(query, step.keys.add(token * d), d) * step.scale;
                max = if *score > max { *score } else { max };
            }
            let correction = math::exp(running.max - max);
            let mut quarters = [_mm256_setzero_ps(); TILE / HALF];
            for (i, quarter) in quarters.iter_mut().enumerate() {
                let scores = p.as_mut_ptr().add(i * HALF);
                *quarter = exp(_mm256_sub_ps(_mm256_loadu_ps(scores), _mm256_set1_ps(max)));
                _mm256_storeu_ps(scores, *quarter);
            }
            let [a, b, c, e] = quarters;
            let sum = tree_sum(_mm256_add_ps(a, c), _mm256_add_ps(b, e));
            running.max = max;
            running.sum = running.sum.mul_add(correction, sum);
            let mut at = 0;
            while at + 4 * HALF <= d {
                weigh::<4>(step, acc, at, &p, correction);
                at += 4 * HALF;
            }
            while at < d {
                weigh::<1>(step, acc, at, &p, correction);
                at += HALF;
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn dot(a: *const f32, b: *const f32, d: usize) -> f32 {
    let (mut low, mut high) = (_mm256_setzero_ps(), _mm256_setzero_ps());
    for at in (0..d).step_by(LANES) {
        // SAFETY: the caller has `d` numbers at both.
        unsafe {
            low = _mm256_fmadd_ps(_mm256_loadu_ps(a.add(at)), _mm256_loadu_ps(b.add(at)), low);
            high = _mm256_fmadd_ps(
                _mm256_loadu_ps(a.add(at + HALF)),
                _mm256_loadu_ps(b.add(at + HALF)),
                high,
            );
        }
    }
    tree_sum(low, high)
}

/// [`math::tree_sum`].
#[inline]
#[target_feature(enable = "avx2,fma")]
fn tree_sum(low: __m256, high: __m256) -> f32 {
    let v = _mm256_add_ps(low, high);
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}

/// [`math::exp`].
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp(x: __m256) -> __m256 {
    let round = _mm256_set1_ps(ROUND);
    let shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(LOG2_E), round);
    let n = _mm256_sub_ps(shifted, round);
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(-LN2_HIGH), x);
    let r = _mm256_fmadd_ps(n, _mm256_set1_ps(-LN2_LOW), r);
    let mut p = _mm256_set1_ps(EXP_POLYNOMIAL[0]);
    for c in &EXP_POLYNOMIAL[1..] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
    }
    let y = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0));
    let bias = _mm256_set1_epi32(127i32.wrapping_sub(ROUND.to_bits() as i32));
    let power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(shifted), bias), 23);
    let y = _mm256_mul_ps(y, _mm256_castsi256_ps(power));
    let low = _mm256_cmp_ps(x, _mm256_set1_ps(EXP_LOW), _CMP_LT_OQ);
    let high = _mm256_cmp_ps(x, _mm256_set1_ps(EXP_HIGH), _CMP_GT_OQ);
    _mm256_blendv_ps(
        _mm256_blendv_ps(y, _mm256_setzero_ps(), low),
        _mm256_set1_ps(f32::INFINITY),
        high,
    )
}

/// `acc = acc * correction + p · values` for `8 * N` dimensions from `at` on.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn weigh<const N: usize>(step: &TileStep, acc: *mut f32, at: usize, p: &[f32; TILE], correction: f32) {
    // SAFETY: as in `step`; at + 8 * N ≤ d.
    unsafe {
        let mut sums = [_mm256_setzero_ps(); N];
        for (n, sum) in sums.iter_mut().enumerate() {
            *sum = _mm256_mul_ps(_mm256_loadu_ps(acc.add(at + n * HALF)), _mm256_set1_ps(correction));
        }
        for (token, &p) in p.iter().enumerate().take(step.tokens) {
            let values = step.values.add(token * step.head_dim + at);
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_fmadd_ps(_mm256_set1_ps(p), _mm256_loadu_ps(values.add(n * HALF)), *sum);
            }
        }
        for (n, sum) in sums.into_iter().enumerate() {
            _mm256_storeu_ps(acc.add(at + n * HALF), sum);
        }
    }
}
