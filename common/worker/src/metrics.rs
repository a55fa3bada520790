//! What a node measures of itself, as Prometheus metrics `baton_*`.

use std::{sync::atomic::AtomicU64, time::Duration};

use baton_kv::PoolCounts;
use baton_node::metrics::{Buckets, SECONDS, TOKENS, histogram, histograms};
use baton_scheduler::SchedulerLoad;
use baton_transfer::{Transport, grpc::PathEvent};
use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// One label: its name and its value.
type Label = [(&'static str, &'static str); 1];

/// What a step computed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum StepKind {
    /// Prompts only.
    Prefill,
    /// One token per sequence only.
    Decode,
    /// Both.
    Mixed,
}

/// How a token came to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TokenKind {
    /// Part of a prompt, computed here.
    PromptComputed,
    /// Part of a prompt, found in the pool.
    PromptCached,
    /// Drawn.
    Generated,
}

impl StepKind {
    fn label(self) -> Label {
        [(
            "kind",
            match self {
                Self::Prefill => "prefill",
                Self::Decode => "decode",
                Self::Mixed => "mixed",
            },
        )]
    }
}

impl TokenKind {
    fn label(self) -> Label {
        [(
            "kind",
            match self {
                Self::PromptComputed => "prompt_computed",
                Self::PromptCached => "prompt_cached",
                Self::Generated => "generated",
            },
        )]
    }
}

/// One node's metrics; clones share them.
#[derive(Clone)]
pub struct WorkerMetrics {
    kv_blocks: Family<Label, Gauge>,
    kv_blocks_total: Gauge,
    kv_bytes_used: Gauge,
    waiting: Gauge,
    running: Gauge,
    queued_prefill_tokens: Gauge,
    preemptions: Counter,
    step_seconds: Family<Label, Histogram, Buckets>,
    step_rows: Histogram,
    tokens: Family<Label, Counter>,
    handoffs: Gauge,
    handoff_streams: Gauge,
    handoff_aborts: Family<Label, Counter>,
    transfer_bytes: Family<Label, Counter>,
    transfer_early_bytes: Counter,
    transfer_seconds: Histogram,
    pushes: Family<Label, Counter>,
    probe_rate: Family<Label, Gauge<f64, AtomicU64>>,
    slow: Family<Label, Counter>,
    bad_paths: Family<Label, Gauge>,
}

