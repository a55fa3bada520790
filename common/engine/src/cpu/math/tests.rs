use super::*;

/// Distance in units in the last place of the f32 nearest to `wanted`.
fn ulps(got: f32, wanted: f64) -> f64 {
    let near = wanted as f32;
    let unit = f64::from(near.next_up()) - f64::from(near);
    (f64::from(got) - wanted).abs() / unit
}

#[test]
fn exp_is_within_two_ulps() {
    let mut worst = 0.0f64;
    let mut x = EXP_LOW;
    while x <= EXP_HIGH {
        worst = worst.max(ulps(exp(x), f64::from(x).exp()));
        x += 0.000_371;
    }
    for i in 0..200_000u32 {
        let x = -(i as f32) * 1e-5;
        worst = worst.max(ulps(exp(x), f64::from(x).exp()));
    }
    assert!(worst < 2.0, "{worst} ulp");
}

#[test]
fn exp_at_its_limits() {
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(-0.0), 1.0);
    assert_eq!(exp(EXP_LOW.next_down()), 0.0);
    assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(exp(EXP_HIGH.next_up()), f32::INFINITY);
    assert_eq!(exp(f32::INFINITY), f32::INFINITY);
    assert!(exp(EXP_LOW).is_normal() && exp(EXP_HIGH).is_normal());
    assert!(exp(f32::NAN).is_nan());
}

#[test]
fn sin_cos_of_long_contexts() {
    for i in 0..300_000u32 {
        let x = f64::from(i) * 0.777_123;
        let (sine, cosine) = sin_cos(x);
        assert!((sine - x.sin()).abs() < 1e-15, "sin {x}");
        assert!((cosine - x.cos()).abs() < 1e-15, "cos {x}");
    }
    let (sine, cosine) = sin_cos(1_048_575.0);
    assert!((sine - 1_048_575f64.sin()).abs() < 1e-15 && (cosine - 1_048_575f64.cos()).abs() < 1e-15);
}

#[test]
fn power_for_rope_bases() {
    for base in [10_000.0, 100_000.0, 500_000.0, 1_000_000.0] {
        for i in 0..128 {
            let exponent = -f64::from(i) / 128.0;
            let wanted = f64::powf(base, exponent);
            assert!(
                (power(base, exponent) / wanted - 1.0).abs() < 1e-14,
                "{base}^{exponent}"
            );
        }
    }
}

#[test]
fn tree_sum_has_its_order() {
    let mut lanes = [0.0; LANES];
    lanes[0] = 1.0;
    lanes[8] = 1e8;
    lanes[4] = -1e8;
    // (1 + 1e8) rounds to 1e8 first.
    assert_eq!(tree_sum(lanes), 0.0);
}

#[test]
fn bf16_agrees_with_half() {
    for i in 0..=u16::MAX {
        for low in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let x = f32::from_bits(u32::from(i) << 16 | low);
            let (got, wanted) = (to_bf16(x), half::bf16::from_f32(x));
            if x.is_nan() {
                assert!(from_bf16(got).is_nan());
            } else {
                assert_eq!(got, wanted.to_bits(), "{x:e}");
            }
        }
        let (got, wanted) = (from_bf16(i), half::bf16::from_bits(i).to_f32());
        assert!(got.to_bits() == wanted.to_bits() || got.is_nan() && wanted.is_nan());
    }
}

#[test]
fn tiny_activations_are_zero() {
    let least = 2f32.powi(-60);
    // Rounding comes first.
    for (x, kept) in [
        (least, least),
        (least.next_down(), least),
        (least * (1.0 - 1.0 / 256.0), 0.0),
        (1e-40, 0.0),
    ] {
        for sign in [1.0, -1.0] {
            let got = from_bf16(bf16_activation(sign * x));
            assert!(
                got == sign * kept && (kept != 0.0 || got.to_bits() == 0),
                "{x:e}: {got:e}"
            );
        }
    }
}
