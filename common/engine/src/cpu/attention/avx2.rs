//! Tile steps with AVX2: 16 lanes as two halves of 8.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{Running, TILE, TileStep};
use crate::cpu::math::{self, EXP_LOW, EXP_POLYNOMIAL, LANES, LN2_HIGH, LN2_LOW, LOG2_E, ROUND};

/// Lanes of a ymm register.
const HALF: usize = 8;

#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn step(step: &TileStep) {
    // SAFETY: the caller's promise (`StepFn`); queries are among `count`.
    unsafe {
        let mut q = 0;
        while q < step.count {
            let count = (step.count - q).min(2);
            match count {
                1 => queries::<1>(step, q),
                _ => queries::<2>(step, q),
            }
            q += count;
        }
    }
}

/// Two bf16 in each word: the lower ones, and the upper ones.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(words: __m256i) -> [__m256; 2] {
    [
        _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
        _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000u32 as i32))),
    ]
}

/// Q queries from the `first` on.
#[target_feature(enable = "avx2,fma")]
unsafe fn queries<const Q: usize>(step: &TileStep, first: usize) {
    let d = step.head_dim;
    // SAFETY: the caller's promise (`StepFn`): d rows of 32 keys; Q entries of `running`, and d accumulators each.
    unsafe {
        // Of tokens 0..16 the even and the odd ones, then of tokens 16..32.
        let mut scores = [[_mm256_setzero_ps(); 4]; Q];
        for i in 0..d {
            let keys = step.keys.add(i * TILE);
            let [a, b] = widen(_mm256_loadu_si256(keys.cast()));
            let [c, e] = widen(_mm256_loadu_si256(keys.add(LANES).cast()));
            for (q, scores) in scores.iter_mut().enumerate() {
                let query = _mm256_set1_ps(step.queries.add(i * step.stride + first + q).read());
                for (score, keys) in scores.iter_mut().zip([a, b, c, e]) {
                    *score = _mm256_fmadd_ps(query, keys, *score);
                }
            }
        }
        for (q, scores) in scores.into_iter().enumerate() {
            let running: &mut Running = &mut *step.running.add(first + q);
            // In the order of the registers.
            let mut p = [0.0f32; TILE];
            for (i, score) in scores.into_iter().enumerate() {
                _mm256_storeu_ps(p.as_mut_ptr().add(i * HALF), score);
            }
            let mut max = running.max;
            for (i, score) in p.iter_mut().enumerate() {
                let token = i / LANES * LANES + i % HALF * 2 + i / HALF % 2;
                if step.seen[first + q] >> token & 1 == 0 {
                    *score = f32::NEG_INFINITY;
                }
                max = if *score > max { *score } else { max };
            }
            let correction = math::exp(running.max - max);
            let mut weights = [_mm256_setzero_ps(); 4];
            for (i, weight) in weights.iter_mut().enumerate() {
                let scores = p.as_mut_ptr().add(i * HALF);
                *weight = exp(_mm256_sub_ps(_mm256_loadu_ps(scores), _mm256_set1_ps(max)));
                _mm256_storeu_ps(scores, *weight);
            }
            running.max = max;
            for half in 0..2 {
                let sums = running.sums.as_mut_ptr().add(half * HALF);
                let pairs = _mm256_add_ps(weights[2 * half], weights[2 * half + 1]);
                let sum = _mm256_fmadd_ps(_mm256_loadu_ps(sums), _mm256_set1_ps(correction), pairs);
                _mm256_storeu_ps(sums, sum);
            }
            let acc = step.acc.add((first + q) * d);
            let mut at = 0;
            while at + 64 <= d {
                weigh::<2>(step, acc, at, &p, correction);
                at += 64;
            }
            if at + 32 <= d {
                weigh::<1>(step, acc, at, &p, correction);
                at += 32;
            }
            if at < d {
                weigh_last(step, acc, at, &p, correction);
            }
        }
    }
}

/// Where a token's probability lies.
#[inline(always)]
fn at_of(token: usize) -> usize {
    token / LANES * LANES + token % 2 * HALF + token % LANES / 2
}

/// `acc = acc * correction + p · values` for `32 * N` dimensions from `at` on.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn weigh<const N: usize>(step: &TileStep, acc: *mut f32, at: usize, p: &[f32; TILE], correction: f32) {
    // SAFETY: as in `queries`; at + 32 * N ≤ d. Sixteen values are eight even and eight odd dimensions, which lie 16 apart.
    unsafe {
        let place = |n: usize, i: usize| acc.add(at + n * 32 + i % 2 * LANES + i / 2 * HALF);
        let mut sums = [[_mm256_setzero_ps(); 4]; N];
        for (n, sums) in sums.iter_mut().enumerate() {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = _mm256_mul_ps(_mm256_loadu_ps(place(n, i)), _mm256_set1_ps(correction));
            }
        }
        for token in step.tokens() {
            let values = step.values.add(token * step.head_dim + at);
            let p = _mm256_set1_ps(p[at_of(token)]);
            for (n, sums) in sums.iter_mut().enumerate() {
                for half in 0..2 {
                    let [even, odd] = widen(_mm256_loadu_si256(values.add(n * 32 + half * LANES).cast()));
                    sums[2 * half] = _mm256_fmadd_ps(p, even, sums[2 * half]);
                    sums[2 * half + 1] = _mm256_fmadd_ps(p, odd, sums[2 * half + 1]);
                }
            }
        }
        for (n, sums) in sums.into_iter().enumerate() {
            for (i, sum) in sums.into_iter().enumerate() {
                _mm256_storeu_ps(place(n, i), sum);
            }
        }
    }
}

/// The last 16 dimensions, which lie in order.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn weigh_last(step: &TileStep, acc: *mut f32, at: usize, p: &[f32; TILE], correction: f32) {
    // SAFETY: as in `queries`; at + 16 ≤ d.
    unsafe {
        for at in [at, at + HALF] {
            let mut sum = _mm256_mul_ps(_mm256_loadu_ps(acc.add(at)), _mm256_set1_ps(correction));
            for token in step.tokens() {
                let values = _mm_loadu_si128(step.values.add(token * step.head_dim + at).cast());
                let values = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
                sum = _mm256_fmadd_ps(_mm256_set1_ps(p[at_of(token)]), values, sum);
            }
            _mm256_storeu_ps(acc.add(at), sum);
        }
    }
}

/// [`math::exp`] of numbers that are not positive.
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
    _mm256_blendv_ps(y, _mm256_setzero_ps(), low)
}
