//! What the router measures, as Prometheus metrics `baton_*`.

use std::{fmt, time::Duration};

use baton_kv::Time;
use baton_node::metrics::{Buckets, ITL_SECONDS, SECONDS, TTFT_SECONDS, histogram, histograms};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};

use crate::{
    cluster::Cluster,
    core::{
        admission::Admission,
        member::{Phase, Role},
        pairs::Transport,
    },
    request::{Finished, Timings},
};

type Label = [(&'static str, &'static str); 1];

/// The router's metrics; clones share them.
#[derive(Clone)]
pub(crate) struct RouterMetrics {
    requests: Family<Label, Counter>,
    in_flight: Gauge,
    ttft: Histogram,
    stages: Family<Label, Histogram, Buckets>,
    inter_token: Histogram,
    request: Histogram,
    tokens: Family<Label, Counter>,
    handed_over: Counter,
}

impl RouterMetrics {
    /// Registers all of them, and those that are read from `cluster` when they are asked for.
    pub(crate) fn register(registry: &mut Registry, cluster: Cluster) -> Self {
        let metrics = Self {
            requests: Family::default(),
            in_flight: Gauge::default(),
            ttft: histogram(TTFT_SECONDS),
            stages: histograms(TTFT_SECONDS),
            inter_token: histogram(ITL_SECONDS),
            request: histogram(SECONDS),
            tokens: Family::default(),
            handed_over: Counter::default(),
        };
        let seconds = Unit::Seconds;
        registry.register(
            "requests",
            "Requests that ended, by outcome: ok, or the error's code",
            metrics.requests.clone(),
        );
        registry.register(
            "requests_in_flight",
            "Requests that wait or run",
            metrics.in_flight.clone(),
        );
        registry.register_with_unit(
            "ttft",
            "Time to the first token of the first choice, of answers that were completed",
            seconds.clone(),
            metrics.ttft.clone(),
        );
        registry.register_with_unit(
            "ttft_stage",
            "Where that time went",
            seconds.clone(),
            metrics.stages.clone(),
        );
        registry.register_with_unit(
            "inter_token",
            "Gap between two tokens of one answer",
            seconds.clone(),
            metrics.inter_token.clone(),
        );
        registry.register_with_unit(
            "request",
            "From a request's arrival to its end, whatever the outcome",
            seconds,
            metrics.request.clone(),
        );
        registry.register(
            "tokens",
            "Tokens of completed answers: of the prompt, those of it that were found cached, and of the completion",
            metrics.tokens.clone(),
        );
        registry.register_with_unit(
            "request_kv",
            "KV that crossed between nodes for completed answers",
            Unit::Bytes,
            metrics.handed_over.clone(),
        );
        registry.register_collector(Box::new(ClusterCollector(cluster)));
        metrics
    }

    /// A request has come in; counts as in flight until the result is dropped.
    pub(crate) fn arrived(&self) -> InFlight {
        self.in_flight.inc();
        InFlight(self.in_flight.clone())
    }

    /// A request has ended: `outcome` is "ok", or the error's code.
    pub(crate) fn ended(&self, outcome: &'static str, took: Duration) {
        self.requests.get_or_create(&[("outcome", outcome)]).inc();
        self.request.observe(took.as_secs_f64());
    }

    /// `count` tokens left for the client at `now`, after others at `last`.
    pub(crate) fn tokens_left(&self, count: usize, last: Option<Time>, now: Time) {
        let (gaps, gap) = match last {
            Some(last) => (count, baton_node::clock::ms_between(last, now) / 1_000.0 / count as f64),
            None => (count.saturating_sub(1), 0.0),
        };
        for _ in 0..gaps {
            self.inter_token.observe(gap);
        }
    }

    /// A choice was completed.
    pub(crate) fn finished(&self, finished: &Finished) {
        for (kind, count) in [
            ("prompt", finished.usage.prompt_tokens),
            ("cached", finished.usage.cached_tokens),
            ("completion", finished.usage.completion_tokens),
        ] {
            self.tokens.get_or_create(&[("kind", kind)]).inc_by(count.into());
        }
        self.handed_over.inc_by(finished.served.kv_bytes);
        if finished.choice == 0 {
            self.first_token(finished);
        }
    }

