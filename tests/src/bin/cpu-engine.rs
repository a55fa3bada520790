//! Benchmark `cpu-engine`: the CPU engine beside llama.cpp, on the same file and on llama.cpp's best format, and beside what the machine allows.
//!
//! usage: cpu-engine PYTHON_WITH_LLAMA_CPP

use std::path::Path;

use anyhow::Context;
use baton_engine::{Engine, Isa};
use baton_kv::TokenId;
use baton_tests::bench::{
    Figure, engine,
    kernels::breakdown,
    limits::{ReadProbe, Work, int8_per_second},
    load::{Load, Rates, Series},
    median,
    peer::{Peer, requantise},
    random_llama::RandomLlama,
    report,
    resident::{fill_pool, resident_bytes},
};
use baton_tests::{default_model, workspace};

const THREADS: usize = 2;
/// Reads of main memory: more than any cache holds.
const MAIN_MEMORY_BYTES: usize = 2 << 30;
/// Share of a step that may be spent outside kernels, percent.
const OUTSIDE_LIMIT: f64 = 3.0;
/// Resident memory over panels and KV.
const RESIDENT_LIMIT: f64 = 1.25;

/// How much is measured.
struct Scale {
    repeats: usize,
    warm_ups: usize,
    decode: usize,
    steps: usize,
}

impl Scale {
    /// All of it, or with `BATON_BENCH_QUICK` set just enough to see that everything runs: such figures mean nothing.
    fn chosen() -> Self {
        if std::env::var_os("BATON_BENCH_QUICK").is_some_and(|value| value != "0") {
            println!("QUICK: these figures mean nothing");
            return Self {
                repeats: 1,
                warm_ups: 0,
                decode: 2,
                steps: 8,
            };
        }
        Self {
            repeats: 5,
            warm_ups: 1,
            decode: 64,
            steps: 256,
        }
    }
}

fn main() -> anyhow::Result<()> {
    let python = std::env::args()
        .nth(1)
        .context("usage: cpu-engine PYTHON_WITH_LLAMA_CPP")?;
    let scale = Scale::chosen();
    println!(
        "engine: {:?}, {THREADS} threads; medians of {} rounds after {} to warm up; {} tokens decoded",
        Isa::detect(),
        scale.repeats,
        scale.warm_ups,
        scale.decode
    );
    // First, while the process holds nothing else.
    let resident = resident_over_panels_and_kv()?;
    let folder = tempfile::tempdir()?;
    let mut figures = speeds(&python, &scale, folder.path())?;
    figures.push(one_billion(&python, &scale, folder.path())?);
    figures.extend(resident);
    figures.push(outside_kernels(&scale)?);
    figures.push(perplexity(&python)?);
    report("cpu-engine", &figures)?;
    Ok(())
}

const fn load(prefill: usize, decode: usize, sequences: usize) -> Load {
    Load {
        prefill,
        decode,
        sequences,
    }
}

/// Nothing where the system does not say what is resident.
fn resident_over_panels_and_kv() -> anyhow::Result<Option<Figure>> {
    let mut engine = engine::open(&default_model(), THREADS)?;
    let kv_bytes = fill_pool(&engine);
    // Touches the arena and each thread's own memory.
    engine::run(&mut engine, load(2 * engine::STEP_ROWS, 1, 1));
    engine::run(&mut engine, load(1, 1, engine::SEQUENCES));
    let weight_bytes = engine.model().weight_bytes as f64;
    Ok(resident_bytes().map(|resident| {
        println!(
            "memory: {:.1} MB resident, of which panels {:.1} MB and KV {:.1} MB",
            resident / 1e6,
            weight_bytes / 1e6,
            kv_bytes / 1e6
        );
        let over = resident / (weight_bytes + kv_bytes);
        Figure::cost("rss_over_panels_kv", "×", over, None, Some(RESIDENT_LIMIT))
    }))
}

