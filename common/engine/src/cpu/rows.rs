//! Operations within one row. One source, compiled once per instruction set: the compiler vectorises it, and may not change its bits.
#![allow(unsafe_code)]

use super::{
    activations::{PACK_COLUMNS, PACKED_WORDS, TILE_ROWS},
    isa::Isa,
    math::{LANES, ROUND, bf16_activation, exp, sin_cos, to_bf16, tree_sum},
};

/// Compiles `$body` for each instruction set and picks by `isa`. (Elsewhere `mul_add` would be a call.)
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $name:ident = $body:ident($($arg:ident: $type:ty),*)) => {
        $(#[$doc])*
        pub(super) fn $name(isa: Isa, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $type),*) {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512($($arg: $type),*) {
                    $body($($arg),*)
                }
                match isa {
                    // SAFETY: the instruction set in use was checked against the CPU when it was chosen.
                    Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    // SAFETY: as above.
                    Isa::Avx512 | Isa::Avx512Bf16 => return unsafe { avx512($($arg),*) },
                    Isa::Portable => {}
                }
            }
            let _ = isa;
            $body($($arg),*)
        }
    };
}

pub(super) use for_each_isa;

for_each_isa! {
    /// `out = x / rms(x) * weight`; squares are summed on 16 lanes.
    rms_norm = rms_norm_body(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32])
}

#[inline(always)]
fn rms_norm_body(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let mut lanes = [0.0f32; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = x.mul_add(x, *lane);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane = x.mul_add(x, *lane);
    }
    let mean = tree_sum(lanes) / x.len() as f32;
    let inverse = 1.0 / (mean + epsilon).sqrt();
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * inverse * weight;
    }
}

for_each_isa! {
    /// `x += delta`.
    add = add_body(x: &mut [f32], delta: &[f32])
}

#[inline(always)]
fn add_body(x: &mut [f32], delta: &[f32]) {
    for (x, &delta) in x.iter_mut().zip(delta) {
        *x += delta;
    }
}

for_each_isa! {
    /// `out = gate / (1 + e^-gate) * up`.
    silu_mul = silu_mul_body(gate: &[f32], up: &[f32], out: &mut [f32])
}

#[inline(always)]
fn silu_mul_body(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

for_each_isa! {
    /// Rotates pairs `(i, i + n)` or `(2i, 2i + 1)` of the first `2n` elements, n = `cosines.len()`.
    rotate = rotate_body(head: &mut [f32], cosines: &[f32], sines: &[f32], interleaved: bool)
}

#[inline(always)]
fn rotate_body(head: &mut [f32], cosines: &[f32], sines: &[f32], interleaved: bool) {
    let n = cosines.len();
    let head = &mut head[..2 * n];
    if interleaved {
        for ((pair, &cosine), &sine) in head.as_chunks_mut::<2>().0.iter_mut().zip(cosines).zip(sines) {
            let [a, b] = *pair;
            *pair = [a * cosine - b * sine, a * sine + b * cosine];
        }
    } else {
        let (first, second) = head.split_at_mut(n);
        for (((a, b), &cosine), &sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
            (*a, *b) = (*a * cosine - *b * sine, *a * sine + *b * cosine);
        }
    }
}

for_each_isa! {
    /// Cosines and sines of `position * frequency`, each computed in f64.
    angles = angles_body(position: f64, frequencies: &[f64], cosines: &mut [f32], sines: &mut [f32])
}

#[inline(always)]
fn angles_body(position: f64, frequencies: &[f64], cosines: &mut [f32], sines: &mut [f32]) {
    for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(frequencies) {
        let (s, c) = sin_cos(position * frequency);
        (*cosine, *sine) = (c as f32, s as f32);
    }
}

for_each_isa! {
    /// Rounds to bf16.
    narrow = narrow_body(x: &[f32], out: &mut [u16])
}

#[inline(always)]
fn narrow_body(x: &[f32], out: &mut [u16]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = to_bf16(x);
    }
}

for_each_isa! {
    /// Rounds to bf16, number i at `out + i * stride`: the caller has all these places to itself.
    narrow_apart = narrow_apart_body(x: &[f32], out: *mut u16, stride: usize)
}

#[inline(always)]
fn narrow_apart_body(x: &[f32], out: *mut u16, stride: usize) {
    for (i, &x) in x.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { out.add(i * stride).write(to_bf16(x)) };
    }
}

/// Activations that share one scale.
pub(super) const GROUP: usize = 32;

/// What a kernel needs of one group of quantised activations besides its 32 bytes.
#[derive(Clone, Copy, PartialEq, Debug)]
#[repr(C)]
pub(super) struct Group {
    /// Largest magnitude / 127.
    pub(super) scale: f32,
    /// `scale` times the sum of the bytes: meets a weight's minimum.
    pub(super) scaled_sum: f32,
    /// −8 times the sum: what makes unsigned Q4_0 signed.
    pub(super) minus_8: i32,
    /// −128 times the sum: what makes unsigned Q8_0 signed.
    pub(super) minus_128: i32,
    /// −32 times the sums of the first and of the second 16 bytes: what makes unsigned Q6_K signed.
    pub(super) minus_32: [i32; 2],
}

impl Group {
    pub(super) const ZERO: Self = Self {
        scale: 0.0,
        scaled_sum: 0.0,
        minus_8: 0,
        minus_128: 0,
        minus_32: [0; 2],
    };

    /// Its numbers as words, in order.
    pub(super) fn words(&self) -> [u32; 6] {
        [
            self.scale.to_bits(),
            self.scaled_sum.to_bits(),
            self.minus_8 as u32,
            self.minus_128 as u32,
            self.minus_32[0] as u32,
            self.minus_32[1] as u32,
        ]
    }
}

