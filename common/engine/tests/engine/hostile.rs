//! Files and options that cannot be run: a typed error each, and no panic.

use std::{fs, path::Path};

use baton_engine::{EngineOptions, Isa, ModelSummary, OpenError, SimulatedConfig, Source, naive::NaiveModel, open};
use baton_gguf::{GgufWriter, TensorType, Value};
use proptest::prelude::*;

use crate::common::{
    options,
    tiny::{Tiny, TinyTensor, write},
};

fn opening(bytes: &[u8]) -> Result<(), OpenError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    // The reader of `model info` and the oracle say the same of a file that the engine refuses for what it is.
    let (summary, naive) = (ModelSummary::of_file(&path, 1).err(), NaiveModel::open(&path).err());
    let result = open(&options(&path), &|_| {}).map(drop);
    for other in [summary, naive].into_iter().flatten() {
        assert_eq!(other.code(), result.as_ref().expect_err("the others refused it").code());
    }
    result
}

fn with_metadata(change: impl FnOnce(GgufWriter) -> GgufWriter) -> Vec<u8> {
    let tiny = Tiny::default();
    write(change(tiny.metadata()), tiny.tensors())
}

fn with_tensors(change: impl FnOnce(&mut Vec<TinyTensor>)) -> Vec<u8> {
    let tiny = Tiny::default();
    let mut tensors = tiny.tensors();
    change(&mut tensors);
    write(tiny.metadata(), tensors)
}

/// The metadata with one key replaced (or, with `None`, left out).
fn replacing(key: &str, value: Option<Value>) -> Vec<u8> {
    // Rebuilt from the reader's view, for the writer only appends.
    let tiny = Tiny::default();
    let original = baton_gguf::Gguf::from_bytes(tiny.bytes()).unwrap();
    let kept = original.metadata_all().filter(|(name, _)| *name != key);
    let mut writer = kept.fold(GgufWriter::new(), |writer, (name, value)| {
        writer.value(name, value.clone())
    });
    if let Some(value) = value {
        writer = writer.value(key, value);
    }
    write(writer, tiny.tensors())
}

fn check(what: &str, bytes: &[u8], code: &str, says: &str) {
    let error = opening(bytes).expect_err(what);
    assert_eq!(error.code(), code, "{what}: {error}");
    assert!(error.to_string().contains(says), "{what}: {error}");
}

#[test]
fn the_tiny_model_itself_opens() {
    opening(&Tiny::default().bytes()).unwrap();
}

#[test]
fn metadata_that_is_missing_or_absurd() {
    for key in [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
    ] {
        check(key, &replacing(key, None), "model_corrupt", key);
        check(key, &replacing(key, Some(Value::Bool(true))), "model_corrupt", key);
    }
    for key in [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.attention.key_length",
        "llama.rope.dimension_count",
    ] {
        for value in [0, u64::MAX, u64::from(u32::MAX)] {
            check(key, &replacing(key, Some(Value::U64(value))), "model_corrupt", "");
        }
        check(key, &replacing(key, Some(Value::I32(-1))), "model_corrupt", "");
    }
    for key in ["llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon"] {
        for value in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            check(key, &replacing(key, Some(Value::F32(value))), "model_corrupt", key);
        }
    }
    check(
        "kv heads",
        &replacing("llama.attention.head_count_kv", Some(Value::U32(3))),
        "model_corrupt",
        "4 heads",
    );
    check(
        "rope",
        &replacing("llama.rope.dimension_count", Some(Value::U32(18))),
        "model_corrupt",
        "rotated",
    );
    check(
        "vocabulary",
        &with_metadata(|m| m.u32("llama.vocab_size", 7)),
        "model_corrupt",
        "203 embeddings",
    );
    // Factors that are zero, or too few.
    for (columns, value) in [(8, 0.0f32), (8, f32::NAN), (4, 1.0)] {
        let factors = with_tensors(|tensors| {
            tensors.push(TinyTensor {
                name: "rope_freqs.weight".to_owned(),
                dimensions: vec![columns],
                dtype: TensorType::F32,
                bytes: (0..columns).flat_map(|_| value.to_le_bytes()).collect(),
            });
        });
        check("factors", &factors, "model_corrupt", "RoPE factors");
    }
    // More layers than there are tensors for; a width that the tensors do not have.
    check(
        "layers",
        &replacing("llama.block_count", Some(Value::U32(3))),
        "model_missing_tensor",
        "blk.2.",
    );
    check(
        "width",
        &replacing("llama.feed_forward_length", Some(Value::U32(64))),
        "model_corrupt",
        "ffn_gate",
    );
}