/// Prefill and decode of the default model.
fn speeds(python: &str, scale: &Scale, folder: &Path) -> anyhow::Result<Vec<Figure>> {
    let model = default_model();
    let mut engine = engine::open(&model, THREADS)?;
    let work = Work::of(&model, &engine)?;
    let probe = ReadProbe::new(THREADS, work.weight_bytes as usize)?;
    let mut same = Peer::start(python, &model, "Q4_1", THREADS)?;
    println!("{}", same.about);
    let mut others = requantise(python, &model, folder)?
        .iter()
        .map(|(format, file)| Peer::start(python, file, format, THREADS))
        .collect::<anyhow::Result<Vec<_>>>()?;

    let at_512 = load(512, scale.decode, 1);
    let at_0 = load(1, scale.decode, 1);
    let together = load(1, scale.decode, 8);
    let long = load(2_048, 1, 1);
    let loads = [at_512, at_0, together, long];
    let mut ours: [Series; 4] = Default::default();
    let mut peers: [Series; 4] = Default::default();
    // llama.cpp's other formats, at 512 and from empty.
    let mut formats: [Series; 2] = Default::default();
    let (mut bandwidth, mut int8) = (Vec::new(), Vec::new());
    for round in 0..scale.warm_ups + scale.repeats {
        if round == scale.warm_ups {
            (ours, peers, formats) = Default::default();
        }
        bandwidth.push(probe.bytes_per_second());
        int8.extend(int8_per_second(THREADS));
        for (index, &load) in loads.iter().enumerate() {
            ours[index].add("ours", load.rates(engine::run(&mut engine, load)));
            let batches: &[usize] = if load.prefill > 512 { &[512, 2_048] } else { &[512] };
            same.run(load, batches, &mut peers[index])?;
            if let Some(series) = formats.get_mut(index) {
                let short = Load {
                    decode: if load.prefill > 1 { 1 } else { load.decode },
                    ..load
                };
                for other in &mut others {
                    other.run(short, batches, series)?;
                }
            }
        }
    }

    let bandwidth = median(bandwidth);
    let int8 = (!int8.is_empty()).then(|| median(int8));
    println!(
        "limits: {THREADS} threads read {:.1} MB, as much as the weights are, at {:.1} GB/s; int8 {} GOP/s",
        work.weight_bytes / 1e6,
        bandwidth / 1e9,
        int8.map_or("unknown".to_owned(), |int8| format!("{:.0}", int8 / 1e9))
    );
    let prefill_limit = work.prefill_limit(int8);
    let decode_limit = |load: Load| {
        let context = load.prefill + load.decode / 2;
        work.decode_limit(bandwidth, int8, load.sequences, context)
    };
    let prefill = |rates: &Rates| rates.prefill;
    let decode = |rates: &Rates| rates.decode;
    let [
        [at_512_ours, at_0_ours, together_ours, long_ours],
        [at_512_peer, at_0_peer, together_peer, long_peer],
    ] = [&ours, &peers].map(|all| all.each_ref());
    let rate = |metric, ours: &Series, peer: &Series, phase: fn(&Rates) -> f64, limit| {
        let own = ours.best(phase).expect("a round").0;
        Figure::rate(metric, "tok/s", own, peer.best(phase), limit)
    };
    // The best of all formats, the same file's among them.
    let [prefill_formats, decode_formats] = &mut formats;
    prefill_formats.merge(at_512_peer);
    decode_formats.merge(at_0_peer);
    for (what, series, phase) in [
        ("prefill of 512", &*prefill_formats, prefill as fn(&Rates) -> f64),
        ("decode", &*decode_formats, decode),
    ] {
        println!("llama.cpp, {what}, tok/s:");
        for (who, rate) in series.medians(phase) {
            println!("  {rate:>9.1}  {who}");
        }
    }
    Ok(vec![
        rate("prefill_512", at_512_ours, at_512_peer, prefill, prefill_limit),
        rate("prefill_2048", long_ours, long_peer, prefill, prefill_limit),
        rate("decode_1", at_0_ours, at_0_peer, decode, decode_limit(at_0)),
        rate(
            "decode_1_at_512",
            at_512_ours,
            at_512_peer,
            decode,
            decode_limit(at_512),
        ),
        rate("decode_8", together_ours, together_peer, decode, decode_limit(together)),
        rate(
            "prefill_512_vs_best",
            at_512_ours,
            prefill_formats,
            prefill,
            prefill_limit,
        ),
        rate(
            "decode_1_vs_best",
            at_0_ours,
            decode_formats,
            decode,
            decode_limit(at_0),
        ),
    ])
}

