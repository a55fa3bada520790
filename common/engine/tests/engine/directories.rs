//! Tiny model directories of each architecture against what transformers says of them (`tests/goldens/tiny`), and against the oracle.

use std::{collections::BTreeSet, fs, path::Path};

use baton_engine::{Architecture, EngineOptions, Isa, ModelConfig, ModelSummary, naive::NaiveModel};
use baton_gguf::TensorType;
use baton_kv::TokenId;
use safetensors::{SafeTensors, serialize};
use serde_json::{Value, json};

use crate::common::{
    Plan, blocks,
    directory::{Copy, tiny_path},
    greedy, isas, opened_file, options,
    tiny::{Tiny, TinyTensor, write},
};

/// What transformers says after a prompt, computing in f32.
struct Case {
    prompt: Vec<TokenId>,
    f32: Vec<f32>,
    /// With keys and values rounded to bf16, as our pool rounds them, and so, too, what is multiplied with matrices of bf16.
    rounded: Vec<f32>,
    /// Whether there are matrices of bf16.
    bf16: bool,
}

/// All cases: the directory, keys of its `config.json` to be changed, and what comes out then.
fn all_cases() -> Vec<(String, Value, Case)> {
    let goldens: Value = serde_json::from_slice(&fs::read(tiny_path("logits.json")).unwrap()).unwrap();
    let numbers = |value: &Value| -> Vec<f32> {
        let numbers = value.as_array().unwrap().iter();
        numbers.map(|x| x.as_f64().unwrap() as f32).collect()
    };
    let case = |case: &Value| {
        let model = case["model"].as_str().unwrap();
        let of_case = Case {
            prompt: numbers(&case["prompt"]).into_iter().map(|id| id as TokenId).collect(),
            f32: numbers(&case["f32"]),
            rounded: numbers(&case["rounded"]),
            bf16: ModelSummary::of_file(&tiny_path(model), 1)
                .unwrap()
                .types
                .contains_key("BF16"),
        };
        (model.to_owned(), case["config"].clone(), of_case)
    };
    goldens["cases"].as_array().unwrap().iter().map(case).collect()
}

/// All directories that cases are of.
fn models() -> BTreeSet<String> {
    all_cases().into_iter().map(|(model, ..)| model).collect()
}

/// The cases of a directory as it is.
fn cases(model: &str) -> Vec<Case> {
    let of_model = |(name, config, case): (String, Value, Case)| (name == model && config.is_null()).then_some(case);
    let cases: Vec<Case> = all_cases().into_iter().filter_map(of_model).collect();
    assert!(!cases.is_empty(), "{model}");
    cases
}

impl Case {
    /// What rounding to bf16 does to the logits.
    fn rounding(&self) -> f32 {
        difference(&self.f32, &self.rounded)
    }

    /// Most that our logits may differ from `rounded`, from which only the order of additions separates them. That is 2^-24 of every sum, for two layers of
    /// some hundred additions and logits up to 8 below 1e-4. And where it decides to which side a number is rounded, that one comes out the other way. Of
    /// keys and values there are thousands, and one is below a tenth of what all of them make. Of activations only those of the last row meet the logits
    /// undiluted, 350 in two layers: their errors, evenly spread over a unit of the last place, add up to √350 / √12 = 5.4 units, so that one unit more is
    /// 1 / 5.4 of the whole where all activations are of one size, and a quarter with those that are larger.
    fn tolerance(&self) -> f32 {
        1e-4 + self.rounding() / if self.bf16 { 4.0 } else { 10.0 }
    }

    fn check(&self, own: &[f32], what: &str) {
        let (error, tolerance) = (difference(own, &self.rounded), self.tolerance());
        assert!(error <= tolerance, "{what}: {error} where {tolerance} is allowed");
        let error = difference(own, &self.f32);
        assert!(error <= tolerance + self.rounding(), "{what}: {error} from f32");
        let (first, margin) = first(&self.f32);
        if margin > 2.0 * (tolerance + self.rounding()) {
            assert_eq!(self::first(own).0, first, "{what}: margin {margin}");
        }
    }
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |max, (a, b)| max.max((a - b).abs()))
}

