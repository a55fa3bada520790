//! Benchmark `handoff`: verified KV between two processes of this machine, beside what others move there in the same run, and beside what it allows; how
//! much of a transfer a prompt's computation hides.
//!
//! usage: handoff [PYTHON_WITH_NIXL_AND_MOONCAKE]

use std::{path::PathBuf, time::Duration};

use baton_tests::bench::{
    Figure,
    handoff::{
        end,
        first_token::Clusters,
        limits::Limits,
        ours::{Ours, Way},
        payload::Payload,
        peers::Peers,
        play,
        runs::Runs,
    },
    median, report,
};

/// Block sizes of the sweep, KiB, and their metrics.
const SWEEP: [(usize, &str, &str); 6] = [
    (4, "grpc_4k_gbps", "shm_4k_gbps"),
    (16, "grpc_16k_gbps", "shm_16k_gbps"),
    (64, "grpc_64k_gbps", "shm_64k_gbps"),
    (256, "grpc_256k_gbps", "shm_256k_gbps"),
    (1_024, "grpc_1m_gbps", "shm_1m_gbps"),
    (4_096, "grpc_4m_gbps", "shm_4m_gbps"),
];
/// The block size of whatever is measured at one size, KiB.
const BLOCK_KIB: usize = 256;
/// Targets: both ends' CPU seconds for a GB, at most; checked against unchecked, at least; of a transfer hidden behind the computation, at least.
const CPU_TARGET: f64 = 0.42;
const VERIFIED_GRPC_TARGET: f64 = 0.88;
const VERIFIED_SHM_TARGET: f64 = 0.75;
const HIDDEN_TARGET: f64 = 0.75;

/// How much is measured.
struct Scale {
    bytes: usize,
    repeats: usize,
    iperf_s: usize,
    pairs: usize,
    idle: Duration,
}

impl Scale {
    /// All of it, or with `BATON_BENCH_QUICK` set just enough to see that everything runs: such figures mean nothing.
    fn chosen() -> Self {
        if std::env::var_os("BATON_BENCH_QUICK").is_some_and(|value| value != "0") {
            println!("QUICK: these figures mean nothing");
            return Self {
                bytes: 64 << 20,
                repeats: 1,
                iperf_s: 1,
                pairs: 1,
                idle: Duration::from_millis(200),
            };
        }
        Self {
            bytes: 1 << 30,
            repeats: 5,
            iperf_s: 2,
            pairs: 15,
            idle: Duration::from_secs(5),
        }
    }
}

fn main() -> anyhow::Result<()> {
    let argument = std::env::args().nth(1);
    if argument.as_deref() == Some(end::ARGUMENT) {
        baton_node::heap::keep_freed();
        return play();
    }
    let scale = Scale::chosen();
    println!(
        "{} MiB of KV a run, medians of {} runs after one to warm up [least–most]",
        scale.bytes >> 20,
        scale.repeats
    );
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    println!("limits:");
    let limits = Limits::measure(scale.bytes, scale.repeats)?;
    println!("peers:");
    let python = argument.map(PathBuf::from);
    let peers = Peers::measure(python.as_deref(), scale.bytes >> 20, scale.repeats, scale.iperf_s);
    let peers = runtime.block_on(peers)?;
    println!("ours, checked unless said:");
    let mut figures = sweep(&scale, &limits, &peers)?;
    figures.extend(verified(&scale)?);
    println!("to the first token:");
    figures.extend(runtime.block_on(hidden(&scale))?);
    report("handoff", &figures)?;
    Ok(())
}

