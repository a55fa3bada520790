//! Benchmark `first-light`: the engine beside llama.cpp on the same file in the same run, what the KV cache saves, and the time to the first
//! token handed over against local.
//!
//! usage: first-light PYTHON_WITH_LLAMA_CPP

use anyhow::Context;
use baton_engine::Isa;
use baton_tests::bench::{
    Figure, engine,
    limits::{ReadProbe, Work},
    load::{Load, Rates, Series},
    median,
    peer::Peer,
    report,
};
use baton_tests::{Cluster, ClusterOptions, client, default_model};

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

    let mut engine = engine::open(&default_model(), THREADS)?;
    let work = Work::of(&default_model(), &engine)?;
    let bandwidth = ReadProbe::new(THREADS, work.weight_bytes as usize)?.bytes_per_second();
    println!(
        "{:.1} MB of weights; {THREADS} threads read as much at {:.1} GB/s",
        work.weight_bytes / 1e6,
        bandwidth / 1e9
    );
    let mut peer = Peer::start(&python, &default_model(), "Q4_1", THREADS)?;
    println!("{}", peer.about);
    // At 512 tokens, and from empty.
    let load = |prefill, decode| Load {
        prefill,
        decode,
        sequences: 1,
    };
    let loads = [load(PREFILL, DECODE), load(1, DECODE)];
    let (mut ours, mut peers): ([Series; 2], [Series; 2]) = Default::default();
    for repeat in 0..=REPEATS {
        if repeat == 1 {
            (ours, peers) = Default::default();
        }
        for (index, &load) in loads.iter().enumerate() {
            ours[index].add("ours", load.rates(engine::run(&mut engine, load)));
            peer.run(load, &[PREFILL], &mut peers[index])?;
        }
    }
    drop((engine, peer));

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let handed_over = runtime.block_on(ttft_ms(1));
    let local = runtime.block_on(ttft_ms(0));

    let own = |series: &Series, phase| series.best(phase).expect("a repeat").0;
    let prefill = |rates: &Rates| rates.prefill;
    let decode = |rates: &Rates| rates.decode;
    let decode_at = own(&ours[0], decode);
    // Without a KV cache each token runs the whole sequence again.
    let no_kv = own(&ours[0], prefill) / PREFILL as f64;
    let limit = |context| work.decode_limit(bandwidth, None, 1, context + DECODE / 2);
    report(
        "first-light",
        &[
            Figure::rate(
                "prefill_512",
                "tok/s",
                own(&ours[0], prefill),
                peers[0].best(prefill),
                None,
            ),
            Figure::rate(
                "decode_1",
                "tok/s",
                own(&ours[1], decode),
                peers[1].best(decode),
                limit(0),
            ),
            Figure::rate(
                "decode_1_at_512",
                "tok/s",
                decode_at,
                peers[0].best(decode),
                limit(PREFILL),
            ),
            Figure::rate(
                "kv_cache_saves_at_512",
                "tok/s",
                decode_at,
                Some((no_kv, "no KV cache")),
                None,
            ),
            Figure::cost("ttft_512_handed_over", "ms", handed_over, Some((local, "local")), None),
        ],
    )?;
    Ok(())
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