#[test]
fn what_is_not_built_is_named() {
    let check = |bytes: &[u8], says: &str| check(says, bytes, "model_unsupported", says);
    check(
        &replacing("general.architecture", Some(Value::String("gemma3".into()))),
        "'gemma3'",
    );
    check(
        &with_metadata(|m| m.string("llama.rope.scaling.type", "yarn")),
        "'yarn'",
    );
    check(
        &with_metadata(|m| m.f32("llama.rope.scale_linear", 4.0)),
        "scaling factor of 4",
    );
    check(&with_metadata(|m| m.u32("llama.expert_count", 8)), "mixture of experts");
    let qwen = Tiny {
        architecture: "qwen2",
        window: Some(4096),
        ..Tiny::default()
    };
    check(&qwen.bytes(), "sliding");
    check(
        &replacing("llama.attention.value_length", Some(Value::U32(32))),
        "values of 32",
    );
    let add = |name: &str| {
        let name = name.to_owned();
        with_tensors(|tensors| {
            let bytes = [0u8; 64].to_vec();
            tensors.push(TinyTensor {
                name,
                dimensions: vec![16],
                dtype: TensorType::F32,
                bytes,
            });
        })
    };
    check(&add("rope_freqs.bias"), "'rope_freqs.bias'");
    check(&add("blk.0.attn_q.bias"), "'blk.0.attn_q.bias'");
    // A storage type without kernels; heads that the kernels are not made for.
    let odd = with_tensors(|tensors| {
        let tensor = &mut tensors[2];
        assert_eq!(tensor.name, "blk.0.attn_q.weight");
        tensor.dtype = TensorType::Other(16);
    });
    let error = opening_engine(&odd);
    assert_eq!(error.code(), "model_unsupported");
    assert!(
        error.to_string().contains("type 16") && error.to_string().contains("blk.0.attn_q.weight"),
        "{error}"
    );
    let narrow = Tiny {
        head_dim: 8,
        rope_dim: 8,
        heads: 8,
        ..Tiny::default()
    };
    assert_eq!(opening_engine(&narrow.bytes()).code(), "model_unsupported");
}

/// The engine's refusal alone, for what only the kernels do not have.
fn opening_engine(bytes: &[u8]) -> OpenError {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    open(&options(&path), &|_| {}).map(drop).expect_err("a refusal")
}

#[test]
fn tensors_that_are_missing_or_misshapen() {
    let names: Vec<String> = Tiny::default()
        .tensors()
        .into_iter()
        .map(|tensor| tensor.name)
        .collect();
    for name in names {
        let without = with_tensors(|tensors| tensors.retain(|tensor| tensor.name != name));
        check(&name, &without, "model_missing_tensor", &name);
        let empty = with_tensors(|tensors| {
            let tensor = tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
            (tensor.dimensions, tensor.dtype, tensor.bytes) = (vec![32, 1], TensorType::F32, vec![0; 128]);
        });
        check(&name, &empty, "model_corrupt", "");
    }
}

#[test]
fn files_that_are_none() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().join("absent.gguf"), folder.path().to_owned()] {
        let error = open(&options(&path), &|_| {}).map(drop).expect_err("no file");
        assert!(
            matches!(error, OpenError::NotFound { .. } | OpenError::Corrupt(_)),
            "{error}"
        );
    }
    for bytes in [&b""[..], b"GGUF", b"PK\x03\x04 something else entirely", &[0; 4096]] {
        check("not a model", bytes, "model_corrupt", "");
    }
    let mut other_version = Tiny::default().bytes();
    other_version[4] = 9;
    check("version 9", &other_version, "model_unsupported", "version 9");
}

