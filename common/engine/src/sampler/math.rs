//! exp and ln in plain IEEE operations, and sums over the vocabulary in a fixed order.
//!
//! Without fma, unlike the kernels' functions: this is compiled for the baseline CPU, where an fma is a call per element, while plain
//! operations vectorise and give the same bits everywhere.

/// Virtual lanes: element i is summed in lane i mod 16, then the lanes pairwise.
const LANES: usize = 16;

/// The highest logit; `None` if one is NaN or +∞, or none is finite.
pub(super) fn max_finite(logits: &[f32]) -> Option<f32> {
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut bad = [false; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            bad[lane] |= chunk[lane].is_nan();
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
    let bad = bad.contains(&true) || rest.iter().any(|x| x.is_nan());
    (max.is_finite() && !bad).then_some(max)
}

/// Sum of `exp((x − max) / temperature)` over the elements where that is at least `least`.
pub(super) fn sum_exp(logits: &[f32], max: f32, temperature: f32, least: f32) -> f64 {
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let term = |x: f32| {
        let value = exp((x - max) / temperature);
        f64::from(if value >= least { value } else { 0.0 })
    };
    let mut lanes = [0f64; LANES];
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
    lanes[0]
}

/// e^x for x ≤ 0 (−∞ included), within 2 ulp; below −87 it is 0.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding and subtracting this rounds to an integer, which the sum also holds in its low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the high one has few bits, so that its product with an integer is exact.
    const LN2_HIGH: f32 = 0.693_359_375;
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
    p = p * r + 5.000_000_1e-1;
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
