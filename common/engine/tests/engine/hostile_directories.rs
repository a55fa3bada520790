//! Model directories that cannot be run: a typed error each that names what is wrong, and no panic.

use std::{fs, path::Path};

use baton_engine::{EngineOptions, ModelSummary, OpenError, naive::NaiveModel, open};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::{directory::Copy, options};

const INDEX: &str = "model.safetensors.index.json";
const WEIGHTS: &str = "model.safetensors";

fn opening(path: &Path) -> Result<(), OpenError> {
    // The reader of `model info` and the oracle say the same.
    let (summary, naive) = (ModelSummary::of_file(path, 1).err(), NaiveModel::open(path).err());
    let result = open(&options(path), &|_| {}).map(drop);
    for other in [summary, naive].into_iter().flatten() {
        assert_eq!(other.code(), result.as_ref().expect_err("the others refused it").code());
    }
    result
}

fn check(copy: &Copy, code: &str, says: &str) {
    let error = opening(copy.path()).expect_err(says);
    assert_eq!(error.code(), code, "{says}: {error}");
    assert!(error.to_string().contains(says), "{says}: {error}");
}

#[test]
fn files_that_are_missing_or_something_else() {
    for name in ["config.json", WEIGHTS] {
        let copy = Copy::of("llama");
        fs::remove_file(copy.file(name)).unwrap();
        check(&copy, "model_not_found", name);
        // A directory where a file should be.
        fs::create_dir(copy.file(name)).unwrap();
        check(&copy, "model_not_found", name);
    }
    for name in ["config.json", WEIGHTS] {
        for bytes in [&b""[..], b"[]", b"{", b"\xff\xff\xff\xff\xff\xff\xff\xff", &[0; 4096]] {
            check(
                &Copy::of("llama").damage(name, |file| *file = bytes.to_vec()),
                "model_corrupt",
                name,
            );
        }
    }
    let long = Copy::of("llama").damage("config.json", |file| file.resize(2 << 20, b' '));
    check(&long, "model_corrupt", "longer than");
}

#[test]
fn shards_that_are_not_what_the_index_says() {
    let second = "model-00002-of-00003.safetensors";
    let copy = Copy::of("mistral");
    fs::remove_file(copy.file(second)).unwrap();
    check(&copy, "model_not_found", second);

    let listing = |change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        Copy::of("mistral").edit(INDEX, |index| change(index["weight_map"].as_object_mut().unwrap()))
    };
    let norm = "model.norm.weight";
    // A tensor that is in no file, in another file, and one that no file is named for.
    check(
        &listing(&|map| drop(map.insert("lm_head.bias".into(), json!(second)))),
        "model_corrupt",
        "'lm_head.bias' is not in",
    );
    let elsewhere = "model-00001-of-00003.safetensors";
    check(
        &listing(&|map| drop(map.insert(norm.into(), json!(elsewhere)))),
        "model_corrupt",
        norm,
    );
    check(
        &listing(&|map| drop(map.insert(norm.into(), json!(7)))),
        "model_corrupt",
        norm,
    );
    // A file that no tensor names is not looked at, so that its tensors are missing.
    let unlisted = listing(&|map| map.retain(|_, file| *file != json!(second)));
    check(&unlisted, "model_missing_tensor", "has no tensor 'model.norm.weight'");
    for outside in [
        "../secret.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "./x",
        "x/",
    ] {
        let copy = listing(&|map| drop(map.insert(norm.into(), json!(outside))));
        check(&copy, "model_corrupt", "no file of this directory");
    }
    check(&listing(&|map| map.clear()), "model_corrupt", "lists 0 files");
    check(
        &Copy::of("mistral").edit(INDEX, |index| index.clear()),
        "model_corrupt",
        "weight_map",
    );
    // The same tensor twice.
    let copy = Copy::of("mistral").edit(INDEX, |index| {
        index["weight_map"]["again"] = json!("model-again.safetensors")
    });
    fs::copy(copy.file(second), copy.file("model-again.safetensors")).unwrap();
    check(&copy, "model_corrupt", "in another file, too");
}

/// A file of weights with another header before the same data.
fn with_header(change: impl FnOnce(&mut Value)) -> Copy {
    Copy::of("llama").damage(WEIGHTS, |file| {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let mut header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
        change(&mut header);
        let header = serde_json::to_vec(&header).unwrap();
        *file = [&(header.len() as u64).to_le_bytes(), &header[..], &file[8 + length..]].concat();
    })
}

