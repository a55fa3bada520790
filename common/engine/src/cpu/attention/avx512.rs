//! Tile steps with AVX-512.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::{Running, STEP_QUERIES, TILE, TileStep};
use crate::cpu::math::{EXP_LOW, EXP_POLYNOMIAL, LANES, LN2_HIGH, LN2_LOW, LOG2_E, ROUND};

/// Queries whose accumulators of 64 dimensions stay in registers.
const WEIGHED: usize = 6;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) unsafe fn step(step: &TileStep) {
    // SAFETY: the caller's promise (`StepFn`).
    unsafe {
        match step.count {
            1 => queries::<1>(step),
            2 => queries::<2>(step),
            3 => queries::<3>(step),
            4 => queries::<4>(step),
            5 => queries::<5>(step),
            6 => queries::<6>(step),
            7 => queries::<7>(step),
            8 => queries::<8>(step),
            9 => queries::<9>(step),
            10 => queries::<10>(step),
            11 => queries::<11>(step),
            12 => queries::<STEP_QUERIES>(step),
            other => unreachable!("a step of {other} queries"),
        }
    }
}

/// Two bf16 in each word: the lower ones, and the upper ones.
#[inline]
#[target_feature(enable = "avx512f")]
fn widen(words: __m512i) -> [__m512; 2] {
    [
        _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
        _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000u32 as i32))),
    ]
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn queries<const Q: usize>(step: &TileStep) {
    let (d, stride) = (step.head_dim, step.stride);
    // Probabilities, the even tokens' first.
    let mut p = [[0.0f32; TILE]; Q];
    let mut corrections = [1.0f32; Q];
    // SAFETY: the caller's promise (`StepFn`): d rows of 32 keys, and of Q queries; Q entries of `running`.
    unsafe {
        let mut scores = [[_mm512_setzero_ps(); 2]; Q];
        let [next, later] = step.ahead;
        for i in 0..d {
            if !next[0].is_null() {
                // A tile of keys is d cache lines, and one of values too: into the first level from the second, where they were asked for before.
                for (next, later) in next.into_iter().zip(later) {
                    _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(i * TILE).cast());
                    _mm_prefetch::<_MM_HINT_T1>(later.wrapping_add(i * TILE).cast());
                }
            }
            let keys = widen(_mm512_loadu_si512(step.keys.add(i * TILE).cast()));
            let queries = step.queries.add(i * stride);
            for (q, scores) in scores.iter_mut().enumerate() {
                let query = _mm512_set1_ps(queries.add(q).read());
                for (score, keys) in scores.iter_mut().zip(keys) {
                    *score = _mm512_fmadd_ps(query, keys, *score);
                }
            }
        }
        for (q, scores) in scores.iter_mut().enumerate() {
            let seen = step.seen[q];
            if seen != u32::MAX {
                let unseen = _mm512_set1_ps(f32::NEG_INFINITY);
                for (score, seen) in scores.iter_mut().zip([seen, seen >> 1].map(even_bits)) {
                    *score = _mm512_mask_mov_ps(unseen, seen, *score);
                }
            }
        }

        // Sixteen queries' maxima at a time: lanes beyond Q are not used.
        let mut before = [f32::NEG_INFINITY; LANES];
        let mut after = [f32::NEG_INFINITY; LANES];
        for (q, [even, odd]) in scores.iter().enumerate() {
            let running = &*step.running.add(q);
            let top = _mm512_reduce_max_ps(_mm512_max_ps(*even, *odd));
            before[q] = running.max;
            after[q] = if top > running.max { top } else { running.max };
        }
        let differences = _mm512_sub_ps(_mm512_loadu_ps(before.as_ptr()), _mm512_loadu_ps(after.as_ptr()));
        let mut all = [0.0f32; LANES];
        _mm512_storeu_ps(all.as_mut_ptr(), exp(differences));
        corrections.copy_from_slice(&all[..Q]);
        for (q, scores) in scores.into_iter().enumerate() {
            let max = _mm512_set1_ps(after[q]);
            let [even, odd] = scores.map(|score| exp(_mm512_sub_ps(score, max)));
            let running: &mut Running = &mut *step.running.add(q);
            let sums = _mm512_fmadd_ps(
                _mm512_loadu_ps(running.sums.as_ptr()),
                _mm512_set1_ps(corrections[q]),
                _mm512_add_ps(even, odd),
            );
            _mm512_storeu_ps(running.sums.as_mut_ptr(), sums);
            running.max = after[q];
            _mm512_storeu_ps(p[q].as_mut_ptr(), even);
            _mm512_storeu_ps(p[q].as_mut_ptr().add(LANES), odd);
        }

        let mut first = 0;
        while first < Q {
            let (p, corrections) = (p.as_ptr().add(first), corrections.as_ptr().add(first));
            let acc = step.acc.add(first * d);
            match (Q - first).min(WEIGHED) {
                1 => weigh_all::<1>(step, p, corrections, acc),
                2 => weigh_all::<2>(step, p, corrections, acc),
                3 => weigh_all::<3>(step, p, corrections, acc),
                4 => weigh_all::<4>(step, p, corrections, acc),
                5 => weigh_all::<5>(step, p, corrections, acc),
                _ => weigh_all::<WEIGHED>(step, p, corrections, acc),
            }
            first += WEIGHED;
        }
    }
}

