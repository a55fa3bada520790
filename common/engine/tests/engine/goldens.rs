//! The default model against what llama.cpp and an f32 transformers run say of it (`tests/goldens`).
//!
//! Neither is expected to be equal to the last digit. All three read the same 4-bit weights; Baton and llama.cpp round activations to 8 bits
//! per 32 before each product, f32 does not; Baton's KV is bf16, llama.cpp's f16. The tolerances are what was measured, and some room.

use std::{fs, path::Path};

use baton_engine::LlamaEngine;
use baton_kv::{BlockId, TokenId};
use baton_scheduler::StepOutput;
use serde_json::Value;

use crate::common::{GREEDY, Plan, blocks, model_path, opened_file, options};

/// Where llama.cpp's two largest logits differ by more than this, Baton must name the same token.
const MARGIN: f64 = 0.5;

/// Log-probabilities against another run: mean and maximum of the differences' magnitudes.
#[derive(Debug, Default)]
struct Differences {
    sum: f64,
    max: f64,
    count: usize,
}

impl Differences {
    fn add(&mut self, difference: f64) {
        self.sum += difference.abs();
        self.max = self.max.max(difference.abs());
        self.count += 1;
    }

    fn mean(&self) -> f64 {
        self.sum / self.count as f64
    }
}

/// One position's prediction.
struct Prediction {
    argmax: TokenId,
    logits: Vec<f32>,
}

impl Prediction {
    /// By the standard library, in f64.
    fn logprob(&self, token: TokenId) -> f64 {
        let max = f64::from(self.logits[self.argmax as usize]);
        let sum: f64 = self.logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
        f64::from(self.logits[token as usize]) - max - sum.ln()
    }
}

const SPANS: usize = 64;

/// The predictions after each position from `first` on: what is before it goes in chunks, and then every position is a row of its own that draws.
fn predictions(engine: &mut LlamaEngine, tokens: &[TokenId], first: usize, mut each: impl FnMut(usize, Prediction)) {
    let table = blocks(0..tokens.len().div_ceil(32) as u32);
    let table = |end: usize| -> &[BlockId] { &table[..end.div_ceil(32)] };
    for context in (0..first).step_by(512) {
        let end = first.min(context + 512);
        Plan::default()
            .span(&tokens[..end], context, table(end), None)
            .run(engine);
    }
    for from in (first..tokens.len()).step_by(SPANS) {
        let positions = from..tokens.len().min(from + SPANS);
        let plan = positions.clone().fold(Plan::default(), |plan, position| {
            plan.span(&tokens[..=position], position, table(position + 1), GREEDY)
        });
        let mut output = StepOutput::default();
        baton_engine::Engine::step(engine, &plan.0, &mut output).unwrap();
        for (index, position) in positions.enumerate() {
            let prediction = Prediction {
                argmax: output.sampled[index].token,
                logits: engine.logits(index).to_vec(),
            };
            let drawn = f64::from(output.sampled[index].logprob);
            assert!(
                (drawn - prediction.logprob(prediction.argmax)).abs() < 1e-5,
                "the sampler's log-probability"
            );
            each(position, prediction);
        }
    }
}

fn goldens() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/logits.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<TokenId> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as TokenId)
        .collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|number| number.as_f64().unwrap())
        .collect()
}

fn engine() -> LlamaEngine {
    let path = model_path();
    let options = baton_engine::EngineOptions {
        max_sequences: SPANS,
        kv_bytes: 128 << 20,
        ..options(&path)
    };
    opened_file(&path, &options)
}

#[test]
fn teacher_forced_along_llama_cpps_greedy_continuations() {
    let mut engine = engine();
    let goldens = goldens();
    let cases = goldens["cases"].as_array().unwrap();
    assert!(cases.len() >= 20);
    let (mut against_f32, mut against_llama) = (Differences::default(), Differences::default());
    let (mut disagreements, mut equal, mut widest) = (Vec::new(), 0, 0.0f64);
    for case in cases {
        let (prompt, tokens) = (ids(&case["prompt"]), ids(&case["tokens"]));
        let margins = numbers(&case["llama_margin"]);
        let (f32_logprobs, llama_logprobs) = (numbers(&case["f32_logprob"]), numbers(&case["llama_logprob"]));
        let all = [&prompt[..], &tokens[..tokens.len() - 1]].concat();
        predictions(&mut engine, &all, prompt.len() - 1, |position, prediction| {
            let step = position + 1 - prompt.len();
            let logprob = prediction.logprob(tokens[step]);
            against_f32.add(logprob - f32_logprobs[step]);
            against_llama.add(logprob - llama_logprobs[step]);
            if prediction.argmax == tokens[step] {
                equal += 1;
            } else {
                widest = widest.max(margins[step]);
                if margins[step] > MARGIN {
                    disagreements.push(format!(
                        "{} step {step}: {}, margin {}",
                        case["name"], prediction.argmax, margins[step]
                    ));
                }
            }
        });
    }
    println!(
        "argmax equal {equal} of {}, widest margin where not {widest:.4}; |Δ logprob| against f32: mean {:.4} max {:.4}; against llama.cpp: mean {:.4} max {:.4}",
        against_f32.count,
        against_f32.mean(),
        against_f32.max,
        against_llama.mean(),
        against_llama.max
    );
    assert_eq!(disagreements, Vec::<String>::new());
    assert!(against_f32.mean() < 0.04 && against_f32.max < 0.5, "{against_f32:?}");
}

#[test]
fn perplexity_is_that_of_the_weights() {
    let mut engine = engine();
    let goldens = goldens();
    let perplexity = &goldens["perplexity"];
    let tokens = ids(&perplexity["tokens"]);
    let mut sum = 0.0;
    predictions(&mut engine, &tokens[..tokens.len() - 1], 0, |position, prediction| {
        sum += prediction.logprob(tokens[position + 1]);
    });
    let own = (-sum / (tokens.len() - 1) as f64).exp();
    let (f32, llama) = (
        perplexity["f32_perplexity"].as_f64().unwrap(),
        perplexity["llama_perplexity"].as_f64().unwrap(),
    );
    println!("perplexity {own:.4}, f32 {f32}, llama.cpp {llama}");
    assert!(
        (own / f32 - 1.0).abs() < 0.01,
        "{own} where f32 has {f32} (llama.cpp {llama})"
    );
}