    fn first_token(&self, finished: &Finished) {
        let Timings {
            queue_ms,
            prefill_ms,
            transfer_ms,
            first_step_ms,
            ttft_ms,
            ..
        } = finished.timings;
        self.ttft.observe(ttft_ms / 1_000.0);
        let served = &finished.served;
        let handed_over = served.prefill_node.is_some() && served.decode_node.is_some();
        for (stage, ms, took_place) in [
            ("queue", queue_ms, true),
            ("prefill", prefill_ms, true),
            ("transfer", transfer_ms, handed_over),
            ("first_step", first_step_ms, finished.usage.completion_tokens > 1),
        ] {
            if took_place {
                self.stages.get_or_create(&[("stage", stage)]).observe(ms / 1_000.0);
            }
        }
    }
}

/// A request that waits or runs.
pub(crate) struct InFlight(Gauge);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Queue, nodes and prefix index, as they are when asked.
struct ClusterCollector(Cluster);

impl fmt::Debug for ClusterCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterCollector")
    }
}

impl Collector for ClusterCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        // Values are copied under the cluster's lock, and encoded outside of it.
        let seen = self.0.look(Seen::of);
        for (name, help, value) in [
            ("queue_length", "Requests that wait for a node", seen.waiting),
            (
                "prefix_index_entries",
                "Pairs of a named block and a node that holds it",
                seen.index_entries,
            ),
            ("prefix_index_bytes", "Memory that they take at most", seen.index_bytes),
        ] {
            gauge(&mut encoder, name, help, value)?;
        }
        let evicted = ConstCounter::new(seen.index_evicted);
        let metric = encoder.encode_descriptor(
            "prefix_index_evicted",
            "Entries that went, the least recently used first, because the prefix index was at its cap",
            None,
            evicted.metric_type(),
        )?;
        evicted.encode(metric)?;
        let shape = ConstGauge::new(0_i64);
        let mut metric =
            encoder.encode_descriptor("nodes", "Nodes that this router knows", None, shape.metric_type())?;
        for (role, phase, count) in &seen.nodes {
            let labels = [("role", *role), ("phase", *phase)];
            ConstGauge::new(*count).encode(metric.encode_family(&labels)?)?;
        }
        let shape = ConstGauge::new(0.0);
        let mut metric = encoder.encode_descriptor(
            "handoff_bytes_per_second",
            "How fast KV travels between nodes, by their prefill nodes' word: mean of the pairs that take a transport, of what was achieved and predicted",
            None,
            shape.metric_type(),
        )?;
        for (transport, kind, rate) in &seen.rates {
            let labels = [("transport", *transport), ("kind", *kind)];
            ConstGauge::new(*rate).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

fn gauge(encoder: &mut DescriptorEncoder, name: &str, help: &str, value: usize) -> fmt::Result {
    let gauge = ConstGauge::new(value as i64);
    let metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
    gauge.encode(metric)
}

struct Seen {
    waiting: usize,
    index_entries: usize,
    index_bytes: usize,
    index_evicted: u64,
    nodes: Vec<(&'static str, &'static str, i64)>,
    rates: Vec<(&'static str, &'static str, f64)>,
}

impl Seen {
    fn of(admission: &Admission) -> Self {
        let mut nodes = Vec::new();
        for (role, role_name) in [(Role::Prefill, "prefill"), (Role::Decode, "decode")] {
            for (phase, phase_name) in [
                (Phase::Starting, "starting"),
                (Phase::Ready, "ready"),
                (Phase::Draining, "draining"),
                (Phase::Stopped, "stopped"),
            ] {
                let in_phase = admission.members().iter().filter(|member| {
                    let now = member.load().map_or(Phase::Starting, |load| load.phase);
                    member.hello().role == role && now == phase
                });
                nodes.push((role_name, phase_name, in_phase.count() as i64));
            }
        }
        let mut rates = Vec::new();
        for transport in [Transport::Grpc, Transport::Shm] {
            if let Some(rate) = admission.members().pairs().mean(transport) {
                rates.push((transport.name(), "achieved", rate.bytes_per_s));
                rates.push((transport.name(), "predicted", rate.predicted_bytes_per_s));
            }
        }
        Self {
            waiting: admission.waiting(),
            index_entries: admission.index().entries(),
            index_bytes: admission.index().bytes(),
            index_evicted: admission.index().evicted(),
            nodes,
            rates,
        }
    }
}
