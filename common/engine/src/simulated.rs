//! An engine that takes as long as a cost model says, for capacity planning and for tests of everything around an engine.
//!
//! Its KV is real: a row's KV bytes are a keyed mix of the KV bytes of the position before it, as read back from the pool, and its token; and
//! logits are a hash over the KV bytes of *all* positions, as read back. So a corrupted, misplaced, stale or foreign byte changes the answer.
//! What it answers depends on nothing but the key, the layout, the tokens, and how they are drawn: by the sampler of the real engines.

mod memory;
mod mix;

#[cfg(test)]
mod tests;

use std::{sync::Arc, time::Duration, time::Instant};

use baton_kv::{BlockId, IdentityBuilder, KvDtype, KvIdentity, KvLayout, KvMemory};
use baton_scheduler::{Sample, Sampled, Span, StepOutput, StepPlan};

use crate::{
    Engine, LayerWatch, ModelSpec, StepError,
    plan_check::{PlanCheck, PlanLimits},
    sampler::{SamplerScratch, draw},
};

pub use memory::BlockMemory;
use mix::Mix;

/// How long a step takes: the sum of these, in microseconds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct CostModel {
    /// Each step.
    pub step_us: f64,
    /// Each row of a span of several rows (prefill).
    pub prefill_token_us: f64,
    /// Each span of one row (decode).
    pub decode_row_us: f64,
    /// Each token of context that a row attends to.
    pub context_token_us: f64,
}

impl CostModel {
    /// A step that takes no time.
    pub const FREE: Self = Self {
        step_us: 0.0,
        prefill_token_us: 0.0,
        decode_row_us: 0.0,
        context_token_us: 0.0,
    };

    /// Microseconds that `plan` takes.
    pub fn step_us(&self, plan: &StepPlan) -> f64 {
        let mut us = self.step_us;
        for span in &plan.spans {
            let rows = span.rows.len() as f64;
            us += match span.rows.len() {
                1 => self.decode_row_us,
                _ => self.prefill_token_us * rows,
            };
            // Row i attends to context + i + 1 tokens.
            us += self.context_token_us * rows * (span.context as f64 + (rows + 1.0) / 2.0);
        }
        us
    }
}

impl Default for CostModel {
    /// Roughly a small model on a laptop.
    fn default() -> Self {
        Self {
            step_us: 500.0,
            prefill_token_us: 200.0,
            decode_row_us: 1_500.0,
            context_token_us: 0.05,
        }
    }
}

/// A model that is not there.
#[derive(Clone, PartialEq, Debug)]
pub struct SimulatedConfig {
    /// Name as clients use it.
    pub name: String,
    /// Tokens in the vocabulary. Few are likely at each place, and which ones are is a hash.
    pub vocabulary: usize,
    /// Longest context, tokens.
    pub context_length: usize,
    /// Layers of the KV.
    pub layers: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// What the "weights" are: engines with equal keys give equal answers.
    pub key: u64,
    /// How long steps take.
    pub cost: CostModel,
}

impl Default for SimulatedConfig {
    fn default() -> Self {
        Self {
            name: "simulated".to_owned(),
            vocabulary: 49_152,
            context_length: 8_192,
            layers: 2,
            kv_heads: 1,
            head_dim: 16,
            key: 0,
            cost: CostModel::default(),
        }
    }
}

impl SimulatedConfig {
    /// The layout of its KV.
    pub fn layout(&self, block_tokens: usize) -> KvLayout {
        KvLayout {
            layers: self.layers,
            heads: self.kv_heads,
            head_dim: self.head_dim,
            block_tokens,
            dtype: KvDtype::Bf16,
        }
    }
}

/// The engine: no weights, own [`BlockMemory`].
pub struct SimulatedEngine {
    config: SimulatedConfig,
    model: ModelSpec,
    identity: KvIdentity,
    memory: Arc<BlockMemory>,
    check: PlanCheck,
    scratch: Vec<u8>,
    logits: Vec<f32>,
    sampler: SamplerScratch,
    watch: Option<LayerWatch>,
}

/// Tokens that are likely at a place.
const LIKELY: usize = 64;