#[test]
fn headers_that_lie() {
    for length in [0, 1, 9, 1 << 20, 99_999_999, 1 << 40, u64::MAX] {
        let copy = Copy::of("llama").damage(WEIGHTS, |file| file[..8].copy_from_slice(&u64::to_le_bytes(length)));
        check(&copy, "model_corrupt", WEIGHTS);
    }
    for keep in (0..74_000).step_by(3_001) {
        check(
            &Copy::of("llama").damage(WEIGHTS, |file| file.truncate(keep)),
            "model_corrupt",
            WEIGHTS,
        );
    }
    check(
        &Copy::of("llama").damage(WEIGHTS, |file| file.push(0)),
        "model_corrupt",
        WEIGHTS,
    );
    // Written anew without a change it opens: it is the changes of the other tests that are refused.
    opening(with_header(|_| ()).path()).unwrap();
}

#[test]
fn offsets_that_overlap_or_lie_outside() {
    let norm = "model.norm.weight";
    let moved = |by: i64| {
        with_header(|header| {
            for offset in header[norm]["data_offsets"].as_array_mut().unwrap() {
                *offset = json!(offset.as_i64().unwrap() + by);
            }
        })
    };
    for by in [-64, 64, 2, 1 << 40] {
        check(&moved(by), "model_corrupt", WEIGHTS);
    }
    check(&moved(-(1 << 40)), "model_corrupt", WEIGHTS);
    for offsets in [json!([64, 0]), json!([0, u64::MAX]), json!([0]), json!("0")] {
        check(
            &with_header(|header| header[norm]["data_offsets"] = offsets),
            "model_corrupt",
            WEIGHTS,
        );
    }
    for shape in [json!([31]), json!([1u64 << 62, 1u64 << 62]), json!([-32]), json!([0])] {
        check(
            &with_header(|header| header[norm]["shape"] = shape),
            "model_corrupt",
            WEIGHTS,
        );
    }
    check(
        &with_header(|header| header[norm]["dtype"] = json!("F32")),
        "model_corrupt",
        WEIGHTS,
    );
    check(
        &with_header(|header| header[norm]["dtype"] = json!("X7")),
        "model_corrupt",
        WEIGHTS,
    );
}

#[test]
fn tensors_that_do_not_fit_the_config() {
    let unsupported = "model_unsupported";
    let norm = "model.norm.weight";
    // As many bytes, of a type that is not built; three dimensions, and none.
    let copy = with_header(|header| header[norm]["dtype"] = json!("I16"));
    check(&copy, unsupported, "'model.norm.weight' stored as I16");
    let copy = with_header(|header| header[norm]["shape"] = json!([4, 2, 4]));
    check(&copy, unsupported, "'model.norm.weight' of shape [4, 2, 4]");
    let copy = with_header(|header| header[norm]["shape"] = json!([2, 16]));
    check(&copy, "model_corrupt", "'model.norm.weight' is (2, 16)");
    // Under another name it is missing; a name of GGUF's is no name here.
    let copy = with_header(|header| {
        let entry = header.as_object_mut().unwrap().remove(norm).unwrap();
        header["output_norm.weight"] = entry;
    });
    check(&copy, "model_missing_tensor", norm);
    // A head that the config does not know of, and one that it asks for.
    let untied = Copy::of("qwen2").with([("tie_word_embeddings", json!(false))]);
    check(&untied, "model_missing_tensor", "lm_head.weight");
    check(
        &Copy::of("llama").with([("tie_word_embeddings", json!(true))]),
        "model_corrupt",
        "lm_head.weight",
    );
    // Biases and norms of other architectures.
    check(
        &Copy::of("qwen2").with([("model_type", json!("llama"))]),
        unsupported,
        "k_proj.bias",
    );
    check(
        &Copy::of("llama").with([("model_type", json!("qwen2"))]),
        "model_missing_tensor",
        "q_proj.bias",
    );
    check(
        &Copy::of("llama").with([("model_type", json!("qwen3"))]),
        "model_missing_tensor",
        "q_norm.weight",
    );
    check(
        &Copy::of("qwen3").with([("model_type", json!("mistral")), ("sliding_window", json!(null))]),
        unsupported,
        "layer",
    );
}

