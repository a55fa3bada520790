//! The leak check: once nothing runs, no block is held, granted or quarantined, and free + cached = total.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::{http, process::pause};

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

/// Sum of every sample of one metric.
pub fn total(text: &str, metric: &str) -> f64 {
    samples(text, metric, "").values().sum()
}

/// Waits until the node at `ops` holds nothing; panics with what it holds at the limit.
pub fn assert_idle(ops: SocketAddr, limit: Duration) {
    let deadline = Instant::now() + limit;
    loop {
        let text = http::get(ops, "/metrics").body;
        let blocks = samples(&text, "baton_kv_blocks", "state");
        let of = |state: &str| blocks.get(state).copied().unwrap_or(f64::NAN);
        let idle = of("held") == 0.0
            && of("granted") == 0.0
            && of("quarantined") == 0.0
            && of("free") + of("cached") == total(&text, "baton_kv_blocks_total");
        if idle {
            return;
        }
        assert!(Instant::now() < deadline, "node {ops} still holds blocks: {blocks:?}");
        pause();
    }
}
