use super::*;
use crate::cpu::testing::{OwnedTensor, TYPES, bits, whole_blocks};

#[test]
fn rows_are_what_the_format_says() {
    for dtype in TYPES {
        let columns = whole_blocks(dtype, 96);
        let tensor = OwnedTensor::random(dtype, 37, columns, 1);
        let matrix = Matrix::repack(&[tensor.tensor()]).unwrap();
        for row in 0..tensor.rows {
            let mut out = vec![0.0; columns];
            matrix.row(row, &mut out);
            assert_eq!(bits(&out), bits(&tensor.row(row)), "{dtype} row {row}");
        }
    }
}

#[test]
fn bf16_stays_bf16_and_an_odd_row_ends_in_zero() {
    for (columns, words) in [(1, 1), (2, 1), (13, 7)] {
        let tensor = OwnedTensor::random(TensorType::Bf16, 18, columns, 1);
        let matrix = Matrix::repack(&[tensor.tensor()]).unwrap();
        let panels = matrix.segments[0].bytes();
        assert_eq!(panels.len(), 2 * words * LANES * 4, "two panels of {columns} columns");
        let mut out = vec![0.0; columns];
        matrix.row(17, &mut out);
        assert_eq!(bits(&out), bits(&tensor.row(17)), "{columns} columns");
        let (last, _) = panels[panels.len() - LANES * 4..].as_chunks::<4>();
        let padded = |word: &[u8; 4]| word[2..] == [0, 0];
        assert!(columns % 2 == 0 || last.iter().all(padded), "{columns} columns");
    }
}

#[test]
fn tiny_bf16_is_zero_and_what_is_no_number_stays() {
    // Below 2^-40 of either sign, subnormal, and the largest of these; 2^-40, and an infinity and a NaN.
    let weights: [u16; 9] = [0x8000, 0x0001, 0xab7f, 0x2b7f, 0x2b80, 0xab80, 0xff80, 0x7f81, 0x3f80];
    let kept: [u16; 9] = [0, 0, 0, 0, 0x2b80, 0xab80, 0xff80, 0x7f81, 0x3f80];
    let tensor = OwnedTensor {
        rows: 1,
        columns: weights.len(),
        dtype: TensorType::Bf16,
        bytes: weights.map(u16::to_le_bytes).concat(),
    };
    let mut row = vec![1.0; weights.len()];
    Matrix::repack(&[tensor.tensor()]).unwrap().row(0, &mut row);
    assert_eq!(bits(&row), kept.map(|bits| u32::from(bits) << 16));
}

#[test]
fn stacked_parts_of_different_types_keep_their_rows() {
    let parts = [
        OwnedTensor::random(TensorType::Q4_1, 32, 64, 1),
        OwnedTensor::random(TensorType::F16, 16, 64, 2),
        OwnedTensor::random(TensorType::Q8_0, 20, 64, 3),
    ];
    let matrix = Matrix::repack(&parts.each_ref().map(OwnedTensor::tensor)).unwrap();
    assert_eq!((matrix.n, matrix.k, matrix.panels()), (68, 64, 5));
    let mut out = vec![0.0; 64];
    for (row, (part, part_row)) in [(0, (0, 0)), (31, (0, 31)), (32, (1, 0)), (48, (2, 0)), (67, (2, 19))] {
        matrix.row(row, &mut out);
        assert_eq!(bits(&out), bits(&parts[part].row(part_row)), "row {row}");
    }
}

