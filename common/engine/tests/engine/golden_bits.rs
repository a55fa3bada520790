//! The bits themselves, committed: machines that never meet, x86 and aarch64, are held to the same.

use std::fmt::Write;

use baton_engine::{BF16_CLASS, EngineOptions, Isa, LlamaEngine, NUMERICS_CLASS};
use baton_gguf::TensorType;
use baton_kv::TokenId;

use crate::common::{Plan, blocks, greedy, isas, opened_file, options, tiny::Tiny};

/// Tokens of a prompt, and of one across the border of attention's partitions.
const PROMPT: u32 = 70;
const LONG_PROMPT: u32 = 300;

/// Each storage type, each switch of the decoder, and a long context; with the tokens of its prompt.
fn models() -> Vec<(String, Tiny, u32)> {
    let types = [
        TensorType::Q4_0,
        TensorType::Q4_1,
        TensorType::Q5_0,
        TensorType::Q5_1,
        TensorType::Q8_0,
        TensorType::Q4K,
        TensorType::Q5K,
        TensorType::Q6K,
        TensorType::F16,
        TensorType::Bf16,
        TensorType::F32,
    ];
    let mut models: Vec<_> = types
        .map(|dtype| (dtype.to_string(), Tiny::of(&[dtype]), PROMPT))
        .into();
    let mut add = |name: &str, tiny: Tiny| models.push((name.to_owned(), tiny, PROMPT));
    for architecture in ["qwen2", "qwen3"] {
        let tiny = Tiny::default();
        add(architecture, Tiny { architecture, ..tiny });
    }
    let tiny = Tiny::default();
    add(
        "window",
        Tiny {
            window: Some(40),
            ..tiny
        },
    );
    let tiny = Tiny::default();
    add(
        "factors",
        Tiny {
            rope_factors: true,
            ..tiny
        },
    );
    let tiny = Tiny::of(&[TensorType::Q6K, TensorType::Q4_1, TensorType::F16]);
    add("untied", Tiny { tied: false, ..tiny });
    models.push(("long".to_owned(), Tiny::default(), LONG_PROMPT));
    models
}

/// FNV-1a over the logits' bits.
fn hash(hash: u64, logits: &[f32]) -> u64 {
    let bytes = logits.iter().flat_map(|logit| logit.to_bits().to_le_bytes());
    bytes.fold(hash, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Prefills a prompt and decodes four tokens: the hash of the four rows of logits, and what was drawn.
fn run(engine: &mut LlamaEngine, prompt: u32, chunk: usize) -> (u64, Vec<TokenId>) {
    let mut tokens: Vec<TokenId> = (0..prompt).map(|i| (i * i * 31 + i * 7 + 17) % 203).collect();
    let (table, mut context, mut bits) = (blocks(0..prompt.div_ceil(32) + 1), 0, 0xcbf2_9ce4_8422_2325);
    let prompt = tokens.len();
    while tokens.len() < prompt + 4 {
        let end = tokens.len().min(context + chunk);
        let sample = greedy().filter(|_| end == tokens.len());
        let drawn = Plan::default()
            .span(&tokens[..end], context, &table, sample)
            .run(engine);
        context = end;
        if let Some(drawn) = drawn.first() {
            bits = hash(bits, engine.logits(0));
            tokens.push(drawn.token);
        }
    }
    (bits, tokens.split_off(prompt))
}

fn lines(isa: Isa, threads: usize, chunk: usize) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut lines = format!("{NUMERICS_CLASS} {BF16_CLASS}\n");
    for (name, tiny, prompt) in models() {
        let path = tiny.file(&folder);
        let options = EngineOptions {
            isa: Some(isa),
            threads,
            kv_bytes: 4 << 20,
            ..options(&path)
        };
        let (bits, drawn) = run(&mut opened_file(&path, &options), prompt, chunk);
        writeln!(lines, "{name} {bits:016x} {drawn:?}").unwrap();
    }
    lines
}

#[test]
fn the_bits_are_those_committed() {
    for isa in isas() {
        for (threads, chunk) in [(1, 70), (3, 13)] {
            let lines = lines(isa, threads, chunk);
            assert!(
                lines == include_str!("golden_bits.txt"),
                "{isa}, {threads} threads, chunks of {chunk}. If other bits are wanted, they need a new NUMERICS_CLASS (or BF16_CLASS), and golden_bits.txt is:\n{lines}"
            );
        }
    }
}