/// Groups whose largest magnitude is below this become zero (their scale's inverse would overflow).
const TINY: f32 = 1e-30;

for_each_isa! {
    /// To int8, per group of 32: `scale = max|x| / 127`, nearest even.
    quantise = quantise_body(x: &[f32], bytes: &mut [i8], groups: &mut [Group])
}

#[inline(always)]
fn quantise_body(x: &[f32], bytes: &mut [i8], groups: &mut [Group]) {
    let x = x.as_chunks::<GROUP>().0;
    let bytes = bytes.as_chunks_mut::<GROUP>().0;
    for ((x, bytes), group) in x.iter().zip(bytes).zip(groups) {
        // As integers magnitudes compare like floats, and a NaN is the largest: it cannot vanish.
        let mut max = 0u32;
        for x in x {
            max = max.max(x.to_bits() & 0x7fff_ffff);
        }
        let max = f32::from_bits(max);
        let (scale, inverse) = if max < TINY {
            (0.0, 0.0)
        } else {
            (max / 127.0, 127.0 / max)
        };
        let mut integers = [0i32; GROUP];
        for (integer, &x) in integers.iter_mut().zip(x) {
            *integer = ((x * inverse + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        }
        for (byte, &integer) in bytes.iter_mut().zip(&integers) {
            *byte = integer as i8;
        }
        let halves = [&integers[..GROUP / 2], &integers[GROUP / 2..]]
            .map(|half| half.iter().fold(0i32, |sum, &integer| sum.wrapping_add(integer)));
        let sum = halves[0].wrapping_add(halves[1]);
        *group = Group {
            scale,
            scaled_sum: scale * sum as f32,
            minus_8: sum.wrapping_mul(-8),
            minus_128: sum.wrapping_mul(-128),
            minus_32: halves.map(|sum| sum.wrapping_mul(-32)),
        };
    }
}

for_each_isa! {
    /// `columns` of rows side by side: `[columns][rows]`.
    interleave = interleave_body(x: &[&[f32]], columns: std::ops::Range<usize>, out: &mut [u32])
}

#[inline(always)]
fn interleave_body(x: &[&[f32]], columns: std::ops::Range<usize>, out: &mut [u32]) {
    for (column, out) in columns.zip(out.chunks_exact_mut(x.len())) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = x[column].to_bits();
        }
    }
}

for_each_isa! {
    /// To bf16, as products with bf16 weights want it (see `linear`).
    narrow_activations = narrow_activations_body(x: &[f32], out: &mut [u16])
}

#[inline(always)]
fn narrow_activations_body(x: &[f32], out: &mut [u16]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = bf16_activation(x);
    }
}

for_each_isa! {
    /// Pairs of columns of rows of bf16, side by side: `[pairs][rows]` of both in one word, the even column in the low half, or, `apart`,
    /// `[columns][rows]` of f32. As many as `out` has room for.
    interleave_bf16 = interleave_bf16_body(halves: &[[u16; PACK_COLUMNS]], apart: bool, out: &mut [u32])
}

#[inline(always)]
fn interleave_bf16_body(halves: &[[u16; PACK_COLUMNS]], apart: bool, out: &mut [u32]) {
    let rows = halves.len();
    for (pair, out) in out.chunks_exact_mut(if apart { 2 * rows } else { rows }).enumerate() {
        for (r, halves) in halves.iter().enumerate() {
            let [even, odd] = halves.as_chunks::<2>().0[pair].map(u32::from);
            if apart {
                (out[r], out[rows + r]) = (even << 16, odd << 16);
            } else {
                out[r] = odd << 16 | even;
            }
        }
    }
}

for_each_isa! {
    /// Groups of rows, side by side; per group `[words][rows]`, then `[numbers][rows]`. As many groups as `out` has room for.
    interleave_groups = interleave_groups_body(
        bytes: &[[i8; PACK_COLUMNS]], groups: &[[Group; PACK_COLUMNS / GROUP]], out: &mut [u32]
    )
}

#[inline(always)]
fn interleave_groups_body(bytes: &[[i8; PACK_COLUMNS]], groups: &[[Group; PACK_COLUMNS / GROUP]], out: &mut [u32]) {
    // The number of rows that counts, known when this is compiled.
    match bytes.len() {
        TILE_ROWS => interleave_rows(TILE_ROWS, bytes, groups, out),
        rows => interleave_rows(rows, bytes, groups, out),
    }
}

#[inline(always)]
fn interleave_rows(
    rows: usize,
    bytes: &[[i8; PACK_COLUMNS]],
    groups: &[[Group; PACK_COLUMNS / GROUP]],
    out: &mut [u32],
) {
    let (bytes, groups) = (&bytes[..rows], &groups[..rows]);
    for (g, out) in out.chunks_exact_mut(PACKED_WORDS * rows).enumerate() {
        let (words, numbers) = out.split_at_mut(GROUP / 4 * rows);
        for (i, words) in words.chunks_exact_mut(rows).enumerate() {
            for (out, bytes) in words.iter_mut().zip(bytes) {
                let word = bytes.as_chunks::<4>().0[g * GROUP / 4 + i];
                *out = u32::from_le_bytes(word.map(|byte| byte as u8));
            }
        }
        for (r, groups) in groups.iter().enumerate() {
            for (numbers, number) in numbers.chunks_exact_mut(rows).zip(groups[g].words()) {
                numbers[r] = number;
            }
        }
    }
}

#[cfg(test)]
mod tests;
