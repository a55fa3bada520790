//! Runs loads on our engine.

use std::path::Path;

use baton_engine::{Engine, EngineOptions, LlamaEngine, OpenError, Source, open_file};
use baton_kv::{BlockId, TokenId};
use baton_scheduler::{Sample, SamplingParams, SequenceId, Span, StepOutput, StepPlan};

use super::{
    load::{Load, Times},
    seconds,
};

/// Rows of a step: a node's default.
pub const STEP_ROWS: usize = 512;
/// Sequences of a step at most.
pub const SEQUENCES: usize = 8;
/// Bytes of the KV pool: 2,912 tokens of the default model.
pub const KV_BYTES: u64 = 64 << 20;

/// Opens a model as the benchmarks measure it.
pub fn open(path: &Path, threads: usize) -> Result<LlamaEngine, OpenError> {
    let options = EngineOptions {
        source: Source::File(path.to_owned()),
        threads,
        isa: None,
        kv_bytes: KV_BYTES,
        shared_pool: false,
        max_rows: STEP_ROWS,
        max_sequences: SEQUENCES,
        panel_cache: None,
    };
    open_file(path, &options, &|_| {})
}

/// Runs a load: prefill in steps of [`STEP_ROWS`] rows, of which the last draws a token; in decode each step draws one for each sequence. The
/// tokens are given ones, and plans are made before the clock starts.
pub fn run(engine: &mut LlamaEngine, load: Load) -> Times {
    let mut prompts = Vec::new();
    for sequence in 0..load.sequences {
        for start in (0..load.prefill).step_by(STEP_ROWS) {
            let end = load.prefill.min(start + STEP_ROWS);
            let mut plan = StepPlan::default();
            span(engine, load, &mut plan, sequence, start..end, end == load.prefill);
            prompts.push(plan);
        }
    }
    let steps: Vec<StepPlan> = (load.prefill..load.prefill + load.decode)
        .map(|position| decode(engine, load, position))
        .collect();
    let mut output = StepOutput::default();
    let mut all = |plans: &[StepPlan]| {
        seconds(|| {
            for plan in plans {
                engine.step(plan, &mut output).expect("a step");
            }
        })
    };
    Times {
        prefill_s: all(&prompts),
        decode_s: all(&steps),
    }
}

/// The step that computes the token at `position` of each of the load's sequences, and draws the next.
pub fn decode(engine: &LlamaEngine, load: Load, position: usize) -> StepPlan {
    let mut plan = StepPlan::default();
    for sequence in 0..load.sequences {
        span(engine, load, &mut plan, sequence, position..position + 1, true);
    }
    plan
}

/// Perplexity of all tokens but the first, each predicted from all before it.
pub fn perplexity(engine: &mut LlamaEngine, tokens: &[TokenId]) -> f64 {
    let load = Load {
        prefill: 0,
        decode: tokens.len(),
        sequences: 1,
    };
    let mut output = StepOutput::default();
    let mut sum = 0.0;
    for (position, pair) in tokens.windows(2).enumerate() {
        let mut plan = decode(engine, load, position);
        plan.tokens[0] = pair[0];
        engine.step(&plan, &mut output).expect("a step");
        let logits = engine.logits(0);
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
        sum += f64::from(logits[pair[1] as usize] - max) - total.ln();
    }
    (-sum / (tokens.len() - 1) as f64).exp()
}

/// Adds a sequence's tokens at `positions`. Each sequence has its own part of the pool.
fn span(
    engine: &LlamaEngine,
    load: Load,
    plan: &mut StepPlan,
    sequence: usize,
    positions: std::ops::Range<usize>,
    draws: bool,
) {
    let memory = engine.memory();
    let own = memory.blocks() / load.sequences;
    let needed = positions.end.div_ceil(memory.layout().block_tokens);
    assert!(needed <= own, "{load:?} has no room in the pool");
    let (row, table) = (plan.tokens.len(), plan.tables.len());
    plan.tokens.extend(
        positions
            .clone()
            .map(|at| ((1_000 + 7 * at + 31 * sequence) % 40_000) as TokenId),
    );
    plan.tables
        .extend((sequence * own..sequence * own + needed).map(|block| BlockId(block as u32)));
    plan.spans.push(Span {
        sequence: SequenceId(sequence as u64),
        rows: row..plan.tokens.len(),
        context: positions.start,
        table: table..plan.tables.len(),
        sample: draws.then(|| Sample::new(SamplingParams::greedy(), 0)),
    });
}
