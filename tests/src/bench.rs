//! What benchmarks share: medians, the table, and `target/bench/NAME.jsonl`; ours, peers and limits.

pub mod engine;
pub mod handoff;
pub mod kernels;
pub mod limits;
pub mod load;
pub mod peer;
pub mod random_llama;
pub mod resident;

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
    /// What the machine allows, or the target.
    pub limit: Option<f64>,
    /// Ours against the peer's; over 1 is better for us, whatever the unit. Ours against the limit where a benchmark's page says so.
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

    /// A time or another cost: less is better.
    pub fn cost(
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

/// Prints the table and writes `target/bench/NAME.jsonl`.
pub fn report(name: &str, figures: &[Figure]) -> std::io::Result<()> {
    let folder = workspace().join("target/bench");
    std::fs::create_dir_all(&folder)?;
    let path = folder.join(format!("{name}.jsonl"));
    let mut file = std::fs::File::create(&path)?;
    let shown = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.2}"));
    println!(
        "{:<24} {:>6} {:>10} {:>10} {:>7} {:>10} {:>9}  peer",
        "metric", "unit", "ours", "peer", "ratio", "limit", "of limit"
    );
    for figure in figures {
        let share = figure.limit.map(|limit| 100.0 * figure.ours / limit);
        println!(
            "{:<24} {:>6} {:>10.2} {:>10} {:>7} {:>10} {:>9}  {}",
            figure.metric,
            figure.unit,
            figure.ours,
            shown(figure.peer),
            shown(figure.ratio),
            shown(figure.limit),
            share.map_or("–".to_owned(), |share| format!("{share:.0} %")),
            figure.peer_name.as_deref().unwrap_or("–"),
        );
        serde_json::to_writer(&mut file, figure)?;
        file.write_all(b"\n")?;
    }
    println!("written: {}", path.display());
    Ok(())
}