/// The largest logit's token, and by how much it is the largest.
fn first(logits: &[f32]) -> (usize, f32) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    (order[0], logits[order[0]] - logits[order[1]])
}

/// The engine's logits after a prompt that is prefilled whole.
fn logits(path: &Path, isa: Option<Isa>, prompt: &[TokenId]) -> Vec<f32> {
    let options = EngineOptions {
        isa,
        kv_bytes: 1 << 20,
        max_rows: 128,
        ..options(path)
    };
    let mut engine = opened_file(path, &options);
    let table = blocks(0..prompt.len().div_ceil(32) as u32);
    Plan::default().span(prompt, 0, &table, greedy()).run(&mut engine);
    engine.logits(0).to_vec()
}

#[test]
fn logits_are_those_of_transformers() {
    for model in models() {
        let mut sure = 0;
        for case in cases(&model) {
            for isa in isas() {
                let own = logits(&tiny_path(&model), Some(isa), &case.prompt);
                case.check(&own, &format!("{model}, {} tokens, {isa}", case.prompt.len()));
            }
            sure += usize::from(first(&case.f32).1 > 2.0 * (case.tolerance() + case.rounding()));
        }
        assert!(sure > 0, "{model}: no token is sure");
    }
}

#[test]
fn every_architecture_is_among_them() {
    let architecture = |model: &String| ModelConfig::open(&tiny_path(model)).unwrap().1.architecture;
    let held: Vec<Architecture> = models().iter().map(architecture).collect();
    for architecture in Architecture::ALL {
        assert!(held.contains(&architecture), "{}", architecture.name());
    }
}

#[test]
fn the_oracle_agrees_bit_for_bit() {
    for model in models() {
        let naive = NaiveModel::open(&tiny_path(&model)).unwrap();
        for case in cases(&model) {
            let own = logits(&tiny_path(&model), None, &case.prompt);
            assert_eq!(own, naive.logits(&case.prompt), "{model}, {} tokens", case.prompt.len());
        }
    }
}

#[test]
fn other_switches_of_the_same_weights_are_those_of_transformers() {
    let mut variants = 0;
    for (model, config, case) in all_cases() {
        if let Value::Object(config) = config {
            let copy = Copy::of(&model).edit("config.json", |own| own.extend(config));
            case.check(&logits(copy.path(), None, &case.prompt), &model);
            variants += 1;
        }
    }
    assert!(variants >= 2);
}

/// The same weights with another switch are another model, and not within the tolerance of this one: each of these would be seen.
#[test]
fn every_switch_is_seen_in_the_logits() {
    let default_rope = json!({"rope_type": "default", "rope_theta": 500_000.0});
    let changes = [
        ("llama", "rope_parameters", json!({"rope_theta": 10_500.0})),
        (
            "llama",
            "rope_parameters",
            json!({"rope_type": "linear", "factor": 1.05, "rope_theta": 10_000.0}),
        ),
        ("llama", "rms_norm_eps", json!(1e-3)),
        ("llama3-rope", "rope_parameters", default_rope),
        ("mistral", "sliding_window", json!(null)),
        ("mistral", "sliding_window", json!(23)),
        ("mistral", "sliding_window", json!(25)),
        ("qwen2", "rope_parameters", json!({"rope_theta": 10_000.0})),
        ("qwen3", "rope_parameters", json!({"rope_theta": 10_000.0})),
    ];
    for (model, key, value) in changes {
        let copy = Copy::of(model).with([(key, value.clone())]);
        let case = cases(model).pop().expect("the longest prompt");
        let error = difference(&logits(copy.path(), None, &case.prompt), &case.rounded);
        println!(
            "{model}, {key} {value}: {error}, {} times the tolerance",
            error / case.tolerance()
        );
        assert!(error > 3.0 * case.tolerance(), "{model}, {key} {value}: {error}");
    }
}

