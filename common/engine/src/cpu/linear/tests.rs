use super::*;
use baton_gguf::TensorType;

use crate::cpu::{
    activations::{Activations, Form, PACK_COLUMNS, PackScratch, TILE_ROWS, tile_of, tile_start, tiles},
    math::LANES,
    rows::{GROUP, Group, quantise},
    testing::{OwnedTensor, Random, TYPES, bits, isas, whole_blocks},
    weight::Matrix,
};

struct Rows {
    x: Vec<Vec<f32>>,
    bytes: Vec<i8>,
    groups: Vec<Group>,
}

fn rows(count: usize, k: usize) -> Rows {
    let mut random = Random::new(7);
    quantised_rows((0..count).map(|_| random.floats(k)).collect())
}

fn quantised_rows(x: Vec<Vec<f32>>) -> Rows {
    let k = x[0].len();
    let mut bytes = vec![0; x.len() * k];
    let mut groups = vec![Group::ZERO; x.len() * (k / GROUP)];
    if k.is_multiple_of(GROUP) {
        let groups = groups.chunks_exact_mut(k / GROUP);
        for ((x, bytes), groups) in x.iter().zip(bytes.chunks_exact_mut(k)).zip(groups) {
            quantise(Isa::Portable, x, bytes, groups);
        }
    }
    Rows { x, bytes, groups }
}

/// `count` rows from `first` on in one tile: `[count][n]`.
#[allow(unsafe_code)]
fn multiply(isa: Isa, matrix: &Matrix, rows: &Rows, first: usize, count: usize) -> Vec<Vec<f32>> {
    let k = matrix.k;
    let segment = &matrix.segments[0];
    let activations = Activations::new(count, |_| k).unwrap();
    let form = segment.kind.form();
    let x: Vec<&[f32]> = rows.x[first..first + count].iter().map(|x| &x[..]).collect();
    for start in (0..k).step_by(PACK_COLUMNS) {
        let columns = start..k.min(start + PACK_COLUMNS);
        // SAFETY: nobody else has the rows.
        unsafe { activations.pack(isa, form, 0, k, &x, columns, &mut PackScratch::new()) };
    }
    let mut out = vec![vec![]; count];
    for panel in 0..segment.panels {
        let mut tile_out = vec![f32::NAN; count * LANES];
        let tile = Tile {
            panel: segment.panel(panel),
            shape: segment.shape,
            k,
            rows: count,
            packed: activations.tile(form, 0, count, k),
            out: tile_out.as_mut_ptr(),
            out_stride: LANES,
        };
        // SAFETY: `isa` is one of this CPU's; the vectors have `count` rows.
        unsafe { tile_fn(isa, segment.kind, count)(&tile) };
        for (out, tile) in out.iter_mut().zip(tile_out.chunks_exact(LANES)) {
            out.extend_from_slice(&tile[..LANES.min(matrix.n - panel * LANES)]);
        }
    }
    out
}

#[test]
fn tiles_cover_every_row_once() {
    for rows in 1..=50 {
        let (mut row, mut index) = (0, 0);
        while row < rows {
            let (first, count) = tile_of(row, rows);
            assert_eq!(first, row, "{rows} rows");
            assert!((1..=8).contains(&count) || count == TILE_ROWS, "{rows} rows");
            for inside in first..first + count {
                assert_eq!(tile_of(inside, rows), (first, count), "row {inside} of {rows}");
            }
            assert_eq!(tile_start(index, rows), first);
            row += count;
            index += 1;
        }
        assert_eq!((row, index), (rows, tiles(rows)));
    }
}

#[test]
fn every_isa_and_row_count_gives_the_oracle_s_bits() {
    for dtype in TYPES {
        let quantised = dtype.block().unwrap().0 > 1;
        for (n, k) in [
            (1, 32),
            (16, 64),
            (40, 96),
            (33, 1056),
            (16, if quantised { 32 } else { 13 }),
        ] {
            // Blocks of 256: some are enough.
            let k = whole_blocks(
                dtype,
                if dtype.block().unwrap().0 > GROUP {
                    k.min(160)
                } else {
                    k
                },
            );
            let tensor = OwnedTensor::random(dtype, n, k, 3);
            let matrix = Matrix::repack(&[tensor.tensor()]).unwrap();
            let rows = rows(TILE_ROWS, k);
            let oracle: Vec<_> = (0..TILE_ROWS)
                .map(|row| multiply(Isa::Portable, &matrix, &rows, row, 1).remove(0))
                .collect();
            for isa in isas() {
                for count in (1..=8).chain([TILE_ROWS]) {
                    let first = TILE_ROWS - count;
                    let got = multiply(isa, &matrix, &rows, first, count);
                    for (row, got) in got.iter().enumerate() {
                        assert_eq!(
                            bits(got),
                            bits(&oracle[first + row]),
                            "{isa} {dtype} {n}x{k}, row {row} of {count}"
                        );
                    }
                }
            }
        }
    }
}