#[test]
fn configs_that_are_incomplete_or_absurd() {
    let corrupt = |copy: Copy, says: &str| check(&copy, "model_corrupt", says);
    let counts = [
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
    ];
    for key in counts.into_iter().chain(["model_type", "rms_norm_eps"]) {
        corrupt(Copy::of("llama").without(key), key);
        corrupt(Copy::of("llama").with([(key, json!(null))]), key);
        corrupt(Copy::of("llama").with([(key, json!([1]))]), key);
    }
    for key in counts.into_iter().chain(["num_key_value_heads", "head_dim"]) {
        for value in [
            json!(0),
            json!(-1),
            json!(u64::MAX),
            json!(1u64 << 40),
            json!(1.5),
            json!("2"),
            json!(1e300),
        ] {
            corrupt(Copy::of("llama").with([(key, value)]), key);
        }
    }
    for value in [json!(0.0), json!(-1e-5), json!(1e-60), json!(1e60), json!("1e-5")] {
        corrupt(
            Copy::of("llama").with([("rms_norm_eps", value.clone())]),
            "rms_norm_eps",
        );
        corrupt(
            Copy::of("llama").with([("rope_parameters", json!({"rope_theta": value}))]),
            "rope_theta",
        );
    }
    for (key, value, says) in [
        ("num_key_value_heads", json!(3), "2 heads"),
        ("num_attention_heads", json!(1 << 20), "heads"),
        ("tie_word_embeddings", json!("yes"), "tie_word_embeddings"),
        ("rope_parameters", json!([1]), "rope_parameters"),
        ("hidden_size", json!(64), "model.embed_tokens.weight"),
        ("vocab_size", json!(271), "model.embed_tokens.weight"),
        ("head_dim", json!(512), "self_attn.q_proj"),
    ] {
        corrupt(Copy::of("llama").with([(key, value)]), says);
    }
    for value in [json!(0), json!(-3), json!("all")] {
        corrupt(Copy::of("mistral").with([("sliding_window", value)]), "sliding_window");
    }
    corrupt(Copy::of("qwen3").without("head_dim"), "head_dim");
    corrupt(Copy::of("qwen2").without("num_key_value_heads"), "num_key_value_heads");
    check(
        &Copy::of("llama").with([("num_hidden_layers", json!(3))]),
        "model_missing_tensor",
        "model.layers.2.",
    );
    // Llama 3's scaling, without or with numbers that it cannot have.
    for key in [
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ] {
        for value in [json!(null), json!(0), json!("x"), json!(-1)] {
            let copy = Copy::of("llama3-rope").edit("config.json", |config| config["rope_parameters"][key] = value);
            corrupt(copy, key);
        }
    }
    let copy = Copy::of("llama3-rope").edit("config.json", |config| {
        config["rope_parameters"]["low_freq_factor"] = json!(4.0)
    });
    corrupt(copy, "low frequency factor");
    let copy = Copy::of("llama3-rope").edit("config.json", |config| {
        config["rope_parameters"]["factor"] = json!(1e30)
    });
    corrupt(copy, "RoPE factors");
}

#[test]
fn what_is_not_built_is_named() {
    for (model, key, value, says) in [
        ("llama", "model_type", json!("gemma3_text"), "'gemma3_text'"),
        ("llama", "hidden_act", json!("gelu"), "'gelu'"),
        ("llama", "attention_bias", json!(true), "'attention_bias'"),
        ("qwen3", "attention_bias", json!(true), "'attention_bias'"),
        ("llama", "mlp_bias", json!(true), "'mlp_bias'"),
        (
            "llama",
            "quantization_config",
            json!({"quant_method": "gptq"}),
            "'quantization_config'",
        ),
        ("llama", "partial_rotary_factor", json!(0.5), "'partial_rotary_factor'"),
        (
            "llama",
            "rope_parameters",
            json!({"rope_type": "yarn", "factor": 4.0}),
            "'yarn'",
        ),
        (
            "llama",
            "rope_scaling",
            json!({"type": "dynamic", "factor": 4.0}),
            "'dynamic'",
        ),
        (
            "llama",
            "rope_parameters",
            json!({"partial_rotary_factor": 0.5}),
            "'partial_rotary_factor'",
        ),
        (
            "llama",
            "rope_parameters",
            json!({"full_attention": {"rope_theta": 1e6}}),
            "each type of layer",
        ),
        ("qwen2", "use_sliding_window", json!(true), "on some layers"),
        (
            "qwen2",
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
            "on some layers",
        ),
        (
            "mistral",
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
            "on some layers",
        ),
        ("llama", "max_position_embeddings", json!(1 << 21), "2^20"),
    ] {
        let error = open(&options(Copy::of(model).with([(key, value)]).path()), &|_| {})
            .map(drop)
            .expect_err(says);
        assert_eq!(error.code(), "model_unsupported", "{says}: {error}");
        assert!(error.to_string().contains(says), "{says}: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// Opens or is refused; it never panics, and never takes memory that the files do not hold.
    #[test]
    fn damaged_files_are_survived(which in 0usize..3, at in 0usize..1_700, byte: u8) {
        let name = ["config.json", INDEX, "model-00001-of-00003.safetensors"][which];
        let copy = Copy::of("mistral").damage(name, |file| {
            let at = at % file.len();
            file[at] = byte;
        });
        let small = EngineOptions { threads: 1, kv_bytes: 1 << 20, max_rows: 16, max_sequences: 2, ..options(copy.path()) };
        let _ = open(&small, &|_| {});
    }
}
