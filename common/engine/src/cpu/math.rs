//! Our own exp, sine and cosine, and the fixed order of sums: the same bits on every machine. No libm, no estimates.
//!
//! fma is exact by IEEE 754, whatever computes it, so `mul_add` is allowed; a product and a sum that are written apart are rounded apart.

/// Virtual lanes on which every sum is defined.
pub(crate) const LANES: usize = 16;

/// Sums 16 lanes: lane i takes in i + 8, then i + 4, i + 2, i + 1.
#[inline(always)]
pub(crate) fn tree_sum(mut lanes: [f32; LANES]) -> f32 {
    for distance in [8, 4, 2, 1] {
        for i in 0..distance {
            lanes[i] += lanes[i + distance];
        }
    }
    lanes[0]
}

/// Below this, [`exp`] is 0.
pub(crate) const EXP_LOW: f32 = -87.0;
/// Above this, [`exp`] is infinite.
const EXP_HIGH: f32 = 88.0;
pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// 1.5 × 2^23: adding it rounds to an integer, which then lies in the low bits.
pub(crate) const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has few bits, so that its multiples are exact.
pub(crate) const LN2_HIGH: f32 = 0.693_359_4;
pub(crate) const LN2_LOW: f32 = -2.121_944_4e-4;
/// (e^r − 1 − r) / r² for |r| ≤ ln 2 / 2, highest power first (Cephes, `expf`).
pub(crate) const EXP_POLYNOMIAL: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_5e-1,
    0.5,
];

/// e^x within 2 units in the last place; 0 below [`EXP_LOW`], infinite above [`EXP_HIGH`]. Never subnormal.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_HIGH, x);
    let r = n.mul_add(-LN2_LOW, r);
    let mut p = EXP_POLYNOMIAL[0];
    for c in &EXP_POLYNOMIAL[1..] {
        p = p.mul_add(r, *c);
    }
    let y = p.mul_add(r * r, r) + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    let y = y * power;
    let y = if x < EXP_LOW { 0.0 } else { y };
    if x > EXP_HIGH { f32::INFINITY } else { y }
}

/// (sine, cosine) of an angle in radians, 0 ≤ x < 2^30, within 2^-50 absolute.
#[inline(always)]
pub(crate) fn sin_cos(x: f64) -> (f64, f64) {
    // π/2 in three parts of 33 bits (fdlibm), so that n × part is exact for n < 2^20.
    const PART_1: f64 = 1.570_796_326_734_125_6;
    const PART_2: f64 = 6.077_100_506_303_966e-11;
    const PART_3: f64 = 2.022_266_248_795_950_6e-21;
    let n = round(x * std::f64::consts::FRAC_2_PI);
    let r = n.mul_add(-PART_3, n.mul_add(-PART_2, n.mul_add(-PART_1, x)));
    let z = r * r;
    let sine = polynomial(
        z,
        &[
            1.589_690_995_211_55e-10,
            -2.505_076_025_340_686_3e-8,
            2.755_731_370_707_006_8e-6,
            -1.984_126_982_985_795e-4,
            8.333_333_333_322_49e-3,
            -1.666_666_666_666_663_2e-1,
        ],
    );
    let sine = (z * r).mul_add(sine, r);
    let cosine = polynomial(
        z,
        &[
            -1.135_964_755_778_819_5e-11,
            2.087_572_321_298_175e-9,
            -2.755_731_435_139_066_3e-7,
            2.480_158_728_947_673e-5,
            -1.388_888_888_887_411e-3,
            4.166_666_666_666_66e-2,
        ],
    );
    let cosine = (z * z).mul_add(cosine, z.mul_add(-0.5, 1.0));
    match n as i64 & 3 {
        0 => (sine, cosine),
        1 => (cosine, -sine),
        2 => (-sine, -cosine),
        _ => (-cosine, sine),
    }
}

/// `base` to the power `exponent`, base > 0 and normal, result normal; a few units in the last place.
pub(crate) fn power(base: f64, exponent: f64) -> f64 {
    exp_f64(exponent * ln_f64(base))
}

fn exp_f64(x: f64) -> f64 {
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    let n = round(x * std::f64::consts::LOG2_E);
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    // Taylor to r^14 / 14!: |r| ≤ 0.35 leaves 2^-60.
    let mut sum = 1.0;
    for i in (1..=14).rev() {
        sum = f64::mul_add(sum, r / f64::from(i), 1.0);
    }
    sum * f64::from_bits(((n as i64 + 1023) as u64) << 52)
}

fn ln_f64(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut m = f64::from_bits(bits & ((1 << 52) - 1) | (1023 << 52));
    if m > std::f64::consts::SQRT_2 {
        m *= 0.5;
        exponent += 1;
    }
    // ln m = 2 artanh s; |s| ≤ 0.172, so s^25 / 25 is below 2^-66.
    let s = (m - 1.0) / (m + 1.0);
    let z = s * s;
    let mut sum = 0.0;
    for i in (0..=12).rev() {
        sum = f64::mul_add(sum, z, 1.0 / f64::from(2 * i + 1));
    }
    (exponent as f64).mul_add(std::f64::consts::LN_2, 2.0 * s * sum)
}

/// To the nearest integer, |x| < 2^51.
#[inline(always)]
fn round(x: f64) -> f64 {
    const ROUND: f64 = 6_755_399_441_055_744.0;
    (x + ROUND) - ROUND
}

#[inline(always)]
fn polynomial(z: f64, coefficients: &[f64]) -> f64 {
    coefficients.iter().fold(0.0, |sum, &c| sum.mul_add(z, c))
}

/// To bf16 bits, nearest even; a NaN stays one.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    (if x.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
}

/// An activation that meets bf16 weights: to the nearest bf16, and 0 where that is below 2^-60 (why: `linear`).
#[inline(always)]
pub(crate) fn bf16_activation(x: f32) -> u16 {
    without_tiny::<-60>(to_bf16(x))
}

/// A bf16 weight as it is multiplied: 0 where it is below 2^-40.
#[inline(always)]
pub(crate) fn bf16_weight(bits: u16) -> u16 {
    without_tiny::<-40>(bits)
}

/// 0 instead of magnitudes below 2^`EXPONENT`. Infinities and NaNs stay.
#[inline(always)]
fn without_tiny<const EXPONENT: i32>(bits: u16) -> u16 {
    let least = ((127 + EXPONENT) as u16) << 7;
    if bits & 0x7fff < least { 0 } else { bits }
}

/// From bf16 bits, exact.
#[inline(always)]
pub(crate) fn from_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests;