/// Bits 0, 2, 4, … side by side.
fn even_bits(bits: u32) -> __mmask16 {
    let bits = bits & 0x5555_5555;
    let bits = (bits | bits >> 1) & 0x3333_3333;
    let bits = (bits | bits >> 2) & 0x0f0f_0f0f;
    let bits = (bits | bits >> 4) & 0x00ff_00ff;
    (bits | bits >> 8) as __mmask16
}

/// `acc = acc * correction + p · values`, all dimensions of Q queries.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn weigh_all<const Q: usize>(step: &TileStep, p: *const [f32; TILE], corrections: *const f32, acc: *mut f32) {
    let d = step.head_dim;
    // SAFETY: the caller has Q rows of each.
    unsafe {
        let (p, corrections) = (&*p.cast::<[[f32; TILE]; Q]>(), &*corrections.cast::<[f32; Q]>());
        let mut at = 0;
        while at + 64 <= d {
            weigh::<Q, 2>(step, p, corrections, acc, at);
            at += 64;
        }
        if at + 32 <= d {
            weigh::<Q, 1>(step, p, corrections, acc, at);
            at += 32;
        }
        if at < d {
            weigh_last::<Q>(step, p, corrections, acc, at);
        }
    }
}

/// `32 * N` dimensions from `at` on.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn weigh<const Q: usize, const N: usize>(
    step: &TileStep,
    p: &[[f32; TILE]; Q],
    corrections: &[f32; Q],
    acc: *mut f32,
    at: usize,
) {
    let d = step.head_dim;
    // SAFETY: the caller's Q accumulators have d numbers, seen tokens d values, and at + 32 * N ≤ d.
    unsafe {
        let mut sums = [[[_mm512_setzero_ps(); 2]; N]; Q];
        for (q, sums) in sums.iter_mut().enumerate() {
            let correction = _mm512_set1_ps(corrections[q]);
            for (i, sum) in sums.as_flattened_mut().iter_mut().enumerate() {
                *sum = _mm512_mul_ps(_mm512_loadu_ps(acc.add(q * d + at + i * LANES)), correction);
            }
        }
        for token in step.tokens() {
            let values = step.values.add(token * d + at);
            let mut loaded = [[_mm512_setzero_ps(); 2]; N];
            for (n, loaded) in loaded.iter_mut().enumerate() {
                *loaded = widen(_mm512_loadu_si512(values.add(n * 32).cast()));
            }
            for (p, sums) in p.iter().zip(&mut sums) {
                let p = _mm512_set1_ps(p[token % 2 * LANES + token / 2]);
                for (sum, loaded) in sums.as_flattened_mut().iter_mut().zip(loaded.as_flattened()) {
                    *sum = _mm512_fmadd_ps(p, *loaded, *sum);
                }
            }
        }
        for (q, sums) in sums.into_iter().enumerate() {
            for (i, sum) in sums.as_flattened().iter().enumerate() {
                _mm512_storeu_ps(acc.add(q * d + at + i * LANES), *sum);
            }
        }
    }
}

/// The last 16 dimensions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn weigh_last<const Q: usize>(
    step: &TileStep,
    p: &[[f32; TILE]; Q],
    corrections: &[f32; Q],
    acc: *mut f32,
    at: usize,
) {
    let d = step.head_dim;
    // SAFETY: as in `weigh`, at + 16 ≤ d.
    unsafe {
        for q in 0..Q {
            let acc = acc.add(q * d + at);
            let mut sum = _mm512_mul_ps(_mm512_loadu_ps(acc), _mm512_set1_ps(corrections[q]));
            for token in step.tokens() {
                let values = _mm256_loadu_si256(step.values.add(token * d + at).cast());
                let values = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
                sum = _mm512_fmadd_ps(_mm512_set1_ps(p[q][token % 2 * LANES + token / 2]), values, sum);
            }
            _mm512_storeu_ps(acc, sum);
        }
    }
}

/// [`math::exp`](crate::cpu::math::exp) of numbers that are not positive.
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
    // Times 2^n, which lies in the low bits: to the exponent. A NaN is not below the bound, and has no low bits set, as every NaN that arithmetic makes.
    let power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    let kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(EXP_LOW), _CMP_NLT_UQ);
    _mm512_castsi512_ps(_mm512_maskz_add_epi32(kept, _mm512_castps_si512(y), power))
}
