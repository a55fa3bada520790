use std::path::PathBuf;

use proptest::prelude::*;

use crate::{Array, DequantizeError, Gguf, GgufError, GgufWriter, Tensor, TensorType, Value, dequantize};

fn small() -> GgufWriter {
    GgufWriter::new()
        .string("general.architecture", "llama")
        .u32("llama.block_count", 2)
        .f32("llama.eps", 1e-5)
        .value("flag", Value::Bool(true))
        .value("negative", Value::I32(-1))
        .value("wide", Value::U64(1 << 40))
        .strings("words", &["a", "", "è"])
        .value("types", Value::Array(Array::I32(vec![1, 3, 1])))
        .value("scores", Value::Array(Array::F32(vec![0.5, -1.0])))
        .value("bits", Value::Array(Array::Bool(vec![true, false])))
        .tensor_f32("norm", 1, 3, &[1.0, 2.0, 3.0])
        .tensor_f32("matrix", 2, 3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        .tensor("packed", &[32, 2], TensorType::Q8_0, vec![7; 68])
        .tensor("unknown", &[5], TensorType::Other(77), vec![9; 5])
}

fn open(file: GgufWriter) -> Result<Gguf, GgufError> {
    Gguf::from_bytes(file.finish())
}

#[test]
fn streams_what_it_writes_in_memory() {
    let metadata = || GgufWriter::new().string("general.architecture", "llama").u32("n", 3);
    let tensors: [(_, u64, u64, _); 3] = [
        ("norm", 3, 1, TensorType::F32),
        ("matrix", 64, 5, TensorType::Q4_1),
        ("last", 32, 2, TensorType::Q8_0),
    ];
    let bytes = |name: &str, len: usize| -> Vec<u8> { (0..len).map(|i| i as u8 ^ name.as_bytes()[0]).collect() };
    let whole = tensors
        .iter()
        .fold(metadata(), |writer, &(name, columns, rows, dtype)| {
            let dimensions: &[u64] = if rows == 1 { &[columns] } else { &[columns, rows] };
            let len = dtype.row_bytes(columns as usize).unwrap() * rows as usize;
            writer.tensor(name, dimensions, dtype, bytes(name, len))
        });
    let streamed = tensors.map(|(name, columns, rows, dtype)| (name.to_owned(), columns, rows, dtype));
    let mut out = Vec::new();
    metadata().stream(&mut out, &streamed, bytes).unwrap();
    assert_eq!(out, whole.finish());
}

#[test]
fn reads_what_was_written() {
    let gguf = open(small()).unwrap();
    assert_eq!(gguf.version(), 3);
    assert_eq!(gguf.string("general.architecture").unwrap(), "llama");
    assert_eq!(gguf.u32("llama.block_count").unwrap(), 2);
    assert_eq!(gguf.f32("llama.eps").unwrap(), 1e-5);
    assert!(gguf.bool("flag").unwrap());
    assert_eq!(gguf.u64("wide").unwrap(), 1 << 40);
    assert_eq!(gguf.array_string("words").unwrap(), ["a", "", "è"]);
    assert_eq!(gguf.array_u32("types").unwrap(), [1, 3, 1]);
    assert_eq!(gguf.array_f32("scores").unwrap(), [0.5, -1.0]);
    assert_eq!(gguf.array("bits").unwrap(), &Array::Bool(vec![true, false]));
    assert_eq!(gguf.metadata_all().count(), 10);

    let matrix = gguf.tensor("matrix").unwrap();
    assert_eq!(
        (matrix.rows, matrix.columns, matrix.dtype, matrix.bytes.len()),
        (2, 3, TensorType::F32, 24)
    );
    let mut row = [0.0; 3];
    dequantize(&matrix, 1, &mut row).unwrap();
    assert_eq!(row, [4.0, 5.0, 6.0]);
    assert_eq!(gguf.tensor("norm").unwrap().rows, 1);
    assert_eq!(gguf.tensor("packed").unwrap().bytes, [7; 68]);
    let unknown = gguf.tensor("unknown").unwrap();
    assert_eq!((unknown.dtype, unknown.bytes.len()), (TensorType::Other(77), 0));
    assert!(gguf.tensor("absent").is_none());
}

#[test]
fn opens_a_mapped_file_and_version_2() {
    let mut bytes = small().finish();
    bytes[4] = 2;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &bytes).unwrap();
    let gguf = Gguf::open(file.path()).unwrap();
    assert_eq!((gguf.version(), gguf.bytes_all()), (2, bytes.as_slice()));
}

