//! What benchmarks share: medians, the table, and `target/bench/NAME.jsonl`.

use std::io::Write;
use std::time::Instant;

use crate::workspace;

/// One line of a benchmark: our figure beside a peer's and the limit, from the same run.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Figure {
    /// Name, stable over time.
    pub metric: &'static str,
    /// E.g. `tok/s`.
    pub unit: &'static str,
    /// Ours.
    pub ours: f64,
    /// The peer's.
    pub peer: Option<f64>,
    /// Who the peer is.
    pub peer_name: Option<String>,
    /// What the machine allows.
    pub limit: Option<f64>,
    /// Ours against the peer's; over 1 is better for us, whatever the unit.
    pub ratio: Option<f64>,
}

impl Figure {
    /// A rate: more is better.
    pub fn rate(
        metric: &'static str,
        unit: &'static str,
        ours: f64,
        peer: Option<(f64, &str)>,
        limit: Option<f64>,
    ) -> Self {
        let ratio = peer.map(|(value, _)| ours / value);
        Self {
            metric,
            unit,
            ours,
            peer: peer.map(|pair| pair.0),
            peer_name: peer.map(|pair| pair.1.to_owned()),
            limit,
            ratio,
        }
    }

    /// A time: less is better.
    pub fn time(
        metric: &'static str,
        unit: &'static str,
        ours: f64,
        peer: Option<(f64, &str)>,
        limit: Option<f64>,
    ) -> Self {
        Self {
            ratio: peer.map(|(value, _)| value / ours),
            ..Self::rate(metric, unit, ours, peer, limit)
        }
    }
}

/// The middle value. Panics when there is none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Seconds that `run` takes.
pub fn seconds(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

/// Bytes per second at which `threads` threads together read `bytes` of memory again and again: the limit of anything that reads all of its
/// weights at each step. (Weights that fit into a cache are read from it, and so are these.)
pub fn read_bandwidth(threads: usize, bytes: usize) -> f64 {
    const PASSES: usize = 8;
    let memory: Vec<u64> = (0..(bytes / 8) as u64).collect();
    let run = || {
        seconds(|| {
            std::thread::scope(|scope| {
                for part in memory.chunks(memory.len().div_ceil(threads)) {
                    scope.spawn(move || {
                        (0..PASSES).for_each(|_| {
                            std::hint::black_box(sum(part));
                        })
                    });
                }
            });
        })
    };
    run();
    (memory.len() * 8 * PASSES) as f64 / median((0..5).map(|_| run()).collect())
}

/// Sixteen sums side by side, so that memory is waited for and not the adder.
fn sum(words: &[u64]) -> [u64; 16] {
    let mut sums = [0_u64; 16];
    for group in std::hint::black_box(words).chunks_exact(16) {
        for (sum, word) in sums.iter_mut().zip(group) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums
}

/// Prints the table and writes `target/bench/NAME.jsonl`.
pub fn report(name: &str, figures: &[Figure]) -> std::io::Result<()> {
    let folder = workspace().join("target/bench");
    std::fs::create_dir_all(&folder)?;
    let path = folder.join(format!("{name}.jsonl"));
    let mut file = std::fs::File::create(&path)?;
    let shown = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.2}"));
    println!(
        "{:<28} {:>9} {:>12} {:>12} {:>12} {:>7}  peer",
        "metric", "unit", "ours", "peer", "limit", "ratio"
    );
    for figure in figures {
        println!(
            "{:<28} {:>9} {:>12} {:>12} {:>12} {:>7}  {}",
            figure.metric,
            figure.unit,
            shown(Some(figure.ours)),
            shown(figure.peer),
            shown(figure.limit),
            shown(figure.ratio),
            figure.peer_name.as_deref().unwrap_or("–"),
        );
        serde_json::to_writer(&mut file, figure)?;
        file.write_all(b"\n")?;
    }
    println!("written: {}", path.display());
    Ok(())
}
