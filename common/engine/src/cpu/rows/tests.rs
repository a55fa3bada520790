use super::*;
use crate::cpu::testing::{Random, bits, isas};

/// Lengths around every vector's width.
const LENGTHS: [usize; 12] = [1, 2, 7, 8, 9, 15, 16, 17, 33, 64, 100, 576];

fn close(got: f32, wanted: f64, tolerance: f64) {
    assert!((f64::from(got) - wanted).abs() <= tolerance, "{got} is not {wanted}");
}

#[test]
fn rms_norm_agrees() {
    for len in LENGTHS {
        let mut random = Random::new(len as u64);
        let (x, weight) = (random.floats(len), random.floats(len));
        let mut oracle = vec![0.0; len];
        rms_norm(Isa::Portable, &x, &weight, 1e-5, &mut oracle);
        let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / len as f64;
        let rms = (mean + f64::from(1e-5f32)).sqrt();
        for i in 0..len {
            close(oracle[i], f64::from(x[i]) / rms * f64::from(weight[i]), 2e-6);
        }
        for isa in isas() {
            let mut out = vec![0.0; len];
            rms_norm(isa, &x, &weight, 1e-5, &mut out);
            assert_eq!(bits(&out), bits(&oracle), "{isa}, {len}");
        }
    }
}

#[test]
fn silu_mul_agrees() {
    for len in LENGTHS {
        let mut random = Random::new(len as u64);
        let mut gate: Vec<f32> = random.floats(len).iter().map(|x| x * 20.0).collect();
        let up = random.floats(len);
        gate[0] = [0.0, -0.0, 1e3, -1e3, 87.5, -88.5][len % 6];
        let mut oracle = vec![0.0; len];
        silu_mul(Isa::Portable, &gate, &up, &mut oracle);
        for i in 0..len {
            let wanted = f64::from(gate[i]) / (1.0 + (-f64::from(gate[i])).exp()) * f64::from(up[i]);
            close(oracle[i], wanted, wanted.abs() * 1e-6 + 1e-30);
        }
        for isa in isas() {
            let mut out = vec![0.0; len];
            silu_mul(isa, &gate, &up, &mut out);
            assert_eq!(bits(&out), bits(&oracle), "{isa}, {len}");
        }
    }
}

#[test]
fn add_rotate_and_bf16_agree() {
    for len in LENGTHS {
        let mut random = Random::new(len as u64);
        let (x, delta, angles) = (random.floats(2 * len), random.floats(2 * len), random.floats(len));
        let cosines: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sines: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        for interleaved in [false, true] {
            let mut oracle = x.clone();
            rotate(Isa::Portable, &mut oracle, &cosines, &sines, interleaved);
            for i in 0..len {
                let (a, b) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + len) };
                let [u, v, c, s] = [x[a], x[b], cosines[i], sines[i]].map(f64::from);
                close(oracle[a], u * c - v * s, 3e-7);
                close(oracle[b], u * s + v * c, 3e-7);
            }
            for isa in isas() {
                let mut out = x.clone();
                rotate(isa, &mut out, &cosines, &sines, interleaved);
                assert_eq!(bits(&out), bits(&oracle), "{isa}, {len}");
            }
        }
        let mut narrowed = vec![0; len];
        narrow(Isa::Portable, &x[..len], &mut narrowed);
        for isa in isas() {
            let mut sum = x.clone();
            add(isa, &mut sum, &delta);
            assert!(
                sum.iter()
                    .zip(&x)
                    .zip(&delta)
                    .all(|((sum, x), delta)| *sum == x + delta)
            );
            let mut bf16 = vec![0; len];
            narrow(isa, &x[..len], &mut bf16);
            assert_eq!(bf16, narrowed);
            let mut apart = vec![7; len * 3];
            narrow_apart(isa, &x[..len], apart.as_mut_ptr(), 3);
            assert!(apart.chunks(3).zip(&narrowed).all(|(three, x)| three == [*x, 7, 7]));
        }
    }
}

fn quantised(isa: Isa, x: &[f32]) -> (Vec<i8>, Vec<Group>) {
    let none = Group {
        scale: 9.0,
        scaled_sum: 9.0,
        minus_8: 9,
        minus_128: 9,
        minus_32: [9; 2],
    };
    let (mut bytes, mut groups) = (vec![99; x.len()], vec![none; x.len() / GROUP]);
    quantise(isa, x, &mut bytes, &mut groups);
    (bytes, groups)
}

#[test]
fn quantise_agrees() {
    let mut random = Random::new(5);
    let mut x = random.floats(32 * 40);
    for (i, group) in x.chunks_exact_mut(32).enumerate() {
        let by = [1.0, 1e-20, 1e20, 3e-31, 0.0, 127.0][i % 6];
        group.iter_mut().for_each(|x| *x *= by);
    }
    x[..4].copy_from_slice(&[127.0, 2.5, -3.5, -127.0]);
    let (bytes, groups) = quantised(Isa::Portable, &x);
    assert_eq!(
        (groups[0].scale, &bytes[..4]),
        (1.0, &[127i8, 2, -4, -127][..]),
        "half to even"
    );
    for ((x, bytes), group) in x.chunks_exact(32).zip(bytes.chunks_exact(32)).zip(&groups) {
        let sum: i32 = bytes.iter().map(|&byte| i32::from(byte)).sum();
        assert_eq!((group.minus_8, group.minus_128), (-8 * sum, -128 * sum));
        let halves = [&bytes[..16], &bytes[16..]].map(|half| half.iter().map(|&byte| i32::from(byte)).sum::<i32>());
        assert_eq!(group.minus_32, halves.map(|sum| -32 * sum));
        assert_eq!(group.scaled_sum, group.scale * sum as f32);
        for (x, &byte) in x.iter().zip(bytes) {
            assert!(byte >= -127);
            let error = (x - group.scale * f32::from(byte)).abs();
            assert!(
                error <= group.scale * 0.50001 || x.abs() < TINY,
                "{x} as {byte} * {}",
                group.scale
            );
        }
    }
    for isa in isas() {
        assert_eq!(quantised(isa, &x), (bytes.clone(), groups.clone()), "{isa}");
    }
}

#[test]
fn a_nan_or_an_infinity_does_not_vanish() {
    for isa in isas() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0; 32];
            x[17] = bad;
            assert!(!quantised(isa, &x).1[0].scale.is_finite());
        }
    }
}