#[test]
fn impossible_shapes_and_types_are_refused() {
    let good = OwnedTensor::random(TensorType::Q8_0, 16, 64, 1);
    let odd_rows = OwnedTensor::random(TensorType::Q8_0, 20, 64, 1);
    let other_columns = OwnedTensor::random(TensorType::Q8_0, 16, 32, 1);
    let refused = |parts: &[Tensor<'_>]| Matrix::repack(parts).map(|_| ()).unwrap_err();
    let shape = |error| matches!(error, LoadError::Shape { .. });
    assert!(shape(refused(&[odd_rows.tensor(), good.tensor()])));
    assert!(shape(refused(&[other_columns.tensor(), good.tensor()])));
    assert!(
        shape(refused(&[Tensor {
            columns: 48,
            ..good.tensor()
        }])),
        "k is no multiple of 32"
    );
    assert!(
        shape(refused(&[Tensor {
            rows: 15,
            ..good.tensor()
        }])),
        "bytes and shape differ"
    );
    assert!(shape(refused(&[Tensor {
        rows: 0,
        bytes: &[],
        ..good.tensor()
    }])));
    assert!(matches!(
        refused(&[Tensor {
            dtype: TensorType::Other(99),
            ..good.tensor()
        }]),
        LoadError::Type { .. }
    ));
    assert!(matches!(refused(&[]), LoadError::Config(_)));
}

/// Whoever changes a panel's bytes must name the new format, or panels of the old one would be taken from a cache.
#[test]
fn panels_are_those_of_their_format() {
    let mut hasher = blake3::Hasher::new();
    for dtype in TYPES {
        let tensor = OwnedTensor::random(dtype, 37, whole_blocks(dtype, 96), 1);
        let matrix = Matrix::repack(&[tensor.tensor()]).unwrap();
        hasher.update(matrix.segments[0].bytes());
    }
    assert_eq!(
        (plan::PANEL_FORMAT, hasher.finalize().to_hex().as_str()),
        (
            "panels 2",
            "a8fff819a3d41253cbaef001ab93a76a949f036990f5aca03658ebd165f29a87"
        )
    );
}

#[test]
fn threads_change_no_byte_and_progress_counts_the_file_s() {
    let parts = [
        OwnedTensor::random(TensorType::Q4_1, 4096, 640, 1),
        OwnedTensor::random(TensorType::Bf16, 1000, 640, 2),
    ];
    let total: u64 = parts.iter().map(|part| part.bytes.len() as u64).sum();
    let packed = |threads| {
        let mut plan = WeightPlan::default();
        plan.add(&parts.each_ref().map(OwnedTensor::tensor)).unwrap();
        let seen = std::sync::Mutex::new(Vec::new());
        let loading = Loading {
            cache: None,
            threads,
            report: &|progress| seen.lock().unwrap().push(progress),
        };
        let matrix = plan.load(loading).unwrap().remove(0);
        let seen = seen.into_inner().unwrap();
        assert!(seen.len() > 3 && seen.is_sorted_by_key(|progress| progress.done));
        assert!(seen.iter().all(|progress| progress.total == total));
        assert_eq!(seen.last().unwrap().done, total);
        matrix
    };
    let (one, three) = (packed(1), packed(3));
    for (one, three) in one.segments.iter().zip(&three.segments) {
        assert!(one.bytes() == three.bytes());
    }
}

#[test]
fn panels_of_other_weights_shapes_or_names_are_called_otherwise() {
    let tensor = OwnedTensor::random(TensorType::Q8_0, 32, 64, 1);
    let key = |parts: &[Tensor<'_>], weights: &[u8]| {
        let mut plan = WeightPlan::default();
        for part in parts {
            plan.add(&[*part]).unwrap();
        }
        plan.key(&blake3::hash(weights))
    };
    let own = tensor.tensor();
    let keys = [
        key(&[own], b"a"),
        key(&[own], b"b"),
        key(&[own, own], b"a"),
        key(&[Tensor { name: "other", ..own }], b"a"),
        key(
            &[Tensor {
                rows: 16,
                columns: 128,
                ..own
            }],
            b"a",
        ),
    ];
    for (i, key) in keys.iter().enumerate() {
        assert!(!keys[..i].contains(key), "{i}");
    }
    assert_eq!(key(&[own], b"a"), keys[0]);
}

#[test]
fn groups_are_as_many_cache_lines_as_prefetches_count() {
    for dtype in TYPES.into_iter().filter(|dtype| dtype.quant_offset().is_some()) {
        let kind = PanelKind::of(dtype).unwrap();
        assert_eq!(kind.group_lines() * 64, kind.shape(256).quants_stride, "{dtype}");
    }
}