/// Decode of a Llama of which no cache holds much: memory rules.
fn one_billion(python: &str, scale: &Scale, folder: &Path) -> anyhow::Result<Figure> {
    let file = folder.join("random-1b.gguf");
    RandomLlama::ONE_BILLION.write(&file)?;
    let mut engine = engine::open(&file, THREADS)?;
    let work = Work::of(&file, &engine)?;
    let probe = ReadProbe::new(THREADS, MAIN_MEMORY_BYTES)?;
    let mut peer = Peer::start(python, &file, "Q4_1", THREADS)
        .inspect_err(|error| println!("llama.cpp does not run the random 1B model: {error:#}"))
        .ok();
    let load = load(1, scale.decode / 2, 1);
    let (mut ours, mut peers, mut bandwidth) = (Series::default(), Series::default(), Vec::new());
    for round in 0..scale.warm_ups + scale.repeats {
        if round == scale.warm_ups {
            (ours, peers, bandwidth) = Default::default();
        }
        bandwidth.push(probe.bytes_per_second());
        ours.add("ours", load.rates(engine::run(&mut engine, load)));
        if let Some(peer) = &mut peer {
            peer.run(load, &[512], &mut peers)?;
        }
    }
    let bandwidth = median(bandwidth);
    println!(
        "random 1B: {:.1} MB of weights as held; {THREADS} threads read main memory at {:.1} GB/s",
        work.weight_bytes / 1e6,
        bandwidth / 1e9
    );
    let decode = |rates: &Rates| rates.decode;
    let own = ours.best(decode).expect("a round").0;
    let limit = work.decode_limit(bandwidth, None, 1, load.prefill + load.decode / 2);
    Ok(Figure {
        ratio: limit.map(|limit| own / limit),
        ..Figure::rate("decode_1b", "tok/s", own, peers.best(decode), limit)
    })
}

fn outside_kernels(scale: &Scale) -> anyhow::Result<Figure> {
    let mut engine = engine::open(&default_model(), THREADS)?;
    let load = load(1, scale.steps, 1);
    engine::run(&mut engine, load);
    let steps: Vec<_> = (1..=scale.steps)
        .map(|position| engine::decode(&engine, load, position))
        .collect();
    let told = breakdown(&mut engine, &steps);
    println!(
        "a step of decode: {:.0} us, {:.2} % outside kernels, of which barriers of {:.2} us {:.2} %; in each operation on the caller's thread, percent:",
        told.step_us, told.outside_percent, told.barrier_us, told.barriers_percent
    );
    for (operation, percent) in &told.by_operation {
        println!("  {percent:>6.2}  {operation}");
    }
    Ok(Figure::cost(
        "outside_kernels",
        "%",
        told.outside_percent,
        None,
        Some(OUTSIDE_LIMIT),
    ))
}

/// Of the goldens' text; the limit is the f32 model's.
fn perplexity(python: &str) -> anyhow::Result<Figure> {
    let goldens: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(workspace().join("tests/goldens/logits.json"))?)?;
    let golden = &goldens["perplexity"];
    let tokens: Vec<TokenId> = serde_json::from_value(golden["tokens"].clone())?;
    let f32 = golden["f32_perplexity"]
        .as_f64()
        .context("the f32 model's perplexity")?;
    let own = engine::perplexity(&mut engine::open(&default_model(), THREADS)?, &tokens);
    let peer = Peer::start(python, &default_model(), "Q4_1", THREADS)?.perplexity(&tokens)?;
    Ok(Figure::cost(
        "perplexity",
        "",
        own,
        Some((peer, "llama.cpp Q4_1")),
        Some(f32),
    ))
}
