//! Prefill and decode speed of a model file, tokens per second: the best of some runs, to tune by. Beside llama.cpp: `make bench BENCH=cpu-engine`.
//!
//! `cargo run --release -p baton-engine --example speed -- MODEL [THREADS] [ISA]`

use std::{path::Path, time::Instant};

use baton_engine::{Engine, EngineOptions, Isa, Source, open};
use baton_kv::BlockId;
use baton_scheduler::{Sample, SamplingParams, SequenceId, Span, StepOutput, StepPlan};

const RUNS: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: speed MODEL [THREADS] [ISA]")?;
    let threads = arguments.next().map_or(Ok(2), |threads| threads.parse())?;
    let isa = arguments.next().map(|isa| isa.parse::<Isa>()).transpose()?;
    let options = EngineOptions {
        source: Source::File(Path::new(&path).to_owned()),
        threads,
        isa,
        kv_bytes: 512 << 20,
        shared_pool: false,
        max_rows: 512,
        max_sequences: 8,
        panel_cache: None,
    };
    let start = Instant::now();
    let mut engine = open(&options, &|_| {})?;
    println!(
        "{}: loaded in {:.2} s, {threads} threads",
        engine.model().name,
        start.elapsed().as_secs_f64()
    );

    let prefill = best(|| time(&mut *engine, 1, 0, 512, 1))?;
    println!("prefill 512: {:.0} tok/s", 512.0 / prefill);
    for (sequences, context) in [(1, 0), (1, 512), (8, 0), (8, 512)] {
        const STEPS: usize = 64;
        let seconds = best(|| time(&mut *engine, sequences, context, 1, STEPS))?;
        println!(
            "decode, {sequences} at {context}: {:.0} tok/s together, {:.2} ms a step",
            (sequences * STEPS) as f64 / seconds,
            seconds / STEPS as f64 * 1e3
        );
    }
    Ok(())
}

fn best(mut run: impl FnMut() -> Result<f64, baton_engine::StepError>) -> Result<f64, baton_engine::StepError> {
    (0..RUNS).try_fold(f64::INFINITY, |best, _| Ok(best.min(run()?)))
}

/// Seconds for `steps` steps of `rows` rows in each of `sequences` sequences, whose first `context` positions hold whatever the pool does.
fn time(
    engine: &mut dyn Engine,
    sequences: usize,
    context: usize,
    rows: usize,
    steps: usize,
) -> Result<f64, baton_engine::StepError> {
    let (mut plan, mut output) = (StepPlan::default(), StepOutput::default());
    let blocks = (context + rows * steps).div_ceil(32);
    let mut seconds = 0.0;
    for step in 0..steps {
        plan.clear();
        for sequence in 0..sequences {
            let (row, table) = (plan.tokens.len(), plan.tables.len());
            plan.tokens
                .extend((0..rows as u32).map(|i| (step as u32 * 31 + i * 7 + sequence as u32) % 40_000));
            plan.tables
                .extend((0..blocks).map(|block| BlockId((sequence * blocks + block) as u32)));
            plan.spans.push(Span {
                sequence: SequenceId(sequence as u64),
                rows: row..plan.tokens.len(),
                context: context + step * rows,
                table: table..plan.tables.len(),
                sample: Some(Sample::new(SamplingParams::greedy(), step as u32)),
            });
        }
        let start = Instant::now();
        engine.step(&plan, &mut output)?;
        seconds += start.elapsed().as_secs_f64();
    }
    Ok(seconds)
}