#[test]
fn what_is_no_model_file_is_refused() {
    assert!(matches!(
        Gguf::open(std::path::Path::new("/does/not/exist")),
        Err(GgufError::Io(_))
    ));
    assert!(matches!(Gguf::open(&std::env::temp_dir()), Err(GgufError::Io(_))));
    let empty = tempfile::NamedTempFile::new().unwrap();
    assert!(matches!(Gguf::open(empty.path()), Err(GgufError::Truncated { .. })));
    assert!(matches!(Gguf::from_bytes(b"GGML....".to_vec()), Err(GgufError::Magic)));
    for version in [0, 1, 4, 3u32.swap_bytes()] {
        let mut bytes = small().finish();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        assert!(matches!(Gguf::from_bytes(bytes), Err(GgufError::Version(v)) if v == version));
    }
}

#[test]
fn typed_getters_name_the_key() {
    let gguf = open(small()).unwrap();
    let check = |error: GgufError, message: &str| {
        assert_eq!(error.to_string(), message);
        assert_eq!(error.code(), "model_metadata_unusable");
    };
    check(gguf.u32("absent").unwrap_err(), "metadata key 'absent' is missing");
    check(
        gguf.u32("negative").unwrap_err(),
        "metadata key 'negative' is the number I32(-1), not a 32-bit unsigned integer",
    );
    check(
        gguf.u32("wide").unwrap_err(),
        "metadata key 'wide' is the number U64(1099511627776), not a 32-bit unsigned integer",
    );
    check(
        gguf.string("flag").unwrap_err(),
        "metadata key 'flag' is the boolean true, not a string",
    );
    check(
        gguf.array_string("types").unwrap_err(),
        "metadata key 'types' is an array of 3 integers, not an array of strings",
    );
    check(
        gguf.f32("general.architecture").unwrap_err(),
        "metadata key 'general.architecture' is a string, not a floating-point number",
    );
}

#[test]
fn truncation_at_every_byte_is_an_error() {
    // The last tensor's type is unknown, so its end is not checked: leave it out.
    let bytes = GgufWriter::new()
        .strings("words", &["a", "b"])
        .tensor_f32("m", 2, 16, &[1.0; 32])
        .finish();
    assert!(Gguf::from_bytes(bytes.clone()).is_ok());
    for len in 0..bytes.len() {
        let error = Gguf::from_bytes(bytes[..len].to_vec()).unwrap_err();
        assert!(
            matches!(error, GgufError::Truncated { .. } | GgufError::Placement { .. }),
            "{len}: {error}"
        );
    }
}

/// A header with these counts and then `rest`.
fn raw(tensors: u64, entries: u64, rest: &[&[u8]]) -> Result<Gguf, GgufError> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend(tensors.to_le_bytes());
    bytes.extend(entries.to_le_bytes());
    bytes.extend(rest.concat());
    Gguf::from_bytes(bytes)
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

#[test]
fn absurd_counts_cost_no_memory() {
    let huge = u64::MAX.to_le_bytes();
    let array = |element: u32, len: u64| {
        raw(
            0,
            1,
            &[
                &text("k"),
                &9u32.to_le_bytes(),
                &element.to_le_bytes(),
                &len.to_le_bytes(),
            ],
        )
        .unwrap_err()
    };
    assert!(matches!(raw(u64::MAX, 0, &[]), Err(GgufError::TooLarge { .. })));
    assert!(matches!(raw(0, u64::MAX, &[]), Err(GgufError::TooLarge { .. })));
    assert!(matches!(raw(1 << 20, 0, &[]), Err(GgufError::Truncated { .. })));
    assert!(matches!(raw(0, 1, &[&huge]), Err(GgufError::TooLarge { .. })));
    assert!(matches!(
        raw(0, 1, &[&text("k"), &8u32.to_le_bytes(), &huge]),
        Err(GgufError::TooLarge { .. })
    ));
    assert!(matches!(array(8, u64::MAX), GgufError::TooLarge { .. }));
    for element in [0, 7, 8, 12] {
        assert!(matches!(array(element, 8 << 20), GgufError::Truncated { .. }));
    }
}

#[test]
fn malformed_metadata_is_refused() {
    let value = |value_type: u32, bytes: &[u8]| raw(0, 1, &[&text("k"), &value_type.to_le_bytes(), bytes]).unwrap_err();
    assert!(matches!(value(13, &[0; 16]), GgufError::ValueType { found: 13, .. }));
    let nested = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat();
    assert!(matches!(value(9, &nested), GgufError::ValueType { found: 9, .. }));
    assert!(matches!(value(7, &[2]), GgufError::Bool { .. }));
    assert!(matches!(
        value(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]),
        GgufError::Utf8 { .. }
    ));
    assert!(matches!(
        open(small().u32("flag", 1)),
        Err(GgufError::Duplicate {
            what: "metadata key",
            ..
        })
    ));
    for alignment in [0, 3, 48, 1 << 30] {
        assert!(matches!(
            open(small().u32("general.alignment", alignment)),
            Err(GgufError::Alignment(_))
        ));
    }
    assert!(matches!(
        open(small().string("general.alignment", "32")),
        Err(GgufError::WrongType { .. })
    ));
}