#[test]
fn the_spelling_of_older_files_means_the_same() {
    let theta = |theta: f64| ("rope_theta", json!(theta));
    let llama3 = json!({
        "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    });
    let renamed = |model: &str| Copy::of(model).without("rope_parameters");
    let copies = [
        (
            "llama",
            renamed("llama").with([theta(10_000.0), ("rope_scaling", json!(null))]),
        ),
        // What is not said: a quotient, and the base of the first Llama.
        ("llama", renamed("llama").without("head_dim")),
        (
            "llama",
            renamed("llama").with([("head_dim", json!(null)), ("torch_dtype", json!("float16"))]),
        ),
        (
            "llama3-rope",
            renamed("llama3-rope").with([theta(500_000.0), ("rope_scaling", llama3)]),
        ),
        (
            "qwen2",
            renamed("qwen2")
                .without("layer_types")
                .with([theta(1_000_000.0), ("sliding_window", json!(4096))]),
        ),
    ];
    for (model, copy) in copies {
        let summary = |path: &Path| ModelSummary::of_file(path, 1).unwrap();
        let (own, original) = (summary(copy.path()), summary(&tiny_path(model)));
        assert_eq!(own.config, original.config, "{model}");
        assert_eq!(own.identity, original.identity, "{model}");
    }
}

/// All tensors of a directory, as in its files: name, shape, type, bytes.
fn tensors(model: &str) -> Vec<(String, Vec<usize>, safetensors::Dtype, Vec<u8>)> {
    let mut tensors = Vec::new();
    for file in fs::read_dir(tiny_path(model)).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = fs::read(path).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let tensor = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
                (
                    name.to_owned(),
                    view.shape().to_vec(),
                    view.dtype(),
                    view.data().to_vec(),
                )
            };
            tensors.extend(file.iter().map(tensor));
        }
    }
    tensors
}