impl WorkerMetrics {
    /// Registers everything with a registry of [`baton_node::metrics::registry`], which adds the prefix `baton`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            kv_blocks: Family::default(),
            kv_blocks_total: Gauge::default(),
            kv_bytes_used: Gauge::default(),
            waiting: Gauge::default(),
            running: Gauge::default(),
            queued_prefill_tokens: Gauge::default(),
            preemptions: Counter::default(),
            step_seconds: histograms(SECONDS),
            step_rows: histogram(TOKENS),
            tokens: Family::default(),
            handoffs: Gauge::default(),
            handoff_streams: Gauge::default(),
            handoff_aborts: Family::default(),
            transfer_bytes: Family::default(),
            transfer_early_bytes: Counter::default(),
            transfer_seconds: histogram(SECONDS),
            pushes: Family::default(),
            probe_rate: Family::default(),
            slow: Family::default(),
            bad_paths: Family::default(),
        };
        registry.register("kv_blocks", "KV blocks by state", metrics.kv_blocks.clone());
        registry.register("kv_blocks_total", "KV blocks in all", metrics.kv_blocks_total.clone());
        registry.register(
            "kv_bytes_used",
            "Bytes of KV blocks that are not free",
            metrics.kv_bytes_used.clone(),
        );
        registry.register("scheduler_waiting", "Sequences waiting", metrics.waiting.clone());
        registry.register("scheduler_running", "Sequences running", metrics.running.clone());
        registry.register(
            "scheduler_queued_prefill_tokens",
            "Prompt tokens not computed yet",
            metrics.queued_prefill_tokens.clone(),
        );
        registry.register(
            "preemptions",
            "Times a sequence lost its blocks to others",
            metrics.preemptions.clone(),
        );
        registry.register_with_unit(
            "step",
            "Duration of an engine step",
            Unit::Seconds,
            metrics.step_seconds.clone(),
        );
        registry.register("step_rows", "Rows of an engine step", metrics.step_rows.clone());
        registry.register("tokens", "Tokens by how they came to be", metrics.tokens.clone());
        registry.register(
            "handoff_pushes",
            "Verified pushes out of this node, by how their KV travelled",
            metrics.pushes.clone(),
        );
        registry.register("handoffs", "Live handoffs into this node", metrics.handoffs.clone());
        registry.register(
            "handoff_streams",
            "Push streams that fill handoffs into this node",
            metrics.handoff_streams.clone(),
        );
        registry.register(
            "handoff_aborts",
            "Handoffs that came to nothing",
            metrics.handoff_aborts.clone(),
        );
        registry.register(
            "transfer_bytes",
            "KV bytes that crossed between nodes",
            metrics.transfer_bytes.clone(),
        );
        registry.register(
            "transfer_early_bytes",
            "KV bytes that left while other layers of their blocks were still being computed",
            metrics.transfer_early_bytes.clone(),
        );
        registry.register_with_unit(
            "transfer",
            "From the first token drawn here to the decode node's verdict",
            Unit::Seconds,
            metrics.transfer_seconds.clone(),
        );
        registry.register(
            "handoff_probe_bytes_per_second",
            "What the last probe of a path to a decode node gave; 0 when it failed",
            metrics.probe_rate.clone(),
        );
        registry.register(
            "handoff_slow",
            "Transfers that were far slower than their path's probe",
            metrics.slow.clone(),
        );
        registry.register(
            "handoff_bad_paths",
            "Paths to decode nodes whose last probe was far slower than the one before",
            metrics.bad_paths.clone(),
        );
        metrics
    }

    /// The pool's blocks by state.
    pub(crate) fn pool(&self, counts: &PoolCounts, block_bytes: usize) {
        let states = [
            ("free", counts.free),
            ("cached", counts.cached),
            ("held", counts.held),
            ("granted", counts.granted),
            ("quarantined", counts.quarantined),
        ];
        for (state, count) in states {
            self.kv_blocks.get_or_create(&[("state", state)]).set(count as i64);
        }
        self.kv_blocks_total.set(counts.total as i64);
        self.kv_bytes_used
            .set(((counts.total - counts.free) * block_bytes) as i64);
    }

    /// The scheduler's queues.
    pub(crate) fn scheduler(&self, load: &SchedulerLoad) {
        self.waiting.set(load.waiting as i64);
        self.running.set(load.running as i64);
        self.queued_prefill_tokens.set(load.queued_prefill_tokens as i64);
        self.preemptions
            .inc_by(load.preemptions.saturating_sub(self.preemptions.get()));
    }

    /// One engine step.
    pub(crate) fn step(&self, kind: StepKind, rows: usize, duration: Duration) {
        self.step_seconds
            .get_or_create(&kind.label())
            .observe(duration.as_secs_f64());
        self.step_rows.observe(rows as f64);
    }

    /// Tokens computed, found or drawn.
    pub(crate) fn tokens(&self, kind: TokenKind, count: usize) {
        self.tokens.get_or_create(&kind.label()).inc_by(count as u64);
    }

    /// Live handoffs into this node, aborting ones included, and the push streams that fill them.
    pub(crate) fn handoffs(&self, count: usize, streams: usize) {
        self.handoffs.set(count as i64);
        self.handoff_streams.set(streams as i64);
    }

    /// A handoff that came to nothing, by its stable code.
    pub fn handoff_aborted(&self, code: &'static str) {
        self.handoff_aborts.get_or_create(&[("reason", code)]).inc();
    }

    /// A push that was verified: its bytes, those that left before the step that computed them had ended, and the time from the first token to the verdict.
    pub fn sent(&self, bytes: u64, early_bytes: u64, duration: Duration, transport: Transport) {
        self.transferred("sent", bytes);
        self.pushes.get_or_create(&[("transport", transport.name())]).inc();
        self.transfer_early_bytes.inc_by(early_bytes);
        self.transfer_seconds.observe(duration.as_secs_f64());
    }

    /// What was learnt of a path to a decode node.
    pub fn path(&self, event: PathEvent) {
        let label = |transport: Transport| [("transport", transport.name())];
        match event {
            PathEvent::Probed(transport, bytes_per_s) => {
                self.probe_rate.get_or_create(&label(transport)).set(bytes_per_s);
            }
            PathEvent::Slow(transport) => {
                self.slow.get_or_create(&label(transport)).inc();
            }
            PathEvent::Bad(transport, paths) => {
                self.bad_paths.get_or_create(&label(transport)).set(paths as i64);
            }
        }
    }

    /// KV that a peer has pushed and that was verified.
    pub(crate) fn received(&self, bytes: u64) {
        self.transferred("received", bytes);
    }

    fn transferred(&self, direction: &'static str, bytes: u64) {
        self.transfer_bytes
            .get_or_create(&[("direction", direction)])
            .inc_by(bytes);
    }
}