#[test]
fn impossible_tensors_are_refused() {
    let shape =
        |dimensions: &[u64], dtype| open(GgufWriter::new().tensor("t", dimensions, dtype, vec![0; 64])).unwrap_err();
    for dimensions in [
        &[][..],
        &[0],
        &[4, 0],
        &[u64::MAX, 2],
        &[1 << 40, 1 << 40],
        &[1 << 62, 1],
    ] {
        let error = shape(dimensions, TensorType::F32);
        assert!(
            matches!(error, GgufError::Shape { .. } | GgufError::Placement { .. }),
            "{dimensions:?}: {error}"
        );
    }
    assert!(matches!(
        shape(&[1, 1, 1, 1, 1], TensorType::F32),
        GgufError::TooLarge { .. }
    ));
    assert!(matches!(shape(&[33], TensorType::Q8_0), GgufError::Shape { .. }));
    assert!(matches!(shape(&[1000], TensorType::F32), GgufError::Placement { .. }));
    let twice = small().tensor_f32("norm", 1, 1, &[1.0]);
    assert!(matches!(open(twice), Err(GgufError::Duplicate { what: "tensor", .. })));
    // The first tensor claims more than it has, and so reaches into the second.
    let overlap = GgufWriter::new()
        .tensor("a", &[16], TensorType::F32, vec![0; 32])
        .tensor_f32("b", 1, 8, &[0.0; 8]);
    assert!(matches!(open(overlap), Err(GgufError::Placement { name, .. }) if name == "b"));

    let place = |offset: u64| {
        let dimension = [
            &1u32.to_le_bytes()[..],
            &4u64.to_le_bytes(),
            &0u32.to_le_bytes(),
            &offset.to_le_bytes(),
        ]
        .concat();
        raw(1, 0, &[&text("t"), &dimension, &[0; 64]])
    };
    assert!(place(0).is_ok());
    for offset in [1, 16, 64, u64::MAX, u64::MAX - 31] {
        assert!(matches!(place(offset), Err(GgufError::Placement { .. })), "{offset}");
    }
}

fn tensor(dtype: TensorType, columns: usize, bytes: &[u8]) -> Tensor<'_> {
    Tensor {
        name: "t",
        rows: 1,
        columns,
        dtype,
        bytes,
    }
}

#[test]
fn dequantizes_by_each_types_definition() {
    fn check(dtype: TensorType, bytes: &[u8], expected: &[f32]) {
        let mut out = vec![0.0; expected.len()];
        dequantize(&tensor(dtype, expected.len(), bytes), 0, &mut out).unwrap();
        assert_eq!(out, expected, "{dtype}");
    }
    check(TensorType::F32, &1.5f32.to_le_bytes(), &[1.5]);
    check(TensorType::F16, &[0x00, 0x3e, 0x01, 0x00], &[1.5, 2f32.powi(-24)]);
    check(TensorType::Bf16, &[0xc0, 0x3f], &[1.5]);
    // d = 0.5, m = -1; low nibbles 0..16, high nibbles 15..0.
    let nibbles: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
    let quants: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| q as f32).collect();
    check(
        TensorType::Q4_0,
        &[&[0x00, 0x38], nibbles.as_slice()].concat(),
        &quants.iter().map(|q| (q - 8.0) * 0.5).collect::<Vec<_>>(),
    );
    let q4_1 = [&[0x00, 0x38, 0x00, 0xbc], nibbles.as_slice()].concat();
    check(
        TensorType::Q4_1,
        &q4_1,
        &quants.iter().map(|q| q * 0.5 - 1.0).collect::<Vec<_>>(),
    );
    let signed: Vec<u8> = (-16i8..16).map(|q| q as u8).collect();
    check(
        TensorType::Q8_0,
        &[&[0x00, 0x38], signed.as_slice()].concat(),
        &(-16..16).map(|q| q as f32 * 0.5).collect::<Vec<_>>(),
    );
}

#[test]
fn dequantize_refuses_what_does_not_fit() {
    let bytes = [0; 210];
    let mut out = [0.0; 256];
    {
        let dtype = TensorType::Other(5);
        let error = dequantize(&tensor(dtype, 256, &bytes), 0, &mut out).unwrap_err();
        assert_eq!(
            error,
            DequantizeError::Unsupported {
                name: "t".into(),
                dtype
            }
        );
    }
    let row = tensor(TensorType::F32, 2, &bytes[..8]);
    assert!(matches!(
        dequantize(&row, 1, &mut out[..2]),
        Err(DequantizeError::Row { .. })
    ));
    assert!(matches!(
        dequantize(&row, 0, &mut out[..3]),
        Err(DequantizeError::Columns { .. })
    ));
}