/// 16-bit sums hold the largest quants times the largest activations, all of one sign.
#[test]
fn extremes_saturate_nowhere() {
    for dtype in TYPES.into_iter().filter(|dtype| dtype.quant_offset().is_some()) {
        for byte in [0xff, 0x80, 0x00] {
            let k = whole_blocks(dtype, 64);
            let mut tensor = OwnedTensor::random(dtype, LANES, k, 5);
            let (_, block) = dtype.block().unwrap();
            for block in tensor.bytes.chunks_exact_mut(block) {
                let scales = if dtype == TensorType::Q6K { 208..210 } else { 0..2 };
                let kept = [block[scales.start], block[scales.start + 1]];
                block.fill(byte);
                block[scales].copy_from_slice(&kept);
                if matches!(
                    dtype,
                    TensorType::Q4_1 | TensorType::Q5_1 | TensorType::Q4K | TensorType::Q5K
                ) {
                    block[2..4].fill(0x11);
                }
            }
            let matrix = Matrix::repack(&[tensor.tensor()]).unwrap();
            for sign in [1.0, -1.0] {
                let rows = quantised_rows(vec![vec![sign; k]]);
                assert!(rows.bytes.iter().all(|byte| byte.unsigned_abs() == 127));
                let oracle = multiply(Isa::Portable, &matrix, &rows, 0, 1);
                let wanted: f64 = tensor.row(3).iter().map(|&weight| f64::from(weight * sign)).sum();
                assert!(
                    (f64::from(oracle[0][3]) - wanted).abs() <= 1e-4 * wanted.abs().max(1.0),
                    "{dtype} {byte:x}"
                );
                for isa in isas() {
                    assert_eq!(
                        bits(&multiply(isa, &matrix, &rows, 0, 1)[0]),
                        bits(&oracle[0]),
                        "{isa} {dtype}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_oracle_is_the_product() {
    for dtype in TYPES {
        let (n, k) = (
            24,
            whole_blocks(dtype, if dtype.block().unwrap().0 > GROUP { 96 } else { 576 }),
        );
        let tensor = OwnedTensor::random(dtype, n, k, 9);
        let matrix = Matrix::repack(&[tensor.tensor()]).unwrap();
        let rows = rows(2, k);
        for row in 0..2 {
            let got = multiply(Isa::Portable, &matrix, &rows, row, 1).remove(0);
            for (i, got) in got.into_iter().enumerate() {
                let weights = tensor.row(i);
                let (mut wanted, mut magnitude, mut rounding) = (0.0, 0.0, 0.0);
                for (j, &weight) in weights.iter().enumerate() {
                    let (weight, x) = (f64::from(weight), f64::from(rows.x[row][j]));
                    wanted += weight * x;
                    magnitude += (weight * x).abs();
                    if matrix.takes(Form::Quantised) {
                        let scale = rows.groups[(row * k + j) / GROUP].scale;
                        rounding += weight.abs() * f64::from(scale) * 0.5;
                    }
                    if matrix.takes(Form::Bf16) {
                        // To the nearest of eight digits.
                        rounding += (weight * x).abs() / 256.0;
                    }
                }
                let error = (f64::from(got) - wanted).abs();
                // Float rounding grows with the terms, and Q4_1's two large terms may cancel.
                assert!(
                    error <= rounding + 1e-4 * magnitude.max(1.0),
                    "{dtype} row {i}: {got} is not {wanted}"
                );
                if matrix.takes(Form::Quantised) {
                    let exact: f64 = weights
                        .iter()
                        .enumerate()
                        .map(|(j, &weight)| {
                            let scale = rows.groups[(row * k + j) / GROUP].scale;
                            f64::from(weight) * f64::from(scale) * f64::from(rows.bytes[row * k + j])
                        })
                        .sum();
                    assert!(
                        (f64::from(got) - exact).abs() <= 2e-5 * magnitude.max(1.0),
                        "{dtype}: {got} is not {exact}"
                    );
                }
            }
        }
    }
}

/// A product of bf16 by its definition, and of what magnitude a sum has been that was not zero.
fn bf16_product(weights: &[f32], x: &[f32]) -> (f32, f32) {
    let without_tiny = |x: f32, exponent: i32| if x.abs() < 2f32.powi(exponent) { 0.0 } else { x };
    let (mut sum, mut least) = (0.0f32, f32::INFINITY);
    for pair in 0..x.len().div_ceil(2) {
        for i in [2 * pair + 1, 2 * pair].into_iter().filter(|&i| i < x.len()) {
            let weight = without_tiny(weights[i], -40);
            let x = without_tiny(half::bf16::from_f32(x[i]).to_f32(), -60);
            let (fused, apart) = (weight.mul_add(x, sum), weight * x + sum);
            assert_eq!(fused.to_bits(), apart.to_bits(), "the product is not exact");
            sum = fused;
            if sum != 0.0 {
                least = least.min(sum.abs());
            }
        }
    }
    (sum, least)
}

/// Every way to compute it, on the grid's finest numbers, far below it, and where all that is left after a large number goes is small.
#[test]
fn bf16_is_its_definition_and_nothing_is_subnormal() {
    let mut random = Random::new(8);
    let (mut smallest, mut zeros) = (f32::INFINITY, 0);
    // Exponents of weights and of activations; −127 is zero and all that is subnormal.
    for exponents in [[-41..-38, -62..-58], [-127..-30, -127..-40], [-12..0, -20..3]] {
        for k in [1, 2, 13, 96, 195, 400] {
            let mut number = |exponents: &std::ops::Range<i32>| {
                let exponent = exponents.start + (random.bits() >> 33) as i32 % exponents.len() as i32;
                let bits = (random.bits() >> 32) as u32 & 0x807f_ffff;
                f32::from_bits(bits | ((exponent + 127) as u32) << 23)
            };
            let mut x: Vec<Vec<f32>> = (0..3)
                .map(|_| (0..k).map(|_| number(&exponents[1])).collect())
                .collect();
            let mut weights: Vec<half::bf16> = (0..24 * k)
                .map(|_| half::bf16::from_f32(number(&exponents[0])))
                .collect();
            // Every product comes once more, with the other sign, after them all.
            if k % 2 == 0 {
                for x in &mut x {
                    let (first, second) = x.split_at_mut(k / 2);
                    second.copy_from_slice(first);
                }
                for row in weights.chunks_exact_mut(k).step_by(2) {
                    let (first, second) = row.split_at_mut(k / 2);
                    second
                        .iter_mut()
                        .zip(first)
                        .for_each(|(second, first)| *second = -*first);
                }
            }
            let tensor = OwnedTensor {
                rows: 24,
                columns: k,
                dtype: TensorType::Bf16,
                bytes: weights.iter().flat_map(|weight| weight.to_le_bytes()).collect(),
            };
            let matrix = Matrix::repack(&[tensor.tensor()]).unwrap();
            let rows = quantised_rows(x);
            let expected = rows.x.iter().map(|x| {
                let row = |row| {
                    let (sum, least) = bf16_product(&tensor.row(row), x);
                    smallest = smallest.min(least);
                    zeros += usize::from(sum == 0.0);
                    sum
                };
                bits(&(0..24).map(row).collect::<Vec<_>>())
            });
            let expected: Vec<_> = expected.collect();
            for isa in isas() {
                let got: Vec<_> = multiply(isa, &matrix, &rows, 0, 3)
                    .iter()
                    .map(|row| bits(row))
                    .collect();
                assert_eq!(got, expected, "{isa}, {k} columns, {exponents:?}");
            }
        }
    }
    assert!(smallest >= 2f32.powi(-114), "{smallest:e}");
    assert!(
        smallest < 2f32.powi(-98) && zeros > 0,
        "{smallest:e}, {zeros} zeros: nothing was tried"
    );
}

#[test]
fn what_is_no_number_stays_none_in_bf16() {
    for k in [1, 8, 13] {
        let tensor = OwnedTensor::random(TensorType::Bf16, 16, k, 4);
        let matrix = Matrix::repack(&[tensor.tensor()]).unwrap();
        for at in 0..k {
            for wrong in [
                f32::NAN,
                -f32::NAN,
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::from_bits(0x7f80_0001),
            ] {
                let mut x = Random::new(2).floats(k);
                x[at] = wrong;
                let rows = quantised_rows(vec![x]);
                for isa in isas() {
                    let got = multiply(isa, &matrix, &rows, 0, 1).remove(0);
                    assert!(
                        got.iter().all(|x| !x.is_finite()),
                        "{isa}, {wrong} as {at} of {k}: {got:?}"
                    );
                }
            }
        }
    }
}
