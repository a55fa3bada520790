//! The scalar definition of a tile step.
#![allow(unsafe_code)]

use super::{TILE, TileStep};
use crate::cpu::math::{LANES, exp, tree_sum};

pub(super) unsafe fn step(step: &TileStep) {
    let d = step.head_dim;
    // SAFETY: the caller's promise (`StepFn`): every pointer is valid for its shape, and nobody else touches `running` and `acc`.
    let (queries, keys, values, running, acc) = unsafe {
        (
            std::slice::from_raw_parts(step.queries, step.heads * d),
            std::slice::from_raw_parts(step.keys, step.tokens * d),
            std::slice::from_raw_parts(step.values, step.tokens * d),
            std::slice::from_raw_parts_mut(step.running, step.heads),
            std::slice::from_raw_parts_mut(step.acc, step.heads * d),
        )
    };
    for ((query, running), acc) in queries.chunks_exact(d).zip(running).zip(acc.chunks_exact_mut(d)) {
        let mut scores = [f32::NEG_INFINITY; TILE];
        for (score, key) in scores.iter_mut().zip(keys.chunks_exact(d)) {
            *score = dot(query, key) * step.scale;
        }
        let mut max = running.max;
        for &score in &scores {
            max = if score > max { score } else { max };
        }
        let correction = exp(running.max - max);
        let p = scores.map(|score| exp(score - max));
        let mut lanes = [0.0; LANES];
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane = p[l] + p[l + LANES];
        }
        running.max = max;
        running.sum = running.sum.mul_add(correction, tree_sum(lanes));
        for acc in acc.iter_mut() {
            *acc *= correction;
        }
        for (value, &p) in values.chunks_exact(d).zip(&p) {
            for (acc, &value) in acc.iter_mut().zip(value) {
                *acc = p.mul_add(value, *acc);
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    for (a, b) in a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0) {
        for l in 0..LANES {
            lanes[l] = a[l].mul_add(b[l], lanes[l]);
        }
    }
    tree_sum(lanes)
}
