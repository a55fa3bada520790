//! One step as pure data: what an engine computes, and what it gives back.

use std::ops::Range;

use baton_kv::{BlockId, TokenId};

/// One sequence on one node (unique within the process).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SequenceId(pub u64);

/// How the next token is drawn from the logits. Plain values, validated at the edge.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SamplingParams {
    /// 0 is greedy: the highest logit, the lowest id among equals.
    pub temperature: f32,
    /// Keep the `top_k` most probable; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most probable tokens whose mass reaches `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than `min_p` times the most probable; 0 keeps all.
    pub min_p: f32,
    /// With (`choice`, output index) the only source of randomness.
    pub seed: u64,
    /// Which of the `n` answers to one prompt.
    pub choice: u32,
}

impl SamplingParams {
    /// Greedy.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            choice: 0,
        }
    }
}

/// Draw one token from the logits of a span's last row.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sample {
    /// How.
    pub params: SamplingParams,
    /// Output index of the token to be drawn (0 for the first after the prompt).
    pub index: u32,
}

/// One sequence's share of a step: `rows.len()` tokens at positions `context..context + rows.len()`.
#[derive(Clone, PartialEq, Debug)]
pub struct Span {
    /// Whose.
    pub sequence: SequenceId,
    /// Range into [`StepPlan::tokens`].
    pub rows: Range<usize>,
    /// Tokens whose KV is in the pool before this step; the position of the first row.
    pub context: usize,
    /// Range into [`StepPlan::tables`]: the blocks that hold positions `0..context + rows.len()`, in order.
    pub table: Range<usize>,
    /// Whether the last row's logits are wanted, and what for.
    pub sample: Option<Sample>,
}

impl Span {
    /// Tokens in the pool after this step.
    pub fn end(&self) -> usize {
        self.context + self.rows.len()
    }
}

/// What one step computes. Reused from step to step; [`StepPlan::clear`] keeps the allocations.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct StepPlan {
    /// Token of each row, spans one after another.
    pub tokens: Vec<TokenId>,
    /// One per sequence, in order of rows; decode spans (one row) before prefill spans.
    pub spans: Vec<Span>,
    /// Block tables, one after another.
    pub tables: Vec<BlockId>,
}

impl StepPlan {
    /// Empties it.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.spans.clear();
        self.tables.clear();
    }

    /// Rows to compute.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The spans that sample, in order.
    pub fn sampling_spans(&self) -> impl Iterator<Item = &Span> {
        self.spans.iter().filter(|span| span.sample.is_some())
    }

    /// The block table of a span.
    pub fn table(&self, span: &Span) -> &[BlockId] {
        &self.tables[span.table.clone()]
    }
}

/// A drawn token.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sampled {
    /// Whose.
    pub sequence: SequenceId,
    /// The token.
    pub token: TokenId,
    /// Its natural log-probability under the model's own distribution (temperature 1, before top-k, top-p and min-p).
    pub logprob: f32,
}

/// What a step gives back: one entry per sampling span, in order. Reused from step to step.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct StepOutput {
    /// The drawn tokens.
    pub sampled: Vec<Sampled>,
}
