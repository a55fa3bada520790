//! exp and ln in plain IEEE operations, and sums over the vocabulary in a fixed order.
//!
//! Without fma, unlike the kernels' functions: on a baseline CPU an fma is a call per element, while plain operations vectorise and give the same bits
//! everywhere. What goes over the whole vocabulary is compiled for wider vectors too.

/// Virtual lanes: element i is summed in lane i mod 16.
const LANES: usize = 16;

/// Elements whose terms are summed in f32 before they go into an f64.
pub(crate) const RUN: usize = 1024;

/// Compiles `$body` for wider vectors too, and takes the widest that the CPU has. Nothing else differs.
macro_rules! wide {
    ($(#[$doc:meta])* $name:ident = $body:ident($($arg:ident: $type:ty),*) -> $result:ty) => {
        $(#[$doc])*
        pub(super) fn $name($($arg: $type),*) -> $result {
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            {
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $type),*) -> $result {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($arg: $type),*) -> $result {
                    $body($($arg),*)
                }
                use std::arch::is_x86_feature_detected as has;
                if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                    // SAFETY: the CPU has these.
                    return unsafe { avx512($($arg),*) };
                }
                if has!("avx2") {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}

/// The highest logit; `None` if one is NaN or +∞, or none is finite.
pub(super) fn max_finite(logits: &[f32]) -> Option<f32> {
    let max = max(logits);
    max.is_finite().then_some(max)
}

/// The higher of two; NaN if one is.
pub(crate) fn higher(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

wide! {
    /// The highest logit; NaN if one is, −∞ if there is none.
    max = max_body(logits: &[f32]) -> f32
}

#[inline(always)]
fn max_body(logits: &[f32]) -> f32 {
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut bad = [0u32; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            bad[lane] |= u32::from(chunk[lane].is_nan());
            max[lane] = if chunk[lane] > max[lane] {
                chunk[lane]
            } else {
                max[lane]
            };
        }
    }
    let max = max
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max });
    let bad = bad.contains(&1) || rest.iter().any(|x| x.is_nan());
    if bad { f32::NAN } else { max }
}

wide! {
    /// The first element that equals `value`.
    position = position_body(logits: &[f32], value: f32) -> Option<usize>
}

#[inline(always)]
fn position_body(logits: &[f32], value: f32) -> Option<usize> {
    // Whole runs are compared without a branch.
    let run = logits
        .chunks(RUN)
        .position(|run| run.iter().fold(false, |found, &x| found | (x == value)))?;
    logits[run * RUN..]
        .iter()
        .position(|&x| x == value)
        .map(|at| run * RUN + at)
}

wide! {
    /// Sum of `exp((x − max) / temperature)` over the elements where that is at least `least`: per run of 1024 elements on 16 lanes, then the
    /// lanes pairwise, then the runs in order.
    sum_exp = sum_exp_body(logits: &[f32], max: f32, temperature: f32, least: f32) -> f64
}

#[inline(always)]
fn sum_exp_body(logits: &[f32], max: f32, temperature: f32, least: f32) -> f64 {
    if temperature == 1.0 {
        sum_of(logits, |x| at_least(exp(x - max), least))
    } else {
        sum_of(logits, |x| at_least(exp((x - max) / temperature), least))
    }
}

#[inline(always)]
fn at_least(value: f32, least: f32) -> f32 {
    if value >= least { value } else { 0.0 }
}

#[inline(always)]
fn sum_of(logits: &[f32], term: impl Fn(f32) -> f32) -> f64 {
    let mut sum = 0.0;
    for run in logits.chunks(RUN) {
        let (chunks, rest) = run.as_chunks::<LANES>();
        let mut lanes = [0f32; LANES];
        for chunk in chunks {
            for lane in 0..LANES {
                lanes[lane] += term(chunk[lane]);
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane += term(x);
        }
        let mut width = LANES;
        while width > 1 {
            width /= 2;
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        sum += f64::from(lanes[0]);
    }
    sum
}

/// e^x for x ≤ 0 (−∞ included), within 2 ulp; below −87 it is 0.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding and subtracting this rounds to an integer, which the sum also holds in its low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the high one has few bits, so that its product with an integer is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    // Minimax polynomial of (e^r − 1 − r) / r² on |r| ≤ ln 2 / 2 (Cephes expf).
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let mantissa = p * (r * r) + r + 1.0;
    // n as an integer is the distance of the shifted bits from those of ROUND.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let scale = f32::from_bits(n.wrapping_add(127) << 23);
    if x > -87.0 { mantissa * scale } else { 0.0 }
}

/// ln x for normal x > 0, within 1e-15 of relative or absolute error.
pub(super) fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut mantissa = f64::from_bits(bits & 0x000F_FFFF_FFFF_FFFF | 0x3FF0_0000_0000_0000);
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    // ln m = 2 artanh(s), s = (m − 1) / (m + 1), |s| < 0.1716: the series to s^21 is exact to the last bits.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    let mut series = 0.0;
    for denominator in (1..=21).rev().step_by(2) {
        series = series * square + 1.0 / f64::from(denominator);
    }
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * s * series
}
