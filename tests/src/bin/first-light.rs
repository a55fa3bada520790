//! Benchmark `first-light`: the engine beside llama.cpp on the same file in the same run, what the KV cache saves, and the time to the first
//! token handed over against local.
//!
//! usage: first-light PYTHON_WITH_LLAMA_CPP

use std::process::Command;

use anyhow::Context;
use baton_engine::{Engine, EngineOptions, Isa, Source, open};
use baton_kv::BlockId;
use baton_scheduler::{Sample, SamplingParams, SequenceId, Span, StepOutput, StepPlan};
use baton_tests::bench::{Figure, median, read_bandwidth, report, seconds};
use baton_tests::{Cluster, ClusterOptions, client, default_model, workspace};

const THREADS: usize = 2;
const PREFILL: usize = 512;
const DECODE: usize = 64;
const REPEATS: usize = 5;

fn main() -> anyhow::Result<()> {
    let python = std::env::args()
        .nth(1)
        .context("usage: first-light PYTHON_WITH_LLAMA_CPP")?;
    println!(
        "engine: {:?}, {THREADS} threads; {REPEATS} repeats after a warm-up, medians",
        Isa::detect()
    );

    let mut engine = open_engine()?;
    let weights = engine.model().weight_bytes;
    let bandwidth = read_bandwidth(THREADS, weights as usize);
    println!(
        "{:.1} MB of weights; {THREADS} threads read as much at {:.1} GB/s",
        weights as f64 / 1e6,
        bandwidth / 1e9
    );
    // Decode reads every weight once a token (the embedding is the head as well).
    let decode_limit = Some(bandwidth / weights as f64);

    let (mut prefill, mut decode, mut decode_at) = (Vec::new(), Vec::new(), Vec::new());
    for repeat in 0..=REPEATS {
        let prefill_s = seconds(|| step(engine.as_mut(), 0, PREFILL));
        let at_s = seconds(|| (PREFILL..PREFILL + DECODE).for_each(|at| step(engine.as_mut(), at, 1)));
        step(engine.as_mut(), 0, 1);
        let decode_s = seconds(|| (1..=DECODE).for_each(|at| step(engine.as_mut(), at, 1)));
        if repeat > 0 {
            prefill.push(PREFILL as f64 / prefill_s);
            decode_at.push(DECODE as f64 / at_s);
            decode.push(DECODE as f64 / decode_s);
        }
    }
    // Without a KV cache each token runs the whole sequence again.
    let no_kv = median(
        (0..REPEATS)
            .map(|_| 1.0 / seconds(|| step(engine.as_mut(), 0, PREFILL + 1)))
            .collect(),
    );
    drop(engine);

    let output = Command::new(&python)
        .arg(workspace().join("tests/python/llama_cpp_speed.py"))
        .arg(default_model())
        .args([THREADS, PREFILL, DECODE, REPEATS].map(|number| number.to_string()))
        .output()
        .with_context(|| format!("{python} does not start"))?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let peer: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    println!("llama-cpp-python {}: {}", peer["version"], peer["system_info"]);
    let llama = |key: &str| peer[key].as_f64().map(|value| (value, "llama.cpp"));

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let handed_over = runtime.block_on(ttft_ms(1));
    let local = runtime.block_on(ttft_ms(0));

    let decode_at = median(decode_at);
    report(
        "first-light",
        &[
            Figure::rate("prefill_512", "tok/s", median(prefill), llama("prefill"), None),
            Figure::rate("decode_1", "tok/s", median(decode), llama("decode"), decode_limit),
            Figure::rate("decode_1_at_512", "tok/s", decode_at, llama("decode_at"), decode_limit),
            Figure::rate(
                "kv_cache_saves_at_512",
                "tok/s",
                decode_at,
                Some((no_kv, "no KV cache")),
                None,
            ),
            Figure::time("ttft_512_handed_over", "ms", handed_over, Some((local, "local")), None),
        ],
    )?;
    Ok(())
}

fn open_engine() -> anyhow::Result<Box<dyn Engine>> {
    let options = EngineOptions {
        source: Source::File(default_model()),
        threads: THREADS,
        isa: None,
        kv_bytes: 64 << 20,
        max_rows: PREFILL + 1,
        max_sequences: 1,
    };
    Ok(open(&options, &|_| {})?)
}

/// Computes `rows` tokens at position `context`, and draws one.
fn step(engine: &mut dyn Engine, context: usize, rows: usize) {
    let tables: Vec<BlockId> = (0..(context + rows).div_ceil(32) as u32).map(BlockId).collect();
    let sample = Some(Sample {
        params: SamplingParams::greedy(),
        index: 0,
    });
    let span = Span {
        sequence: SequenceId(1),
        rows: 0..rows,
        context,
        table: 0..tables.len(),
        sample,
    };
    let tokens = (context..context + rows)
        .map(|at| ((1_000 + 7 * at) % 40_000) as u32)
        .collect();
    let mut output = StepOutput::default();
    engine
        .step(
            &StepPlan {
                tokens,
                spans: vec![span],
                tables,
            },
            &mut output,
        )
        .expect("a step");
}

/// Time to the first token of a prompt of 512 tokens that nobody holds, median, as the router measures it.
async fn ttft_ms(prefill_nodes: usize) -> f64 {
    let options = ClusterOptions {
        prefill: prefill_nodes,
        threads: THREADS,
        ..ClusterOptions::default()
    };
    let cluster = Cluster::start(options);
    let mut api = client::connect(&cluster).await;
    let mut times = Vec::new();
    for repeat in 0..=REPEATS as u32 {
        let prompt: Vec<u32> = (0..PREFILL as u32)
            .map(|at| (2_000 + 11 * at + 997 * repeat) % 40_000)
            .collect();
        let answer = client::run(&mut api, client::greedy(&prompt, 4))
            .await
            .expect("an answer");
        if repeat > 0 {
            times.push(answer.finished.timings.expect("timings").ttft_ms);
        }
    }
    median(times)
}