impl SimulatedEngine {
    /// With a pool of `blocks` blocks of `block_tokens` tokens, and steps of at most `max_rows` rows and `max_sequences` sequences.
    pub fn new(
        config: SimulatedConfig,
        block_tokens: usize,
        blocks: usize,
        max_rows: usize,
        max_sequences: usize,
    ) -> Self {
        let layout = config.layout(block_tokens);
        let number = |value: usize| (value as u64).to_le_bytes();
        let identity = IdentityBuilder::new()
            .field("engine", b"simulated-v2")
            .field("key", &config.key.to_le_bytes())
            .field("vocabulary", &number(config.vocabulary))
            .field("layers", &number(layout.layers))
            .field("kv_heads", &number(layout.heads))
            .field("head_dim", &number(layout.head_dim))
            .finish();
        let model = ModelSpec {
            name: config.name.clone(),
            vocabulary: config.vocabulary,
            context_length: config.context_length,
            parameters: 0,
            weight_bytes: 0,
        };
        let check = PlanCheck::new(PlanLimits {
            max_rows,
            max_spans: max_sequences,
            max_sampling_spans: max_sequences,
            vocabulary: config.vocabulary,
            context_length: config.context_length,
            blocks,
            block_tokens,
        });
        Self {
            model,
            identity,
            memory: Arc::new(BlockMemory::new(layout, blocks)),
            check,
            config,
            scratch: Vec::new(),
            logits: Vec::new(),
            sampler: SamplerScratch::default(),
            watch: None,
        }
    }

    /// Writes the KV of every row of a span.
    fn append(&mut self, plan: &StepPlan, span: &Span) {
        let table = plan.table(span);
        let mut before = match span.context {
            0 => Mix::new(self.config.key),
            context => self.read_position(table, context - 1, Mix::new(self.config.key)),
        };
        for (position, &token) in (span.context..).zip(&plan.tokens[span.rows.clone()]) {
            let state = before.and(u64::from(token)).and(position as u64);
            let block_tokens = self.check.limits.block_tokens;
            self.memory
                .write_position(table[position / block_tokens], position % block_tokens, state.stream());
            before = self.read_position(table, position, Mix::new(self.config.key));
        }
    }

    /// Mixes one position's KV bytes, as read back, into `mix`.
    fn read_position(&mut self, table: &[BlockId], position: usize, mix: Mix) -> Mix {
        let block_tokens = self.check.limits.block_tokens;
        self.memory.read_position(
            table[position / block_tokens],
            position % block_tokens,
            &mut self.scratch,
        );
        mix.and_bytes(&self.scratch)
    }

    /// The token after all of a span's positions.
    fn next_token(&mut self, plan: &StepPlan, span: &Span, sample: &Sample) -> Result<Sampled, StepError> {
        let mut mix = Mix::new(self.config.key);
        for position in 0..span.end() {
            mix = self.read_position(plan.table(span), position, mix);
        }
        self.logits.clear();
        self.logits.resize(self.config.vocabulary, 0.0);
        for word in mix.stream().take(LIKELY) {
            let logit = &mut self.logits[(word % self.config.vocabulary as u64) as usize];
            // In [8, 16), in steps of 2^-20.
            *logit = logit.max(8.0 + (word >> 41) as f32 / (1u32 << 20) as f32);
        }
        let drawn = draw(&self.logits, sample, plan.history(sample), &mut self.sampler);
        Ok(drawn.map_err(|_| StepError::NotFinite)?.of(span.sequence))
    }
}

impl Engine for SimulatedEngine {
    fn model(&self) -> &ModelSpec {
        &self.model
    }

    fn identity(&self) -> KvIdentity {
        self.identity
    }

    fn memory(&self) -> Arc<dyn KvMemory> {
        self.memory.clone()
    }

    fn watch_layers(&mut self, watch: LayerWatch) {
        self.watch = Some(watch);
    }

    fn step(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), StepError> {
        let start = Instant::now();
        output.sampled.clear();
        self.check.check(plan)?;
        for span in &plan.spans {
            self.append(plan, span);
        }
        if let Some(watch) = &self.watch {
            (1..=self.config.layers).for_each(watch);
        }
        for span in &plan.spans {
            if let Some(sample) = &span.sample {
                output.sampled.push(self.next_token(plan, span, sample)?);
            }
        }
        let wanted = Duration::from_nanos((self.config.cost.step_us(plan) * 1_000.0) as u64);
        // The time is the product here: a step must take as long as the modelled hardware would.
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(wanted.saturating_sub(start.elapsed()));
        Ok(())
    }
}
