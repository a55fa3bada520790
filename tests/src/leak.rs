//! The leak check: once nothing runs, no block is held, granted or quarantined, free + cached = total, and no handoff, stream or sequence is left.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::process::{Process, pause};

/// Sums of every sample of one metric, by the value of one label.
pub fn samples(text: &str, metric: &str, label: &str) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else {
            continue;
        };
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        if name != metric {
            continue;
        }
        let key = labels
            .trim_end_matches('}')
            .split(',')
            .find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == label))
            .map_or(String::new(), |(_, value)| value.trim_matches('"').to_owned());
        *sums.entry(key).or_insert(0.0) += value.parse::<f64>().unwrap_or(f64::NAN);
    }
    sums
}

/// Sum of every sample of one metric; NaN when there is none.
pub fn total(text: &str, metric: &str) -> f64 {
    samples(text, metric, "")
        .into_values()
        .reduce(|a, b| a + b)
        .unwrap_or(f64::NAN)
}

/// Waits until the node holds nothing; panics with what it holds at the limit.
pub fn assert_idle(node: &Process, limit: Duration) {
    let deadline = Instant::now() + limit;
    loop {
        let text = node.metrics();
        let blocks = samples(&text, "baton_kv_blocks", "state");
        let of = |state: &str| blocks.get(state).copied().unwrap_or(f64::NAN);
        let lists = ["handoffs", "handoff_streams", "scheduler_waiting", "scheduler_running"];
        let listed: BTreeMap<&str, f64> = lists
            .into_iter()
            .map(|name| (name, total(&text, &format!("baton_{name}"))))
            .collect();
        let idle = of("held") == 0.0
            && of("granted") == 0.0
            && of("quarantined") == 0.0
            && of("free") + of("cached") == total(&text, "baton_kv_blocks_total")
            && listed.values().all(|count| *count == 0.0);
        if idle {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "the {} node at {} still holds blocks or handoffs: {blocks:?}, {listed:?}",
            node.role.command(),
            node.grpc
        );
        pause();
    }
}
