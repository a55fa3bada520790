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

/// bf16 computes what its widened weights do, bit for bit.
#[test]
fn bf16_is_f32_in_half_the_bytes() {
    for k in [1, 13, 96] {
        let narrow = OwnedTensor::random(TensorType::Bf16, 24, k, 4);
        let values: Vec<f32> = (0..narrow.rows).flat_map(|row| narrow.row(row)).collect();
        let wide = Matrix::repack(&[OwnedTensor::floats(24, k, &values).tensor()]).unwrap();
        let narrow = Matrix::repack(&[narrow.tensor()]).unwrap();
        let rows = rows(3, k);
        let wanted = multiply(Isa::Portable, &wide, &rows, 0, 3);
        for isa in isas() {
            for (got, wanted) in multiply(isa, &narrow, &rows, 0, 3).iter().zip(&wanted) {
                assert_eq!(bits(got), bits(wanted), "{isa}, {k} columns");
            }
        }
    }
}