#[test]
fn a_file_cut_anywhere_is_corrupt() {
    let whole = Tiny::default().bytes();
    for keep in (0..whole.len() - 64).step_by(whole.len() / 60) {
        check("cut off", &whole[..keep], "model_corrupt", "");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Opens or is refused; it never panics, and never takes memory that the file does not hold.
    #[test]
    fn a_damaged_header_is_survived(at in 0usize..2_000, byte: u8) {
        let mut bytes = Tiny::default().bytes();
        bytes[at] = byte;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        fs::write(&path, bytes).unwrap();
        let small = EngineOptions { threads: 1, kv_bytes: 1 << 20, max_rows: 16, max_sequences: 2, ..options(&path) };
        let _ = open(&small, &|_| {});
    }
}

#[test]
fn options_that_cannot_be_met() {
    let folder = tempfile::tempdir().unwrap();
    let path = Tiny::default().file(&folder);
    let simulated = EngineOptions {
        source: Source::Simulated(SimulatedConfig::default()),
        ..options(&path)
    };
    for base in [options(&path), simulated] {
        let check = |options: EngineOptions, code: &str| {
            assert_eq!(open(&options, &|_| {}).map(drop).expect_err(code).code(), code);
        };
        check(
            EngineOptions {
                threads: 0,
                ..base.clone()
            },
            "engine_bad_option",
        );
        check(
            EngineOptions {
                threads: 1_000_000,
                ..base.clone()
            },
            "engine_bad_option",
        );
        check(
            EngineOptions {
                max_rows: 0,
                ..base.clone()
            },
            "engine_bad_option",
        );
        check(
            EngineOptions {
                max_sequences: 0,
                ..base.clone()
            },
            "engine_bad_option",
        );
        check(
            EngineOptions {
                max_sequences: 513,
                ..base.clone()
            },
            "engine_bad_option",
        );
        check(
            EngineOptions {
                kv_bytes: 0,
                ..base.clone()
            },
            "kv_too_small",
        );
        check(
            EngineOptions {
                kv_bytes: 10_000,
                ..base.clone()
            },
            "kv_too_small",
        );
        check(
            EngineOptions {
                kv_bytes: 1 << 60,
                ..base.clone()
            },
            "model_too_large",
        );
        check(
            EngineOptions {
                kv_bytes: u64::MAX,
                ..base.clone()
            },
            "model_too_large",
        );
        open(&base, &|_| {}).unwrap();
    }
    let error = open(
        &EngineOptions {
            kv_bytes: 1 << 50,
            ..options(&path)
        },
        &|_| {},
    )
    .map(drop)
    .expect_err("too large");
    let OpenError::TooLarge {
        needed_bytes,
        kv_bytes,
        available_bytes,
    } = error
    else {
        panic!("{error}")
    };
    assert!(kv_bytes == 1 << 50 && needed_bytes > kv_bytes && available_bytes > 0 && available_bytes < kv_bytes);
}

#[test]
fn an_instruction_set_that_the_cpu_lacks_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = Tiny::default().file(&folder);
    for isa in Isa::ALL {
        let result = open(
            &EngineOptions {
                isa: Some(isa),
                ..options(&path)
            },
            &|_| {},
        )
        .map(drop);
        match result {
            Ok(()) => assert!(isa.available()),
            Err(error) => assert!(!isa.available() && error.code() == "model_unsupported", "{error}"),
        }
    }
}

#[test]
fn progress_rises_to_the_end_of_each_stage() {
    use std::sync::Mutex;
    let folder = tempfile::tempdir().unwrap();
    let seen = Mutex::new(Vec::new());
    open(&options(&Tiny::default().file(&folder)), &|progress| {
        seen.lock().unwrap().push(progress)
    })
    .unwrap();
    let seen = seen.into_inner().unwrap();
    for stage in [baton_engine::LoadStage::Hashing, baton_engine::LoadStage::Packing] {
        let seen: Vec<_> = seen.iter().filter(|p| p.stage == stage).collect();
        assert!(
            seen.is_sorted_by_key(|p| p.done) && seen.len() > 3,
            "{stage:?}: {seen:?}"
        );
        let (first, last) = (seen[0], seen[seen.len() - 1]);
        assert!(first.done == 0 && last.done == last.total, "{stage:?}: {seen:?}");
    }
}

#[test]
fn the_identity_is_the_weights_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let identity = |bytes: Vec<u8>, threads| {
        let path = folder.path().join("m.gguf");
        fs::write(&path, bytes).unwrap();
        ModelSummary::of_file(Path::new(&path), threads).unwrap().identity
    };
    let base = identity(Tiny::default().bytes(), 1);
    assert_eq!(identity(Tiny::default().bytes(), 3), base);
    assert_eq!(
        identity(with_metadata(|m| m.string("general.name", "another")), 1),
        base
    );
    assert_eq!(identity(with_tensors(|tensors| tensors.reverse()), 1), base);
    let flipped = with_tensors(|tensors| tensors[5].bytes[33] ^= 1);
    let others = [
        identity(flipped, 1),
        identity(replacing("llama.rope.freq_base", Some(Value::F32(500.0))), 1),
        identity(
            replacing("llama.attention.layer_norm_rms_epsilon", Some(Value::F32(1e-6))),
            1,
        ),
        identity(replacing("llama.rope.dimension_count", Some(Value::U32(8))), 1),
        identity(with_metadata(|m| m.u32("llama.attention.sliding_window", 64)), 1),
        identity(
            Tiny {
                rope_factors: true,
                ..Tiny::default()
            }
            .bytes(),
            1,
        ),
    ];
    for other in others {
        assert_ne!(other, base);
    }
}