/// One file of weights.
fn one_file(tensors: &[(String, Vec<usize>, safetensors::Dtype, Vec<u8>)]) -> Vec<u8> {
    let views = tensors.iter().map(|(name, shape, dtype, bytes)| {
        let view = safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    serialize(views, None).unwrap()
}

#[test]
fn the_identity_covers_all_shards_and_not_how_they_are_cut() {
    let identity = |path: &Path| ModelSummary::of_file(path, 2).unwrap().identity;
    let base = identity(&tiny_path("mistral"));
    for shard in 1..=3 {
        let name = format!("model-0000{shard}-of-00003.safetensors");
        let copy = Copy::of("mistral").damage(&name, |bytes| *bytes.last_mut().unwrap() ^= 1);
        assert_ne!(identity(copy.path()), base, "{name}");
    }
    // One file goes before an index, as in transformers.
    let whole = Copy::of("mistral");
    fs::write(whole.file("model.safetensors"), one_file(&tensors("mistral"))).unwrap();
    fs::remove_file(whole.file("model-00001-of-00003.safetensors")).unwrap();
    assert_eq!(identity(whole.path()), base);
    for (key, value) in [
        ("sliding_window", json!(25)),
        ("rms_norm_eps", json!(1e-6)),
        ("rope_parameters", json!({"rope_theta": 20_000})),
    ] {
        assert_ne!(identity(Copy::of("mistral").with([(key, value)]).path()), base, "{key}");
    }
    assert_eq!(
        identity(Copy::of("mistral").with([("bos_token_id", json!(3))]).path()),
        base
    );
}

#[test]
fn a_tied_head_that_is_stored_is_left_out() {
    let mut tensors = tensors("qwen2");
    let embedding = tensors
        .iter()
        .find(|tensor| tensor.0 == "model.embed_tokens.weight")
        .unwrap();
    let head = (
        "lm_head.weight".to_owned(),
        embedding.1.clone(),
        embedding.2,
        embedding.3.clone(),
    );
    tensors.push(head);
    let copy = Copy::of("qwen2");
    fs::write(copy.file("model.safetensors"), one_file(&tensors)).unwrap();
    let [own, original] = [copy.path(), &tiny_path("qwen2")].map(|path| ModelSummary::of_file(path, 1).unwrap());
    assert_eq!((own.identity, own.parameters), (original.identity, original.parameters));
    tensors.last_mut().unwrap().3[0] ^= 1;
    fs::write(copy.file("model.safetensors"), one_file(&tensors)).unwrap();
    let error = ModelSummary::of_file(copy.path(), 1).expect_err("another head");
    assert!(
        error.code() == "model_corrupt" && error.to_string().contains("lm_head.weight"),
        "{error}"
    );
}

#[test]
fn a_summary_says_what_a_directory_holds() {
    let summary = ModelSummary::of_file(&tiny_path("mistral"), 1).unwrap();
    // Embedding and head of 272 by 32; per layer q, k, v, o, three of 32 by 64, and norms.
    let numbers = 2 * 272 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32) + 32;
    assert_eq!((summary.name.as_str(), summary.parameters), ("mistral", numbers));
    assert_eq!(summary.types["BF16"], (2 * 9 + 3, 2 * numbers));
    assert!(summary.file_bytes > 2 * numbers && summary.file_bytes < 2 * numbers + 10_000);
    let text = summary.to_string();
    for line in [
        "architecture  mistral",
        "window        24 tokens",
        "heads         2 (1 KV) of 16",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    assert_eq!(ModelSummary::of_file(&tiny_path("qwen3/."), 1).unwrap().name, "qwen3");
}

/// GGUF's converters lay the two elements of each rotated pair side by side; Hugging Face has them half a head apart.
#[test]
fn a_gguf_twin_gives_the_same_logits() {
    let shape = Tiny {
        embedding: 32,
        feed_forward: 64,
        heads: 2,
        kv_heads: 1,
        vocabulary: 272,
        types: vec![TensorType::Bf16],
        tied: false,
        ..Tiny::default()
    };
    let own = tensors("llama");
    let stored = |gguf_name: &str| {
        let parts = [
            ("token_embd", "embed_tokens"),
            ("output_norm", "norm"),
            ("blk", "layers"),
            ("attn_norm", "input_layernorm"),
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ];
        let part = |part: &str| {
            parts
                .iter()
                .find(|(name, _)| *name == part)
                .map_or(part.to_owned(), |(_, own)| (*own).to_owned())
        };
        let name = match gguf_name {
            "output.weight" => "lm_head.weight".to_owned(),
            name => format!("model.{}", name.split('.').map(part).collect::<Vec<_>>().join(".")),
        };
        own.iter()
            .find(|tensor| tensor.0 == name)
            .unwrap_or_else(|| panic!("{name}"))
    };
    let twin = |tensor: TinyTensor| {
        let (_, _, _, bytes) = stored(&tensor.name);
        let mut bytes = bytes.clone();
        if tensor.name.ends_with("attn_q.weight") || tensor.name.ends_with("attn_k.weight") {
            let (row, half) = (2 * shape.embedding, shape.head_dim / 2);
            let rows: Vec<&[u8]> = bytes.chunks_exact(row).collect();
            let heads = rows.chunks_exact(2 * half);
            bytes = heads
                .flat_map(|head| (0..half).flat_map(|i| [head[i], head[i + half]].concat()))
                .collect();
        }
        TinyTensor {
            dtype: TensorType::Bf16,
            bytes,
            ..tensor
        }
    };
    let twins = shape.tensors().into_iter().map(twin).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("twin.gguf");
    fs::write(&path, write(shape.metadata(), twins)).unwrap();
    for case in cases("llama") {
        case.check(
            &logits(&path, None, &case.prompt),
            &format!("{} tokens", case.prompt.len()),
        );
    }
}