/// Bit for bit what the `gguf` Python package makes of random blocks.
#[test]
fn dequantizes_blocks_of_every_quantised_type() {
    let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/blocks.txt"));
    let hex = |text: &str| -> Vec<u8> {
        let digits = text.as_bytes().as_chunks::<2>().0;
        let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.iter().map(byte).collect()
    };
    let mut seen = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let [name, bytes, numbers] = line.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        let dtype = (0..40)
            .map(TensorType::from_number)
            .find(|dtype| dtype.to_string() == name);
        let (dtype, bytes, numbers) = (dtype.unwrap(), hex(bytes), hex(numbers));
        let numbers: Vec<u32> = numbers.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
        let mut out = vec![0.0f32; numbers.len()];
        dequantize(&tensor(dtype, numbers.len(), &bytes), 0, &mut out).unwrap();
        let bits: Vec<u32> = out.iter().map(|x| x.to_bits()).collect();
        // Apart from the sign of a zero, which no sum can tell.
        for (i, (got, wanted)) in bits.iter().zip(&numbers).enumerate() {
            assert!(
                got == wanted || (got | wanted) << 1 == 0,
                "{name} {i}: {got:x} {wanted:x}"
            );
        }
        seen.push(dtype);
    }
    let quantised = |dtype: &TensorType| dtype.quant_offset().is_some();
    let all: Vec<TensorType> = (0..40).map(TensorType::from_number).filter(quantised).collect();
    assert!(all.iter().all(|dtype| seen.contains(dtype)) && seen.len() == all.len());
}

fn default_model() -> Gguf {
    let path = std::env::var_os("BATON_MODEL").map_or_else(
        || {
            PathBuf::from(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../.models/SmolLM2-135M-Instruct.Q4_1.gguf"
            ))
        },
        PathBuf::from,
    );
    Gguf::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn reads_the_default_model() {
    let gguf = default_model();
    assert_eq!(gguf.tensors().len(), 272);
    assert_eq!(gguf.string("general.architecture").unwrap(), "llama");
    assert_eq!(gguf.array_string("tokenizer.ggml.tokens").unwrap().len(), 49152);
    let down = gguf.tensor("blk.0.ffn_down.weight").unwrap();
    assert_eq!((down.rows, down.columns, down.dtype), (576, 1536, TensorType::Q4_1));
    let head = gguf.tensor("token_embd.weight").unwrap();
    assert_eq!((head.rows, head.columns, head.dtype), (49152, 576, TensorType::Q8_0));
    let end = gguf
        .tensors()
        .iter()
        .map(|tensor| tensor.start + tensor.len)
        .max()
        .unwrap();
    assert_eq!(end, gguf.bytes_all().len());
}

/// Bit for bit what the `gguf` Python package makes of the same rows.
#[test]
fn dequantizes_the_default_model() {
    let gguf = default_model();
    let check = |name: &str, row: usize, expected: u32| {
        let tensor = gguf.tensor(name).unwrap();
        let mut out = vec![0.0; tensor.columns];
        dequantize(&tensor, row, &mut out).unwrap();
        let mixed = out
            .iter()
            .fold(0u32, |mixed, value| mixed.rotate_left(5) ^ value.to_bits());
        assert_eq!(mixed, expected, "{name} row {row}");
    };
    check("token_embd.weight", 49151, 0xb8272dd6);
    check("blk.29.ffn_down.weight", 575, 0x8c0918c2);
    check("blk.7.attn_q.weight", 100, 0xfaca7002);
    check("output_norm.weight", 0, 0xbefabe09);
}

proptest! {
    #[test]
    fn mutated_files_never_panic(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), len in any::<prop::sample::Index>(), cut in any::<bool>()) {
        let mut bytes = small().finish();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if cut {
            bytes.truncate(len.index(bytes.len()));
        }
        // Whatever is accepted can be read to the end.
        if let Ok(gguf) = Gguf::from_bytes(bytes) {
            for entry in gguf.tensors() {
                let tensor = gguf.tensor(&entry.name).unwrap();
                prop_assert_eq!(tensor.bytes.len(), entry.len);
                if entry.len > 0 && tensor.columns < 4096 {
                    let mut row = vec![0.0; tensor.columns];
                    let _ = dequantize(&tensor, tensor.rows - 1, &mut row);
                }
            }
        }
    }

    #[test]
    fn random_bytes_never_panic(rest in prop::collection::vec(any::<u8>(), 0..256), tensors in 0u64..4, entries in 0u64..4) {
        let _ = raw(tensors, entries, &[&rest]);
    }
}
