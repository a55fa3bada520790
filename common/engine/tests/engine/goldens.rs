//! The default model against what llama.cpp and an f32 transformers run say of it (`tests/goldens`).
//!
//! Neither is expected to be equal to the last digit. All three read the same 4-bit weights; Baton and llama.cpp round activations to 8 bits
//! per 32 before each product, f32 does not; Baton's KV is bf16, llama.cpp's f16. The tolerances are what was measured, and some room.

use std::{fs, path::Path};

use baton_engine::{Engine, EngineOptions, LlamaEngine};
use baton_kv::TokenId;
use baton_scheduler::StepOutput;
use serde_json::Value;

use crate::common::{Plan, blocks, greedy, model_path, opened_file, options};

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
    /// ln of the sum of e^logit, by the standard library, in f64.
    log_sum: f64,
}

impl Prediction {
    fn new(argmax: TokenId, logits: &[f32]) -> Self {
        let max = f64::from(logits[argmax as usize]);
        let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
        Self {
            argmax,
            logits: logits.to_vec(),
            log_sum: max + sum.ln(),
        }
    }

    fn logprob(&self, token: TokenId) -> f64 {
        f64::from(self.logits[token as usize]) - self.log_sum
    }
}

/// Tokens of which those from position `first` on are followed by a prediction that is wanted.
struct Job {
    tokens: Vec<TokenId>,
    first: usize,
}

/// Most jobs at once.
const JOBS: usize = 32;

/// The predictions of all jobs, told as (job, position, prediction): what lies before `first` is prefilled, then all jobs decode together.
fn predictions(engine: &mut LlamaEngine, jobs: &[Job], mut each: impl FnMut(usize, usize, Prediction)) {
    let mut next_block = 0;
    let mut tables = Vec::new();
    for job in jobs {
        let end = next_block + job.tokens.len().div_ceil(32) as u32;
        tables.push(blocks(next_block..end));
        next_block = end;
        for context in (0..job.first).step_by(512) {
            let end = job.first.min(context + 512);
            Plan::default()
                .span(&job.tokens[..end], context, &tables[tables.len() - 1], None)
                .run(engine);
        }
    }
    for step in 0..jobs.iter().map(|job| job.tokens.len() - job.first).max().unwrap_or(0) {
        let running: Vec<usize> = (0..jobs.len())
            .filter(|&job| jobs[job].first + step < jobs[job].tokens.len())
            .collect();
        let plan = running.iter().fold(Plan::default(), |plan, &job| {
            let position = jobs[job].first + step;
            plan.span(&jobs[job].tokens[..=position], position, &tables[job], greedy())
        });
        let mut output = StepOutput::default();
        engine.step(&plan.0, &mut output).unwrap();
        for (index, &job) in running.iter().enumerate() {
            let drawn = output.sampled[index];
            let prediction = Prediction::new(drawn.token, engine.logits(index));
            let logprob = prediction.logprob(drawn.token);
            assert!(
                (f64::from(drawn.logprob) - logprob).abs() < 1e-5,
                "the sampler's log-probability"
            );
            each(job, jobs[job].first + step, prediction);
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

fn engine() -> LlamaEngine {
    let path = model_path();
    let options = EngineOptions {
        max_sequences: JOBS,
        panel_cache: None,
        kv_bytes: 256 << 20,
        shared_pool: false,
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
    let jobs: Vec<Job> = cases
        .iter()
        .map(|case| {
            let (prompt, tokens) = (ids(&case["prompt"]), ids(&case["tokens"]));
            Job {
                tokens: [&prompt[..], &tokens[..tokens.len() - 1]].concat(),
                first: prompt.len() - 1,
            }
        })
        .collect();
    let (mut against_f32, mut against_llama) = (Differences::default(), Differences::default());
    let (mut disagreements, mut equal, mut widest) = (Vec::new(), 0, 0.0f64);
    predictions(&mut engine, &jobs, |job, position, prediction| {
        let (case, step) = (&cases[job], position - jobs[job].first);
        let number = |field: &str| case[field][step].as_f64().unwrap();
        let (token, margin) = (number("tokens") as TokenId, number("llama_margin"));
        let logprob = prediction.logprob(token);
        against_f32.add(logprob - number("f32_logprob"));
        against_llama.add(logprob - number("llama_logprob"));
        if prediction.argmax == token {
            equal += 1;
        } else {
            widest = widest.max(margin);
            if margin > MARGIN {
                disagreements.push(format!(
                    "{} step {step}: {}, margin {margin}",
                    case["name"], prediction.argmax
                ));
            }
        }
    });
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
    // Each token but the first, predicted from all before it, in eight runs side by side.
    let (count, runs) = (tokens.len() - 1, 8);
    let jobs: Vec<Job> = (0..runs)
        .map(|run| Job {
            tokens: tokens[..count * (run + 1) / runs].to_vec(),
            first: count * run / runs,
        })
        .collect();
    let (mut sum, mut predicted) = (0.0, 0);
    predictions(&mut engine, &jobs, |_, position, prediction| {
        sum += prediction.logprob(tokens[position + 1]);
        predicted += 1;
    });
    assert_eq!(predicted, count);
    let own = (-sum / count as f64).exp();
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
