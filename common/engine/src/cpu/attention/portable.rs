//! The scalar definition of a tile step.
#![allow(unsafe_code)]

use super::{TILE, TileStep, place};
use crate::cpu::math::{exp, from_bf16};

pub(super) unsafe fn step(step: &TileStep) {
    let d = step.head_dim;
    // SAFETY: the caller's promise (`StepFn`): every pointer is valid for its shape, and nobody else touches `running` and `acc`. Only the values of seen tokens
    // are read.
    let (queries, keys, running, acc) = unsafe {
        (
            std::slice::from_raw_parts(step.queries, (d - 1) * step.stride + step.count),
            std::slice::from_raw_parts(step.keys, TILE * d),
            std::slice::from_raw_parts_mut(step.running, step.count),
            std::slice::from_raw_parts_mut(step.acc, step.count * d),
        )
    };
    for ((q, running), acc) in running.iter_mut().enumerate().zip(acc.chunks_exact_mut(d)) {
        let mut scores = [0.0f32; TILE];
        for (i, keys) in keys.as_chunks::<TILE>().0.iter().enumerate() {
            let query = queries[i * step.stride + q];
            for (score, &key) in scores.iter_mut().zip(keys) {
                *score = query.mul_add(from_bf16(key), *score);
            }
        }
        let mut max = running.max;
        for (t, score) in scores.iter_mut().enumerate() {
            if step.seen[q] >> t & 1 == 0 {
                *score = f32::NEG_INFINITY;
            }
            max = if *score > max { *score } else { max };
        }
        let correction = exp(running.max - max);
        let p = scores.map(|score| exp(score - max));
        running.max = max;
        for (sum, pair) in running.sums.iter_mut().zip(p.as_chunks::<2>().0) {
            *sum = sum.mul_add(correction, pair[0] + pair[1]);
        }
        acc.iter_mut().for_each(|acc| *acc *= correction);
        for t in step.tokens() {
            // SAFETY: a seen token's values.
            let values = unsafe { std::slice::from_raw_parts(step.values.add(t * d), d) };
            for (i, &value) in values.iter().enumerate() {
                let acc = &mut acc[place(i, d)];
                *acc = p[t].mul_add(from_bf16(value), *acc);
            }
        }
    }
}