/// Every block size, every way.
fn sweep(scale: &Scale, limits: &Limits, peers: &Peers) -> anyhow::Result<Vec<Figure>> {
    let program = std::env::current_exe()?;
    let mut figures = Vec::new();
    for (block_kib, grpc, shm) in SWEEP {
        for way in Way::SWEPT {
            let (metric, limit) = match way {
                Way::Grpc | Way::Tls => (grpc, limits.tcp),
                Way::Shm => (shm, limits.copy),
            };
            let mut ours = Ours::start(&program, Payload::paged(block_kib << 10, scale.bytes), way)?;
            let runs = Runs::measure(scale.repeats, || ours.run())?;
            runs.show(&format!("{}, {block_kib} KiB", way.name()));
            let peer = peers.best(way.over(), block_kib);
            figures.push(Figure::rate(metric, "GB/s", runs.rate(), peer, Some(limit)));
            if let (Way::Grpc, BLOCK_KIB, Some(cpu)) = (way, block_kib, runs.cpu()) {
                let peer = peers.plain_cpu();
                figures.push(Figure::cost("grpc_cpu_s_per_gb", "s/GB", cpu, peer, Some(CPU_TARGET)));
            }
        }
    }
    let mut ours = Ours::start(&program, Payload::paged(BLOCK_KIB << 10, scale.bytes), Way::Tls)?;
    let runs = Runs::measure(scale.repeats, || ours.run())?;
    runs.show(&format!("{}, {BLOCK_KIB} KiB", Way::Tls.name()));
    figures.push(Figure::rate(
        "grpc_tls_256k_gbps",
        "GB/s",
        runs.rate(),
        None,
        Some(limits.aes),
    ));
    Ok(figures)
}

/// Checked against unchecked, in turns. Nothing without the binary that checks nothing.
fn verified(scale: &Scale) -> anyhow::Result<Vec<Figure>> {
    let checked = std::env::current_exe()?;
    let unchecked = checked.with_file_name("handoff-unchecked");
    if !unchecked.is_file() {
        println!(
            "  {} is missing: checked against unchecked is left out",
            unchecked.display()
        );
        return Ok(Vec::new());
    }
    let payload = Payload::paged(BLOCK_KIB << 10, scale.bytes);
    let mut figures = Vec::new();
    for way in Way::SWEPT {
        let mut ends = [
            Ours::start(&checked, payload, way)?,
            Ours::start(&unchecked, payload, way)?,
        ];
        let mut runs = [Runs::default(), Runs::default()];
        for _ in 0..scale.repeats {
            for (ours, runs) in ends.iter_mut().zip(&mut runs) {
                runs.add(ours.run()?);
            }
        }
        let [checked, unchecked] = runs;
        checked.show(&format!("{}, {BLOCK_KIB} KiB, beside the next", way.name()));
        unchecked.show(&format!("{}, {BLOCK_KIB} KiB, unchecked", way.name()));
        let (metric, target) = match way {
            Way::Grpc | Way::Tls => ("verified_ratio_grpc", VERIFIED_GRPC_TARGET),
            Way::Shm => ("verified_ratio_shm", VERIFIED_SHM_TARGET),
        };
        let ratio = checked.rate() / unchecked.rate();
        figures.push(Figure::rate(metric, "×", ratio, None, Some(target)));
    }
    Ok(figures)
}

/// How much of a transfer over gRPC the computation of the same prompt hides, and what two nodes use that do nothing.
async fn hidden(scale: &Scale) -> anyhow::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for threads in [1, 2] {
        let mut clusters = Clusters::start(threads, &["--transport", "grpc"]);
        for tokens in [512, 2_048] {
            let what = format!("{tokens} tokens, {threads} threads");
            let pairs = clusters.pairs(tokens, scale.pairs).await?;
            pairs.show(&what);
            let alone_ms = alone_ms(scale, tokens as usize)?;
            let hidden = |added_ms: f64| 1.0 - added_ms / alone_ms;
            let share = hidden(pairs.added_ms());
            println!(
                "  {what}: the transfer alone {alone_ms:.2} ms; hidden {share:.2}, of what is not computing {:.2}",
                hidden(pairs.exposed_ms())
            );
            if (threads, tokens) == (1, 2_048) {
                figures.push(Figure::rate("hidden_share_2048", "×", share, None, Some(HIDDEN_TARGET)));
            }
        }
        if threads == 1 {
            let idle = clusters.idle_cpu(scale.idle)?;
            figures.push(Figure::cost("idle_cpu", "s/s", idle, None, None));
        }
    }
    Ok(figures)
}

/// Of a prompt of the default model that was computed before.
fn alone_ms(scale: &Scale, tokens: usize) -> anyhow::Result<f64> {
    let program = std::env::current_exe()?;
    let mut ours = Ours::start(&program, Payload::of_default_model(tokens / 32), Way::Grpc)?;
    let mut times = Vec::new();
    for _ in 0..2 * scale.repeats {
        times.push(ours.run()?.seconds * 1e3);
    }
    Ok(median(times))
}
