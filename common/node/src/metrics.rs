//! Conventions for metrics: names begin with `baton_`, units come last (`_seconds`, `_bytes`), and equal things have equal buckets.

use std::sync::Arc;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{family::Family, gauge::ConstGauge, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

use crate::{Lifecycle, Phase};

/// Metrics of one process, once all are registered.
pub type Metrics = Arc<Registry>;

/// Time to first token, seconds: from a prefix hit on a laptop (5 ms) to a full queue.
pub const TTFT_SECONDS: &[f64] = &[
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
];

/// Gap between two tokens of one answer, seconds.
pub const ITL_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0,
    2.5,
];

/// Anything else that takes time, seconds: 100 µs to 10 minutes.
pub const SECONDS: &[f64] = &[
    0.000_1, 0.000_5, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0,
    600.0,
];

/// Sizes, bytes: 1 KiB to 16 GiB, by fours.
pub const BYTES: &[f64] = &[
    1024.0,
    4096.0,
    16384.0,
    65536.0,
    262144.0,
    1048576.0,
    4194304.0,
    16777216.0,
    67108864.0,
    268435456.0,
    1073741824.0,
    4294967296.0,
    17179869184.0,
];

/// Numbers of tokens, by twos.
pub const TOKENS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    65536.0, 131072.0,
];

/// A histogram over one of the bucket sets above.
pub fn histogram(buckets: &'static [f64]) -> Histogram {
    Histogram::new(buckets.iter().copied())
}

/// A family of histograms over one of the bucket sets above.
pub fn histograms<L>(buckets: &'static [f64]) -> Family<L, Histogram, Buckets>
where
    L: Clone + std::hash::Hash + Eq,
{
    Family::new_with_constructor(Buckets(buckets))
}

/// Makes histograms of one bucket set.
#[derive(Clone, Copy, Debug)]
pub struct Buckets(&'static [f64]);

impl prometheus_client::metrics::family::MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        histogram(self.0)
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct BuildLabels {
    version: &'static str,
    role: String,
}

/// A registry with prefix `baton` that already holds `baton_build_info{version,role}` and `baton_phase{phase}` (1 for the phase that `lifecycle` is in).
///
/// The prefix applies to collectors, too: their names come without it. Register everything, then wrap it into [`Metrics`] for [`crate::ops`].
pub fn registry(role: &str, lifecycle: &Lifecycle) -> Registry {
    let mut registry = Registry::with_prefix("baton");
    let build = Family::<BuildLabels, Gauge>::default();
    build
        .get_or_create(&BuildLabels {
            version: env!("CARGO_PKG_VERSION"),
            role: role.to_owned(),
        })
        .set(1);
    registry.register("build_info", "Version and role of this process", build);
    registry.register_collector(Box::new(PhaseCollector {
        lifecycle: lifecycle.clone(),
    }));
    registry
}

#[derive(Debug)]
struct PhaseCollector {
    lifecycle: Lifecycle,
}

impl Collector for PhaseCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let now = self.lifecycle.phase();
        let phase = ConstGauge::new(0_i64);
        let mut metric = encoder.encode_descriptor(
            "phase",
            "1 for the phase that the process is in",
            None,
            phase.metric_type(),
        )?;
        for each in [Phase::Starting, Phase::Ready, Phase::Draining, Phase::Stopped] {
            let labels = [("phase", each.as_str())];
            ConstGauge::new(i64::from(each == now)).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
